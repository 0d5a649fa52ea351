"""``python -m decouple_merge.cli`` is the command, for launchers that start modules."""

from .main import main

main()
