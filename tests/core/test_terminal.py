"""Where remarks go: stderr, in a notebook too."""

import rich.console
from rich.text import Text

from tip_analysis.core.terminal import stderr_console


def test_remarks_are_no_outputs_of_a_notebooks_cell(monkeypatch, capsys):
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert rich.console.Console().is_jupyter  # what a console would do by itself
    console = stderr_console()
    assert not console.is_jupyter
    with console.status(Text("loading a-model")):
        pass
    console.print("a remark")
    found = capsys.readouterr()
    assert found.out == ""
    assert "a remark" in found.err
    assert "loading" not in found.err  # a spinner is for terminals
