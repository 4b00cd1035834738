"""`python -m vitreg_hub` is the `vitreg` command."""

from vitreg_hub.cli import main

main()
