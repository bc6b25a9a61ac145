import os
import subprocess
import sys

import pytest

from veratune.errors import OutputError
from veratune.formats.atomic import new_folder, remove_partial, write_atomic

# A file size limit is how a full disk looks to a process: the write itself fails.
FULL = """
import resource, signal, sys
from pathlib import Path
from veratune.errors import OutputError
from veratune.formats.atomic import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), b"x" * 5000)
except OutputError as error:
    print(error)
"""


def test_no_space_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    out = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert (
        out.strip()
        == f"{path}: could not write 5,000 bytes: File too large; the previous file is unchanged"
    )
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="could not write 1 bytes: Is a directory"):
        write_atomic(tmp_path / "a", b"x")
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not write"):
        write_atomic(tmp_path / "file" / "a", b"x")
    with (
        pytest.raises(OutputError, match="not a folder that can be written"),
        new_folder(tmp_path / "file"),
    ):
        pass


def test_folders_are_made_and_modes_follow_the_umask(tmp_path):
    write_atomic(tmp_path / "new" / "a", b"x")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "new" / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "x") as place:
        (place / "thing").write_text("1")
        assert not (tmp_path / "x").exists()
    assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "y") as place:  # noqa: PT012
        (place / "thing").write_text("1")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["x"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as place:
        (place / "thing").write_text("2")
    assert (tmp_path / "empty" / "thing").read_text() == "2"


def test_an_output_folder_must_be_empty(tmp_path):
    (tmp_path / "thing").write_text("")
    with (
        pytest.raises(
            OutputError,
            match=r"the output folder is not empty \(it holds 'thing'\); choose another or empty it",
        ),
        new_folder(tmp_path),
    ):
        pass


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".a.safetensors.x1.tmp", "a.safetensors", "notes.tmp"):
        (tmp_path / name).write_text("1")
    remove_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "notes.tmp"]
