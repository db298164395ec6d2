"""``python -m bitwright``."""

from bitwright.cli.commands import main

main()
