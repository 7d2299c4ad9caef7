"""A file is complete or absent, whatever happens while it is written."""

import errno
import hashlib
import multiprocessing
import os
import re
import time
from types import SimpleNamespace

import pytest

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.system.files import (
    atomic,
    check_outside,
    check_writable,
    disk_error,
    handles_error,
    is_empty,
    locked,
    sha256,
    write_text,
)


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


def _hold(directory, held):
    with locked(directory):
        held.send(None)
        time.sleep(600)


def test_a_directory_has_one_writer_and_a_killed_one_leaves_no_lock(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path / "run", theirs))
    holder.start()
    assert ours.poll(60)
    with pytest.raises(BadArgument, match=r"another run is writing .*run; wait for its end"), locked(tmp_path / "run"):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path / "run"):
        assert is_empty(tmp_path / "run")
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert not is_empty(tmp_path / "run")


def test_a_lock_that_nothing_was_written_under_leaves_no_directory(tmp_path):
    with pytest.raises(ValueError, match="refused"), locked(tmp_path / "new"):
        raise ValueError("refused")
    assert not list(tmp_path.iterdir())


def test_places_that_no_directory_can_be_made_at(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "a" / "b"):
        with pytest.raises(BadArgument, match=r"output = .* cannot be a directory, because .*/file is a file"):
            check_writable(path, "output")
    check_writable(tmp_path / "new" / "run", "output")


@pytest.mark.parametrize(
    ("flags", "reason"), [(0, "is not writable for this user"), (os.ST_RDONLY, "lies on a read-only file system")]
)
def test_places_that_cannot_be_written(flags, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    with pytest.raises(BadArgument, match=rf"output = .*/new/run cannot be written, because {tmp_path} {reason}"):
        check_writable(tmp_path / "new" / "run", "output")


def test_an_output_within_its_input_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for inside in ("model", "model/rl", "model/a/../rl", "link/rl"):
        with pytest.raises(BadArgument, match=r"output = .* lies within model.path"):
            check_outside(tmp_path / inside, "output", tmp_path / "model", "model.path")
    check_outside(tmp_path / "model-rl", "output", tmp_path / "model", "model.path")


def test_errors_of_the_disk_are_sentences_and_others_are_not():
    assert disk_error(OSError(errno.ENOSPC, "No space left on device", "/x/y")) == (
        "cannot read or write /x/y: No space left on device"
    )
    assert "a file: Read-only" in disk_error(OSError(errno.EROFS, "Read-only file system"))
    assert disk_error(ConnectionResetError(errno.ECONNRESET, "reset")) == disk_error(TimeoutError("late")) == ""


def test_too_many_open_files_is_a_sentence_whoever_says_so():
    gloo = RuntimeError("[enforce fail at gloo/transport/tcp/loop.cc:48] rv != -1. -1 vs -1. pipe: Too many open files")
    for error in (OSError(errno.EMFILE, "Too many open files"), gloo):
        assert re.fullmatch(r"too many open files; a process may open \d+ here: raise the limit \(ulimit -n\)",
                            handles_error(error))  # fmt: skip
    assert handles_error(OSError(errno.ENOENT, "No such file")) == handles_error(RuntimeError("gloo: timeout")) == ""
