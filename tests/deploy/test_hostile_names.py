"""One hostile name, of a class, a data folder and a file, in all that deploy/ writes and prints.

Run: python -m pytest tests/deploy/test_hostile_names.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import app
import checkpoint as cp
import export
import onnx
import pytest
import report
import yaml
from huggingface_hub import ModelCard

from split_affinity.text import shown
from train_split_affinity import main

SLASH = "\u2044"  # a folder's name has no other
HOSTILE = (
    f"0]\n\n# Forged\n![x](http:{SLASH}{SLASH}e.x{SLASH}p.png)\n---\nlicense: forged\n---\n"
    f"<img src=x onerror=alert(1)>\x1b[31m\x07\u202e`{{{{ 7 * 7 }}}}`$$"
)
LONG, CJK = "x" * 120, "犬と猫の写真"
NOT_UTF8 = os.fsdecode(b"caf\xe9")
PASSWORD = "hunter2"


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile(digits, tmp_path_factory) -> Path:
    """A checkpoint of a run on classes, a folder and files with hostile names. Its mirror has a
    password, as in files of earlier versions.
    """
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / HOSTILE
    for digit, name in enumerate((HOSTILE, LONG, CJK, NOT_UTF8)):
        for part in ("train", "val"):
            files = sorted((digits / part / str(digit)).iterdir())[:6]
            (data / part / name).mkdir(parents=True)
            for number, file in enumerate(files):
                shutil.copy(file, data / part / name / f"{number}{HOSTILE[:60]}.png")
    broken = next((data / "val" / LONG).iterdir())
    broken.write_bytes(b"no picture")
    options = f"""--model resnet20 --image-size 32 --epochs 1 -b 8 -j 0 --split none --hflip 0
        --max-bad-images 9 --log-file {folder}/logs.md --output-dir {folder}/out"""
    assert main([*options.split(), "--data-path", str(data)]) == 0
    return folder / "out" / "best.pt"


def check_printed(text: str) -> None:
    """Nothing steers the terminal, and nobody's name begins a line."""
    unseen = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}
    assert not unseen
    assert not re.search(r"^(# Forged|!\[|---$|license)", text, re.MULTILINE)


@pytest.fixture(scope="module")
def exported(hostile, tmp_path_factory) -> tuple[Path, Path]:
    """What export.py writes: the files, and the demo page."""
    folder = tmp_path_factory.mktemp("exported")
    files, page = folder / f"f{HOSTILE[:30]}", folder / "page"
    places = ["--output-dir", str(files), "--space", str(page), "--formats", "onnx,weights"]
    places += ["--examples", "5"]
    command = [sys.executable, str(cp.HERE / "export.py"), str(hostile), *places]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape")
    assert done.returncode == 0, done.stderr
    check_printed(done.stdout)
    check_printed(done.stderr)
    return files, page


def test_the_report_shows_names_as_text(hostile, tmp_path, capsys):
    assert report.main([str(hostile), "--output", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr()
    check_printed(printed.out)
    check_printed(printed.err)
    html = (tmp_path / "r.html").read_text("utf-8")
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["src"].startswith("data:image/")
    assert "top-5" not in page.text + printed.out, "it tells nothing of four classes"
    assert "{{ 7 * 7 }}" in page.text and shown(HOSTILE) in page.text
    assert "café" not in page.text and shown(NOT_UTF8) in page.text and CJK in page.text
    for unseen in ("\x1b", "\x07", "\u202e"):
        assert unseen not in html


def test_the_card_has_no_forged_heading_image_or_key(exported):
    for folder in exported:
        text = (folder / "README.md").read_text("utf-8")
        card = ModelCard.load(folder / "README.md")
        check_printed(card.text)
        assert "**Top-1 " in card.text and "top-5" not in text, "it tells nothing of four classes"
        assert card.data.license is None
        header = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
        assert "Forged" in json.dumps(header) and "license: forged" not in header
        headings = re.findall(
            r"^#+ (.*)$", re.sub(r"```.*?```", "", card.text, flags=re.DOTALL), re.M
        )
        ours = {"Classes", "Use", "Files", "Training", "Limits", "This page"}
        assert {*headings[1:]} == ours - ({"This page"} if folder == exported[0] else set())
        assert not re.search(r"(?<!\\)!(?!\\)\[|(?<!\\)\]\(|(?<!\\)<img", card.text)
        assert r"\!\[x\]\(http:" in card.text


def test_the_page_reads_the_cards_own_title(exported):
    title, card = app.read_card(exported[1])
    assert title.startswith("resnet20 on ") and "\n" not in title
    assert "## This page" not in card and "## Limits" in card


def test_files_have_the_names_as_data(exported):
    proto = onnx.load(exported[0] / "model.onnx")
    facts = {each.key: json.loads(each.value) for each in proto.metadata_props}
    assert {*facts["classes"]} == {HOSTILE, LONG, CJK, r"caf\xe9"}
    examples = list((exported[1] / "examples").iterdir())
    assert len(examples) == 5
    for example in examples:
        assert re.fullmatch(r"\d\d(-[A-Za-z0-9-]+)?\.png", example.name)


def test_an_error_about_a_hostile_name_is_one_line(tmp_path, capsys):
    for program, options in ((report.main, ()), (export.main, ("--output-dir", "x"))):
        assert program([str(tmp_path / f"{HOSTILE}.pt"), *options]) == 2
        printed = capsys.readouterr().err
        check_printed(printed)
        assert printed.count("\n") == 1


def test_a_login_is_in_no_output(best, digits, tmp_path, capsys):
    """Earlier versions saved a mirror's as it was typed."""
    copy = shutil.copytree(best.parent, tmp_path / "out")
    mirror = f"ftp://user:{PASSWORD}@host/run"
    with pytest.MonkeyPatch.context() as patch:
        state = cp.read_state(copy / "best.pt")
        state["settings"]["mirror"] = state["asked"]["mirror"] = mirror
        patch.setattr(cp, "read_state", lambda path: state)
        log = copy / "metrics.jsonl"
        log.write_text(log.read_text().replace('"mirror": null', f'"mirror": "{mirror}"'))
        page, files = tmp_path / "r.html", tmp_path / "files"
        assert report.main([str(copy / "best.pt"), "--output", str(page), "--per-class", "0"]) == 0
        arguments = ["--output-dir", str(files), "--formats", "onnx"]
        assert export.main([str(copy / "best.pt"), *arguments]) == 0
    printed = capsys.readouterr()
    outputs = [page, *files.iterdir()]
    assert "ftp://host/run" in page.read_text("utf-8")  # where to, is told
    assert not any(PASSWORD.encode() in each.read_bytes() for each in outputs)
    assert PASSWORD not in printed.out + printed.err
