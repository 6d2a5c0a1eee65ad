"""The cache of compiled code: ours alone, private, and made again where it is damaged."""

import os

import numpy as np
import pytest

from tip_analysis.logits import kernel_cache
from tip_analysis.logits.kernel_cache import KeptOnDisk, private_folder, remove_damaged


def double(values, out) -> None:
    out[0] = values[0] * 2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tip_analysis" / "numba"


def called() -> float:
    out = np.zeros(1)
    KeptOnDisk(double, nogil=True)(np.array([3.0]), out)
    return float(out[0])


def kept(cache) -> dict:
    return {path: path.read_bytes() for path in cache.rglob("*.nb*")}


def test_compiled_code_is_kept_in_a_private_folder_and_read_again(cache):
    assert called() == 6.0
    assert cache.stat().st_mode & 0o777 == 0o700
    made = {path: path.stat().st_mtime_ns for path in kept(cache)}
    assert len(made) == 2
    assert called() == 6.0
    assert {path: path.stat().st_mtime_ns for path in kept(cache)} == made


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:40], lambda data: b"", lambda data: data[::-1]]
)
def test_a_damaged_file_is_made_again(cache, suffix, damage):
    called()
    path = next(path for path in kept(cache) if path.suffix == suffix)
    path.write_bytes(damage(path.read_bytes()))
    assert called() == 6.0
    remove_damaged(cache)
    assert len(kept(cache)) == 2, "what lies there now is as it was noted"


def test_a_file_that_nobody_noted_is_never_read(cache):
    called()
    stranger = cache / "strange.nbi"
    stranger.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert called() == 6.0
    assert not stranger.exists()


@pytest.mark.parametrize("spoil", ["open", "link", "file", "foreign"])
def test_a_folder_that_others_could_write_to_is_not_used(cache, spoil, monkeypatch, tmp_path):
    cache.parent.mkdir()
    if spoil == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    elif spoil == "file":
        cache.write_text("")
    else:
        cache.mkdir(mode=0o700)
        cache.chmod(0o770 if spoil == "open" else 0o700)
    if spoil == "foreign":
        monkeypatch.setattr(kernel_cache.os, "getuid", lambda: os.geteuid() + 1)
    assert private_folder() is None
    assert called() == 6.0, "it is compiled all the same"
    assert not kept(tmp_path)


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kernel_cache.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError()))
    assert private_folder() is None
    assert called() == 6.0
