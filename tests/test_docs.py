"""README and docs. Run: python -m pytest tests/test_docs.py

Every command on the pages runs, shortened by further options, those of a page in order, in a folder
with small data where the pages have data (those of the README run in readme.py, in an environment
of their own); every option named on them exists; every link to a file or to a heading leads
somewhere. What torchrun is given is looked at, not run.
"""

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import cifar
import pytest
from patching import set_everywhere
from photos import make_photos
from places import ROOT, SCRIPT
from torch.distributed.run import get_args_parser

from split_affinity.compare.ways import way_settings
from split_affinity.data.digits import write_digits
from split_affinity.options.commands import build_parser, parse_arguments
from train_split_affinity import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Whatever a command trains, it takes a second with these. A recipe's size grows within them.
SHORT = "--model squeezenet1_1 --image-size 32 -b 2 --accumulate 2 -j 0 --lr 0.001".split()
SHORT_RAMP = ["--min-res", "32", "--max-res", "32"]
# Options of other programs that the pages name.
FOREIGN = {"--index-url", "--shm-size", "--amp", "--amp-dtype", "--channels-last", "--logdir"}
FOREIGN |= {"--repo-type", "--space-sdk", "--exclude"}  # of the command hf
FOREIGN |= {"--bind-to", "--delete"}  # of mpirun, of rsync
FOREIGN |= {"--skip-worktree", "--no-skip-worktree"}  # of git
FOREIGN |= {"--main", "--python", "--compress"}  # of zipapp
FOREIGN |= {"--cap-add", "--bind"}  # of docker, of deepspeed (--bind_cores_to_rank)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fenced(text: str) -> list[str]:
    """The lines of the code blocks of a page; a line that goes on after a backslash is one."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def commands(text: str) -> Iterator[list[str]]:
    """The Python programs that a page has the reader run, as the arguments of python; of a recipe
    the table has the options alone.
    """
    for line in fenced(text):
        for part in line.split(" && "):
            if match := re.match(
                r"(?:\.venv/bin/)?python ((?:tests/|benchmarks/)?\w+\.py.*)", part.strip()
            ):
                yield shlex.split(match[1], comments=True)
    for options in re.findall(r"\| `(--recipe .*?)` \|", text):
        yield [SCRIPT.name, *shlex.split(options)]


def launches(text: str) -> Iterator[list[str]]:
    """What a page has the reader give to torchrun."""
    for line in fenced(text):
        if match := re.match(r"(?:\.venv/bin/)?torchrun (.*)", line):
            yield shlex.split(match[1])


def shortened(arguments: list[str]) -> list[str]:
    """The arguments of the script, with those that make a command short."""
    short = [*SHORT, *(SHORT_RAMP if "imagenet-finetune" in arguments else ())]
    short += ["--subset", "0.02"] if "digits" in arguments else []
    short += ["--stochastic-depth", "0"] if "imagenet-full" in arguments else []
    short += ["--lr-warmup-epochs", "0"] if "--recipe" in arguments else []
    over_epochs = not {"--recipe", "--epochs"}.isdisjoint(arguments)
    return [*arguments, *short, *(["--epochs", "1"] if over_epochs else ["--steps", "1"])]


@pytest.fixture
def world(tmp_path, torch_cache) -> Path:
    """A folder with the data that the pages speak of, as small as can be, and trained weights."""
    root = tmp_path / "world"
    photos = make_photos(root / "photos", 40, smallest=40, largest=60)
    shutil.copytree(photos / "train", photos / "val")
    make_photos(root / "new", 2, smallest=40, largest=60)
    torch_cache(SHORT[1])
    shutil.copytree(photos, root / "imagenet")
    shutil.copytree(ROOT / "docs/machines", root / "docs/machines")
    cifar.make_cifar_digits(root / "cifar", 60)
    write_digits(root / "data/digits")
    return root


def fewer_ways(settings):
    """The ways to train of which no comparison can do without; test_ways_in.py runs all of them."""
    ways = way_settings(settings).items()
    kept = "plain", "none", "sequential"
    return {name: way for name, way in ways if name != "plain" and name.split()[0] in kept}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(ROOT / "tests")
    for name in ("ROUNDS", "PHASE_ROUNDS"):
        set_everywhere(monkeypatch, name, 2)
    set_everywhere(monkeypatch, "way_settings", fewer_ways)
    cifar.accept(monkeypatch, world / "cifar")
    for program, *arguments in commands(page.read_text()):
        if program == SCRIPT.name:
            assert main(shortened(arguments)) == 0, (arguments, capsys.readouterr())
        elif program == "tests/photos.py":
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:  # measurements of minutes
            with pytest.raises(SystemExit, match="0"):
                monkeypatch.setattr(sys, "argv", [program, "--help"])
                runpy.run_path(str(ROOT / program), run_name="__main__")


@pages
def test_what_a_page_gives_to_torchrun_makes_sense(page):
    for arguments in launches(page.read_text()):
        given = get_args_parser().parse_args(arguments)
        assert given.training_script == SCRIPT.name
        ranks = int(given.nnodes.split(":")[-1]) * int(given.nproc_per_node)
        parse_arguments(given.training_script_args, ranks=ranks)


def test_the_pages_have_commands():
    found = [command for page in PAGES for command in commands(page.read_text())]
    assert len(found) > 10
    assert [SCRIPT.name, "--batch-size", "32", "--steps", "50"] in found
    assert any(launches((ROOT / "docs/scaling.md").read_text()))


@pages
def test_options_on_a_page_exist(page):
    parsers = build_parser(), get_args_parser()
    own = set().union(*(parser._option_string_actions for parser in parsers))
    folders = ("tests", "benchmarks", "deploy")
    programs = (file for folder in folders for file in (ROOT / folder).glob("*.py"))
    sources = "".join(path.read_text() for path in programs)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text())) - FOREIGN:
        assert flag in own or f'"{flag}"' in sources, flag


@pages
def test_links_on_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if heading else ()
        slugs = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
        assert not heading or heading in slugs, target
