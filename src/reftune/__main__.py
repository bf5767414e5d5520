"""`python -m reftune` is `reftune`."""

from reftune.cli import main

main()
