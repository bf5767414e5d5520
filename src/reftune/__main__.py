"""Makes `python -m reftune` run the command `reftune`."""

from reftune.terminal.cli import main

main()
