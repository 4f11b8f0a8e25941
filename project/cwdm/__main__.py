"""`python -m cwdm` is the `cwdm` command."""

from cwdm.cli import main

main()
