"""Runs the README from top to bottom, as someone would who follows it, in a fresh clone.

    python3 tests/readme.py

Every command of its code blocks runs in the page's order, with the environment that its first block
makes: that stays, all else is removed. Trainings are shortened by options that are added at the
end. Photographs and trained weights, which a test cannot fetch, are made up. The last section, with
the tests themselves, is left to .ci/run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
# What the commands make or change at the top of the clone, beside logs.md.
TOUCHED = set("out data photos made new torch report.html exported hf_space".split())


def commands(page: str) -> list[str]:
    """The commands of the code blocks, in their order."""
    page = page.partition(LAST_SECTION)[0]
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith((".venv/bin/", "python3 "))]


def shortened(command: str) -> str:
    """A command without what takes minutes (tests/deploy has int8), and with packages from where
    pip is told to look here.
    """
    command = re.sub(r" --index-url \S+| --int8", "", command)
    return " ".join([command, *(more for known, more in SHORTENED.items() if known in command)])


def script_and_options(command: str) -> list[str]:
    """The file name of the script that a command runs, and its arguments; nothing for others."""
    words = shlex.split(command)
    found = [number for number, word in enumerate(words) if word.endswith(".py")]
    return [Path(words[found[0]]).name, *words[found[0] + 1 :]] if found else []


def next_commands(printed: str) -> list[list[str]]:
    """The scripts and the options of the commands that a program names as the next ones."""
    found = re.findall(r"^next: (.*)$", printed, re.MULTILINE)
    return [script_and_options(each.replace("PICTURES", "new")) for each in found]


def run(command: str) -> str:
    """What a command of the shell prints. Ends the program if it fails."""
    print(f"+ {command}", flush=True)
    begun_s = time.monotonic()
    done = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=ROOT,
        env=os.environ | {"TORCH_HOME": str(ROOT / "torch")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(f"{done.stdout}({time.monotonic() - begun_s:.0f} s)\n", flush=True)
    if done.returncode:
        raise SystemExit(f"README.md: exit code {done.returncode} of: {command}")
    return done.stdout


def run_page(listed: list[str]) -> None:
    """Run all commands; ends with what is wrong, if anything is."""
    for number, command in enumerate(listed):
        for known, needed in NEEDED.items():
            if known in command:
                run(needed)
        printed = run(shortened(command))
        told = next_commands(printed)
        if told and "photos" in command:  # each says the one that the page has below it
            follows = script_and_options(listed[number + 1])
            if follows not in told and follows[0] == script_and_options(command)[0]:
                raise SystemExit(f"README.md: after {command}\n{told} is next, not {follows}")
    if missing := [name for name in MADE if not (ROOT / name).is_file()]:
        raise SystemExit(f"README.md: not made: {', '.join(missing)}")
    print(f"README.md: {len(listed)} commands work as printed")


def main() -> None:
    """Run the page in this clone, and leave it as it was, but for the environment."""
    before, log = {path.name for path in ROOT.iterdir()}, (ROOT / "logs.md").read_bytes()
    if busy := sorted(before & TOUCHED):
        raise SystemExit(
            f"{', '.join(busy)}: the README's commands would change it; use a fresh clone"
        )
    shutil.rmtree(ROOT / ".venv", ignore_errors=True)
    try:
        run_page(commands((ROOT / "README.md").read_text()))
    finally:
        (ROOT / "logs.md").write_bytes(log)
        for name in TOUCHED & {path.name for path in ROOT.iterdir()}:
            path = ROOT / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
