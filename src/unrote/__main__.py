"""``python -m unrote``."""

from unrote.cli import main

main()
