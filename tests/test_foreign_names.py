"""Names that somebody else has chosen, in all that the program prints and writes.

Run: python -m pytest tests/test_foreign_names.py
"""

import contextlib
import csv
import io
import json
import os
import shutil
import unicodedata
from urllib.parse import quote

import pytest
from patching import set_everywhere
from rendered import page_of
from small import read_metrics, small_model

from split_affinity.data.pictures import find_pictures
from split_affinity.machine.description import machine_text
from split_affinity.machine.topology import read_topology
from split_affinity.models.registry import OWN_MODELS
from split_affinity.text import readable
from train_split_affinity import main

# A formula, a heading, a forged result and answer, what steers a terminal, an image, a link, HTML,
# a column, code, a formula of TeX, an entity, and a byte that is no UTF-8.
HOSTILE = os.fsdecode(
    b"=cat\n# heading\n- outcome: forged\n     99.99 %  forged\n\x1b[31m\x07\x7f"
    + "\u202e\u200b\u2028\x9b2J".encode()
    + b"![x](http:h)[y](http:h)<img src=x><b>|`$x_$&lt;\xff"
)
NAMES = ["temple", HOSTILE]
SMALL = "--model small --image-size 32 -b 2 -j 0 --max-bad-images 9".split()
OUT = f"out {HOSTILE}"


def assert_harmless(text):
    """Nothing in a text steers a terminal, and no line of it is one that a name has brought."""
    assert not [
        each for each in text if each != "\n" and unicodedata.category(each) in ("Cc", "Cf", "Zl")
    ]
    begins = ("# heading", "- outcome: forged", "99.99 %  forged")
    assert not [line for line in text.split("\n") if line.strip().startswith(begins)]


@pytest.fixture(scope="module")
def trained(photos_with_val, tmp_path_factory):
    """The working directory of a run on pictures with hostile names, some of them broken, and what
    the run printed.
    """
    root = tmp_path_factory.mktemp("foreign")
    for part in ("train", "val"):
        for own, name in zip(("temple", "flower"), NAMES, strict=True):
            shutil.copytree(photos_with_val / part / own, root / HOSTILE / part / name)
            picture = next((root / HOSTILE / part / name).iterdir())
            picture.rename(picture.with_name(f"{HOSTILE}.jpg"))
        (root / HOSTILE / part / HOSTILE / f"{HOSTILE} broken.jpg").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OWN_MODELS, "small", small_model)
        patch.setattr("platform.node", lambda: readable(HOSTILE))
        patch.chdir(root)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            options = ["--data-path", HOSTILE, "--output-dir", OUT, "--tensorboard"]
            assert main(["train", *SMALL, "--epochs", "1", *options]) == 0
        yield root, printed.getvalue()


@pytest.fixture
def run(trained, capfd):
    """Runs a command; what it printed, harmless."""

    def run(*arguments, code=0):
        assert main([*arguments]) == code
        printed = capfd.readouterr()
        for text in (printed.out, printed.err):
            text.encode()
            assert_harmless(text)
        return printed.out + printed.err

    return run


def test_what_a_run_prints_and_writes(trained):
    root, printed = trained
    assert_harmless(printed)
    assert r"=cat\n# heading\n- outcome: forged\n     99.99 %  forged\n\x1b[31m\x07\x7f" in printed
    assert "broken.jpg': left out" in printed
    assert {line["type"] for line in read_metrics(root / OUT)} == {
        "run",
        "step",
        "epoch",
        "summary",
    }
    for name in ("metrics.jsonl", "trace.json"):
        assert_harmless((root / OUT / name).read_text())
    json.loads((root / OUT / "trace.json").read_text())
    for name in ("last.pt", "best.pt", "curves.png", "gradients.png", "timeline.png"):
        assert (root / OUT / name).stat().st_size


