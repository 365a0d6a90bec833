"""`python -m perflow_blocks.cli` is the `perflow` command."""

from . import main

main()
