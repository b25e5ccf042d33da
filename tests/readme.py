"""Runs the README from top to bottom, as someone would who follows it.

    python3 tests/readme.py

Every command of its code blocks runs in the page's order, in a copy of the clone, with the
environment that its first block makes: that stays, as .venv. Trainings are shortened by options
that are added at the end. Photographs and trained weights, which a test cannot fetch, are made up.
The last section, with the tests themselves, is left to .ci/run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_IN_A_CLONE = (".git", ".venv", ".*_cache", "out", "data", "exported", "hf_space", "build")
LAST_SECTION = "\n## License and development\n"
PYTHON = ".venv/bin/python"

# What is added to commands: it takes no minutes to see that they work.
SHORTENED = {
    "--steps 50": "--steps 2",
    "--recipe digits": "--epochs 2",
    "--recipe finetune": "--epochs 2 -b 8",
    "deploy/export.py": "--formats onnx",
}
MAKE_WEIGHTS = f"""\
{PYTHON} - <<'END'
import os, torch, torchvision
file = torchvision.models.ResNet50_Weights.DEFAULT.url.rpartition("/")[2]
folder = os.path.join(torch.hub.get_dir(), "checkpoints")
os.makedirs(folder, exist_ok=True)
torch.save(torchvision.models.resnet50().state_dict(), os.path.join(folder, file))
END
"""
MAKE_PHOTOS = f"{PYTHON} tests/photos.py made 60; mv made/train photos; cp -r photos/temple new\n"
# What has to be there before a command.
NEEDED = {" data photos": MAKE_PHOTOS, "--recipe finetune": MAKE_WEIGHTS}
MADE = (
    "out/digits/best.pt out/digits/curves.png out/data/photos/data.html out/photos/best.pt "
    "out/photos/confusion.png report.html"
).split()


def commands(page: str) -> list[str]:
    """The commands of the code blocks, in their order."""
    page = page.partition(LAST_SECTION)[0]
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith((".venv/bin/", "python3 "))]


def shortened(command: str) -> str:
    """A command that takes no minutes. Packages come from where pip is told to look here."""
    command = re.sub(r" --index-url \S+", "", command)
    return " ".join([command, *(more for known, more in SHORTENED.items() if known in command)])


def script_and_options(command: str) -> list[str]:
    """The file name of the script that a command runs, and its arguments; nothing for others."""
    words = shlex.split(command)
    found = [number for number, word in enumerate(words) if word.endswith(".py")]
    return [Path(words[found[0]]).name, *words[found[0] + 1 :]] if found else []


def next_command(printed: str) -> list[str]:
    """The script and the options of the command that a program names as the next one."""
    found = re.findall(r"^next: (.*)$", printed, re.MULTILINE)
    return script_and_options(found[-1]) if found else []


def run(command: str, folder: Path) -> str:
    """What a command of the shell prints. Ends the program if it fails."""
    print(f"+ {command}", flush=True)
    begun_s = time.monotonic()
    done = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=folder,
        env=os.environ | {"TORCH_HOME": str(folder / "torch")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(f"{done.stdout}({time.monotonic() - begun_s:.0f} s)\n", flush=True)
    if done.returncode:
        raise SystemExit(f"README.md: exit code {done.returncode} of: {command}")
    return done.stdout


def main() -> None:
    """Run all of it; ends with what is wrong, if anything is."""
    environment = ROOT / ".venv"
    shutil.rmtree(environment, ignore_errors=True)
    environment.mkdir()
    listed = commands((ROOT / "README.md").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "clone"
        shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*NOT_IN_A_CLONE))
        (clone / ".venv").symlink_to(environment)
        for number, command in enumerate(listed):
            for known, needed in NEEDED.items():
                if known in command:
                    run(needed, clone)
            printed = run(shortened(command), clone)
            follows = script_and_options(listed[number + 1]) if listed[number + 1 :] else []
            told = next_command(printed)
            if " photos" in command and follows and told != follows:
                raise SystemExit(f"README.md: after {command}\n{told} is next, not {follows}")
        if missing := [name for name in MADE if not (clone / name).is_file()]:
            raise SystemExit(f"README.md: not made: {', '.join(missing)}")
    print(f"README.md: {len(listed)} commands work as printed")


if __name__ == "__main__":
    main()
