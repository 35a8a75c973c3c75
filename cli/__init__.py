"""The command line, one file a command; imported as `graphsplit.cli`."""

from graphsplit.cli.root import app, main

__all__ = ["app", "main"]
