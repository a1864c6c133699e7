"""``python -m lmppl``: the command line."""

from .cli import main

main()
