"""`python -m reftune` is `reftune`."""

from reftune.terminal.cli import main

main()
