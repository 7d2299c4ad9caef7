"""A file is complete or absent, whatever happens while it is written."""

import hashlib

import pytest

from megatron_egrsd.errors import RunError
from megatron_egrsd.system.files import atomic, sha256, write_text


def test_a_file_appears_at_the_end_and_replaces_an_older_one(tmp_path):
    path = tmp_path / "made" / "file.json"
    write_text(path, "old")
    with atomic(path) as temporary:
        temporary.write_text("né", encoding="utf-8")
        assert temporary.name == "file.json.partial" and path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "né" and list(path.parent.iterdir()) == [path]
    assert sha256(path) == hashlib.sha256("né".encode()).hexdigest()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(type(error)), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_names_path_and_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/file/x: File exists"):
        write_text(tmp_path / "file" / "x", "text")
    (tmp_path / "directory" / "full").mkdir(parents=True)
    with pytest.raises(RunError, match=r"cannot write .*/directory: Is a directory"):
        write_text(tmp_path / "directory", "text")
    assert not list(tmp_path.glob("*.partial"))
