"""`python -m kilodelta` is the command line."""

from kilodelta.cli import main

main(prog_name="kilodelta")
