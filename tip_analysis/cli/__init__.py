"""On top: the command line. Options are dataclasses whose docstrings are the help.

In: argv. Out: calls of stage functions, a few lines for the reader, an exit status.
Nothing is computed here. Read first: `options`, then `commands`.
"""
