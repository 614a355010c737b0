"""`python -m qcowfs` is `qcowfs`."""

from qcowfs.cli import command

command()
