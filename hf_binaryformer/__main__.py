"""`python -m hf_binaryformer` is the `binaryformer` command."""

from hf_binaryformer.cli import main

main()
