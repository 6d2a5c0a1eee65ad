"""On top: the command line. Options are dataclasses whose docstrings are the help.

In: argv. Out: calls of door functions, a few lines for the reader, an exit status.
Nothing is computed here. Read first: `registry`, then a module of `commands`.
"""