def test_the_log_has_no_structure_that_a_name_has_brought(trained):
    text = (trained[0] / "logs.md").read_text()
    assert_harmless(text)
    page = page_of(text)
    assert page.tags.count("h1") == 1
    assert page.tags.count("h2") == text.count("\n## 2")
    assert not {"img", "b"} & {*page.tags}
    assert page.tags.count("a") == len(page.links) == text.count("\n## 2")
    assert {*page.links} == {quote(os.fsencode(OUT))}, "of each section to its output folder"
    assert "heading" not in "".join(page.headings)


def test_test_only(trained, run):
    folder = trained[0] / OUT
    last = f"{OUT}/last.pt"
    options = ["--data-path", HOSTILE, "--output-dir", OUT, "--test-only", "--resume", last]
    printed = run("train", *SMALL, *options)
    assert r"| =cat\\n# heading" not in printed, "escapes are not escaped once more"
    assert r"=cat\n# heading" in printed
    text = (folder / "confusion.csv").read_text()
    assert_harmless(text)
    rows = list(csv.reader(text.splitlines()))
    assert [len(row) for row in rows] == [3, 3, 3]
    assert {row[0][:5] for row in rows} == {"true ", "templ", "'=cat"}
    text = (folder / "confused.json").read_text()
    assert_harmless(text)
    pairs = json.loads(text)["pairs"]
    assert {pair["true"] for pair in pairs} <= {*map(readable, NAMES)}
    assert (folder / "confusion.png").stat().st_size


def test_predict(trained, run):
    found = (find_pictures(f"{HOSTILE}/{part}/{HOSTILE}")[0] for part in ("train", "val"))
    pictures = [path for paths in found for path in paths]
    printed = run("predict", *pictures, "--resume", f"{OUT}/last.pt", "--json", "p.json", code=1)
    answers = [line for line in printed.split("\n") if " %  " in line and "jpg" not in line]
    assert len(answers) == 2 * (len(pictures) - 2), "two classes for each that is not broken"
    figures = json.loads((trained[0] / "p.json").read_text())
    assert len(figures["pictures"]) == len(pictures) - 2
    assert len(figures["broken"]) == 2
    assert {name for each in figures["pictures"] for name in each["classes"]} == {
        *map(readable, NAMES)
    }


def test_plan_and_its_machine(trained, run):
    printed = run("plan", *SMALL, "--data-path", HOSTILE)
    assert "data " in printed
    values = json.loads(machine_text(read_topology())) | {"cpu_model": HOSTILE}
    (trained[0] / "machine.json").write_text(json.dumps(values))
    printed = run("plan", *SMALL, "--machine", "machine.json")
    assert r"=cat\n# heading" in printed


def test_find_lr(run):
    run("find-lr", *SMALL, "--steps", "3", "--data-path", HOSTILE, "--output-dir", OUT)


def test_what_was_not_foreseen_is_one_line(run, monkeypatch):
    set_everywhere(monkeypatch, "open_data", lambda *args: [][HOSTILE.count("x") or 0])
    printed = run("train", *SMALL, "--data-path", HOSTILE, "--output-dir", f"{OUT} 2", code=1)
    assert "an error that was not foreseen: IndexError" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", HOSTILE],
        ["--data-path", f"{HOSTILE} nowhere"],
        ["--resume", f"{HOSTILE}.pt"],
        ["--init-from", f"{HOSTILE}.pt"],
        ["--split", HOSTILE],
        ["--weights", HOSTILE],
        ["--log-file", f"{HOSTILE} nowhere/logs.md"],
        ["--dataset", HOSTILE],
        [HOSTILE],
        [f"--{HOSTILE}"],
        ["predict", HOSTILE, "--resume", f"{HOSTILE}.pt"],
        ["plan", "--machine", f"{HOSTILE}.json"],
        ["compare", "--json", f"{HOSTILE} nowhere/c.json"],
    ],
)
def test_an_error_about_a_foreign_name_is_one_line(trained, run, arguments):
    errors = run(*arguments, code=2).partition("train_split_affinity.py: error: ")[2]
    assert errors.count("\n") == 1
