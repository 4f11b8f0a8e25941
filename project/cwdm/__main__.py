"""`python -m cwdm` is the `cwdm` command."""

from cwdm.cli.app import main

main()
