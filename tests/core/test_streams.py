"""What libraries write to stderr while it is held back."""

import os

import pytest

from tip_analysis.core.streams import stderr_held


@pytest.mark.parametrize("drop", [False, True])
def test_what_is_held_back_appears_unless_it_is_dropped(capfd, drop):
    with stderr_held() as dropped:
        os.write(2, b"thread panicked\nbacktrace\n")
        assert capfd.readouterr().err == ""
        if drop:
            dropped.append(True)
    assert capfd.readouterr().err == ("" if drop else "thread panicked\nbacktrace\n")


def test_an_error_passes_through(capfd):
    with pytest.raises(IndexError), stderr_held():
        [][os.write(2, b"line\n")]
    assert capfd.readouterr().err == "line\n"
    os.write(2, b"and after\n")
    assert capfd.readouterr().err == "and after\n"


def test_without_a_place_to_hold_it_nothing_is_held_back(capfd, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with stderr_held():
        os.write(2, b"line\n")
        assert capfd.readouterr().err == "line\n"
