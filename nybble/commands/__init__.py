"""One file for each command of `nybble`. They import the engine when they run, so that `--help` is quick."""
