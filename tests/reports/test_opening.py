"""--open. Run: python -m pytest tests/reports/test_opening.py"""

import subprocess

import pytest

from split_affinity.reports import opening


class Browser:
    """What stands for the process that opens pictures."""

    def __init__(self, code=0):
        self.code, self.asked = code, []

    def __call__(self, words, **options):
        if self.code is OSError:
            raise OSError("no such program")
        self.asked += words[3:]
        assert options["start_new_session"]
        return self

    def wait(self, timeout_s):
        if self.code is None:
            raise subprocess.TimeoutExpired("browser", timeout_s)
        return self.code


@pytest.mark.parametrize(
    ("code", "environment", "is_opened"),
    [
        (0, {"DISPLAY": ":0"}, True),
        (None, {"WAYLAND_DISPLAY": "wayland-0"}, True),  # busy with them
        (1, {"DISPLAY": ":0"}, False),
        (OSError, {"BROWSER": "x"}, False),
        (0, {"DISPLAY": ""}, False),
        (0, {}, False),
    ],
)
def test_pictures_are_opened_or_their_places_told(
    code, environment, is_opened, tmp_path, monkeypatch, capsys
):
    browser = Browser(code)
    monkeypatch.setattr(subprocess, "Popen", browser)
    there, gone = tmp_path / "a b.png", tmp_path / "gone.png"
    there.touch()
    opening.open_files([there, gone], environment)
    told = f"nothing here can open pictures; they are {there}\n"
    assert capsys.readouterr().out == ("" if is_opened else told)
    if is_opened:
        assert browser.asked == [f"file://{tmp_path}/a%20b.png"]


def test_nothing_to_open(tmp_path, capsys):
    opening.open_files([tmp_path / "gone.png"], {})
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_browser_that_is_named_gets_the_files(tmp_path, monkeypatch):
    browser, picture, got = tmp_path / "browser", tmp_path / "a.png", tmp_path / "got"
    browser.write_text(f'#!/bin/sh\necho "$@" >{got}\n')
    browser.chmod(0o755)
    picture.touch()
    monkeypatch.setenv("BROWSER", str(browser))
    monkeypatch.setattr(opening, "PATIENCE_S", 60)
    assert opening.opened([picture])
    assert got.read_text() == f"file://{picture}\n"
