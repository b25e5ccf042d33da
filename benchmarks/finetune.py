"""Do trained weights help where images are few? A measurement of some minutes, not a test.

Trains torchvision's ResNet-18 on scikit-learn's digits 0 to 4, saves it as a plain state dict, and
trains on the digits 5 to 9, with 20 images of each, from these weights and from scratch: the same
numbers of epochs, at the same rate, with three seeds, through the whole program. Prints the
accuracies of the last validations as a table:

    python benchmarks/finetune.py data/few
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_split_affinity as script
from split_affinity.checkpoints.folder import LAST
from split_affinity.checkpoints.state import read_checkpoint
from split_affinity.data.digits import write_digits
from split_affinity.machine.description import describe_topology
from split_affinity.machine.topology import read_topology
from split_affinity.reports.tables import METRICS
from split_affinity.text import markdown_table

SEEDS = (0, 1, 2)
IMAGES = 20  # of a class, to train on the digits 5 to 9
OPTIONS = """--model resnet18 --image-size 32 --hflip 0 --min-scale 0.6
             --batch-size 20 --lr 0.05 --lr-warmup-epochs 1
             --lr-scheduler cosine --workers 0 --split none""".split()
FIRST, THEN = 12, (4, 12)  # epochs
WAYS = {  # "{}" is the file with the weights
    "from scratch": "",
    "from weights, body frozen": "--init-from {} --freeze body",
    "from weights, body frozen for 1 epoch": "--init-from {} --freeze body --freeze-epochs 1",
    "from weights, front frozen": "--init-from {} --freeze conv1,bn1,layer1,layer2",
    "from weights, nothing frozen": "--init-from {}",
}


def choose_digits(digits: Path, root: Path, names: str, images: int | None = None) -> Path:
    """An image folder of some digits, of which `images` each to train on (all); returns root."""
    for name in names:
        for part, count in (("train", images), ("val", None)):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for picture in sorted((digits / part / name).iterdir())[:count]:
                shutil.copy(picture, folder)
    return root


def accuracy(data: Path, output: Path, options: list[str]) -> float:
    """Percent of the validation images that a model is right about after its last epoch."""
    arguments = [*OPTIONS, *options, "--data-path", str(data), "--output-dir", str(output)]
    with contextlib.redirect_stdout(io.StringIO()):
        code = script.main([*arguments, "--log-file", str(output.with_suffix(".md"))])
    if code:
        raise SystemExit(code)
    lines = map(json.loads, Path(output, METRICS).read_text().splitlines())
    return [line["val_top1"] for line in lines if line["type"] == "epoch"][-1]


def first_weights(data: Path, folder: Path) -> Path:
    """A model that knows the first digits, as a file with its state dict alone."""
    top1 = accuracy(data, folder / "first", ["--epochs", str(FIRST)])
    print(f"digits 0 to 4: {top1:.2f} %", flush=True)
    path = folder / "first.pth"
    torch.save(read_checkpoint(folder / "first" / LAST)["model"], path)
    return path


def main(root: Path) -> None:
    """Train the first model, then in every way with every seed; print the table."""
    print(f"{' '.join(OPTIONS)}; {describe_topology(read_topology())}")
    digits = write_digits(root / "digits")
    few = choose_digits(digits, root / "5 to 9", "56789", IMAGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = first_weights(choose_digits(digits, root / "0 to 4", "01234"), folder)
        rows = []
        for epochs, (way, more) in itertools.product(THEN, WAYS.items()):
            results = []
            for seed in SEEDS:
                options = ["--epochs", str(epochs), "--seed", str(seed), *more.split()]
                options = [option.format(weights) for option in options]
                results.append(accuracy(few, folder / f"{len(rows)}-{seed}", options))
            mean = f"{statistics.fmean(results):.1f} %"
            rows.append([way, str(epochs), *(f"{result:.1f} %" for result in results), mean])
            print(" | ".join(rows[-1]), flush=True)
    seeds = (f"seed {seed}" for seed in SEEDS)
    print(markdown_table(["validation top-1", "epochs", *seeds, "mean"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="for the digits (default: a new one)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(asked.folder or Path(temporary))
