"""The work of the commands of `binaryformer`, from files to files; their command line is :mod:`hf_binaryformer.cli`."""
