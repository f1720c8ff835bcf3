"""`python -m serving.cli` is the `packtrain` command."""

from serving.cli.main import main

main()
