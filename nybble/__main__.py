"""`python -m nybble`: the command, where it is not on the path."""

from nybble.cli import main

main()
