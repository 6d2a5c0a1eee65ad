"""The commands: a frozen dataclass each, whose docstrings are its `--help` and whose `carry_out`
does it.

In: options. Out: one call of a door function, a few lines for the reader. Modules are named after
the rooms that they call, and import what is slow when a command is carried out, so that help is
quick. `cli.registry` lists every command.
"""
