"""Files that are complete or absent."""

import hashlib
import os

import pytest

from tip_analysis.core.atomic_files import (
    file_hash,
    made_in_a_folder,
    part_of,
    remove_stale_parts,
    write_atomically,
)
from tip_analysis.core.errors import StorageError


def test_atomic_writing_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda part: part.write_text("old") and None)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda part: (part.write_text("new"), 1 / 0)[1])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_and_what_the_system_refuses_is_one_error(tmp_path):
    write_atomically(tmp_path / "new" / "file", lambda part: part.write_text("whole"))
    assert (tmp_path / "new" / "file").read_text() == "whole"
    with pytest.raises(StorageError, match=r"cannot write .*what was there before is intact"):
        write_atomically(tmp_path / "new" / "file" / "inside", lambda part: part.write_text(""))


def test_parts_of_this_process_stay(tmp_path):
    mine = part_of(tmp_path / "file")
    mine.write_text("")
    remove_stale_parts(tmp_path)
    assert mine.exists()


def test_the_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert file_hash(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


def test_files_that_a_library_leaves_beside_a_part_go_with_it(tmp_path):
    with made_in_a_folder(tmp_path / ".x.part") as path:
        path.write_text("made")
        path.with_name(".tmpAbC123").write_text("a library's own")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(".x.part", "made")]


def test_files_that_a_killed_library_leaves_are_swept(tmp_path):
    if (child := os.fork()) == 0:
        with made_in_a_folder(part_of(tmp_path / "x")) as path:
            path.with_name(".tmpAbC123").write_text("half")
            os._exit(9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.rglob("*"))) == 2
    remove_stale_parts(tmp_path)
    assert not list(tmp_path.iterdir())
