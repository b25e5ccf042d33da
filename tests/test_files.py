"""Files in a folder that a stranger may have filled, and locks that others hold.

Run: python -m pytest tests/test_files.py
"""

import fcntl
import os
import re
import tempfile
import time
from pathlib import Path

import pytest
from patching import set_everywhere
from small import TINY

from split_affinity.errors import RunError
from split_affinity.files import (
    append_text,
    link_file,
    lock_folder,
    replace_text,
    write_traceback,
    write_where_asked,
    write_whole,
)
from train_split_affinity import main

MINE = "what nobody may touch\n"

WRITERS = {
    "whole": write_whole,
    "appended": append_text,
    "replaced": lambda path, text: replace_text(path, MINE, text),
    "lock": lambda path, text: lock_folder(path.parent).close(),
}


@pytest.fixture
def mine(tmp_path):
    """A file of the user's, outside of the folder that came from a stranger."""
    file = tmp_path / "mine"
    file.write_text(MINE)
    return file


@pytest.mark.parametrize("leads_to", ["a file", "nothing"])
@pytest.mark.parametrize(("writer", "write"), WRITERS.items(), ids=WRITERS)
def test_no_planted_link_is_followed(tmp_path, mine, writer, write, leads_to):
    folder = tmp_path / "out"
    folder.mkdir()
    name = ".lock" if writer == "lock" else "metrics.jsonl"
    target = mine if leads_to == "a file" else tmp_path / "new"
    (folder / name).symlink_to(target)
    if writer == "whole":
        write(folder / name, "ours\n")
        assert (folder / name).read_text() == "ours\n"
        assert not (folder / name).is_symlink()
    else:
        with pytest.raises((RunError, OSError), match="a symbolic link, which is not followed"):
            write(folder / name, "ours\n")
    assert mine.read_text() == MINE
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("write", [write_whole, link_file], ids=["whole", "link"])
def test_what_is_written_first_goes_into_no_planted_link(tmp_path, mine, monkeypatch, write):
    """On disks that know no links, a copy is made, under another name at first."""
    monkeypatch.setattr(type(tmp_path), "hardlink_to", lambda *_: os.link("nowhere", "here"))
    (tmp_path / "best.pt.tmp").symlink_to(mine)
    (tmp_path / "last.pt").write_text("ours\n")
    write(
        *{write_whole: (tmp_path / "best.pt", "ours\n")}.get(
            write, (tmp_path / "last.pt", tmp_path / "best.pt")
        )
    )
    assert (tmp_path / "best.pt").read_text() == "ours\n"
    assert mine.read_text() == MINE
    assert not (tmp_path / "best.pt.tmp").is_symlink()


def test_a_pipe_in_the_place_of_a_file_is_replaced_or_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "curves.png")
    write_whole(tmp_path / "curves.png", "ours\n")
    assert (tmp_path / "curves.png").read_text() == "ours\n"
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match="metrics.jsonl: cannot be written: No such device"):
        append_text(tmp_path / "metrics.jsonl", "ours\n")


def test_a_link_that_the_user_has_named_is_followed(tmp_path, mine):
    (tmp_path / "link").symlink_to(mine)
    write_where_asked(tmp_path / "link", "ours\n")
    assert mine.read_text() == "ours\n"
    assert (tmp_path / "link").is_symlink()


def test_a_folder_full_of_links_costs_nothing(in_tmp, mine, capsys):
    """A whole run into it: it writes its own files, or says in one line what is in the way."""
    names = """.lock last.pt last.pt.tmp previous.pt best.pt.tmp timeline.png timeline.png.tmp
        trace.json trace.json.tmp traceback.txt subset.json""".split()
    for name in names:
        (in_tmp / "out").mkdir(exist_ok=True)
        (in_tmp / "out" / name).symlink_to(mine)
    assert main([*TINY, "--steps", "2", "--output-dir", "out"]) == 2
    assert mine.read_text() == MINE
    assert "error: --output-dir" in capsys.readouterr().err
    for name in (".lock", "last.pt", "previous.pt"):
        (in_tmp / "out" / name).unlink()
    capsys.readouterr()
    assert main([*TINY, "--steps", "2", "--output-dir", "out"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r".*error: --output-dir .*: cannot be written: .*link.*\n", error)
    assert mine.read_text() == MINE


def test_a_traceback_goes_into_a_new_file_of_its_own(tmp_path, mine, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "traceback.txt").symlink_to(mine)
    told = write_traceback(None, ValueError("surprise"))
    place = told.removeprefix("traceback in ")
    assert re.fullmatch(rf"{tmp_path}/traceback-\w+\.txt", place)
    assert "ValueError: surprise" in Path(place).read_text()
    assert mine.read_text() == MINE


def test_a_link_in_place_of_the_log_is_named(in_tmp, mine, capsys):
    (in_tmp / "logs.md").symlink_to(mine)
    assert main([*TINY, "--steps", "1"]) == 2
    assert capsys.readouterr().err == (
        "train_split_affinity.py: error: --log-file logs.md: cannot be written: a symbolic link, "
        "which is not followed; name the file itself\n"
    )
    assert mine.read_text() == MINE
    assert [path.name for path in in_tmp.iterdir()] == ["logs.md"]


@pytest.mark.alone
def test_who_holds_a_lock_holds_nobody_up(tmp_path, monkeypatch, capsys):
    """After a second it is said, once, and written all the same."""
    set_everywhere(monkeypatch, "WITHOUT_LOCK", set())
    path = tmp_path / "logs.md"
    path.write_text("place\n")
    with path.open() as others:
        fcntl.flock(others, fcntl.LOCK_EX)
        begun_s = time.monotonic()
        append_text(path, "one\n")
        assert 1 <= time.monotonic() - begun_s < 5
        begun_s = time.monotonic()
        append_text(path, "two\n")
        assert replace_text(path, "place", "places")
        assert time.monotonic() - begun_s < 1
    assert path.read_text() == "places\none\ntwo\n"
    assert capsys.readouterr().err == (
        f"warning: {path}: another process has kept it locked for 1 s: it is written without a "
        "lock\n"
    )
