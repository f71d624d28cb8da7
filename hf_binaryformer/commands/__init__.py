"""What the commands of `binaryformer` do, from files to files; :mod:`hf_binaryformer.cli` is how they are typed."""
