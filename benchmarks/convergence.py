"""Do the schedules reach the same accuracy? A measurement of some twenty minutes, not a test.

Trains torchvision's ResNet-18 on scikit-learn's digits, with crops but without flips, with each
schedule and seed, through the whole program, and prints the accuracies of the last validations as
a table:

    python benchmarks/convergence.py data/digits
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_split_affinity as script
from split_affinity.data.digits import write_digits
from split_affinity.machine.description import describe_topology
from split_affinity.machine.topology import read_topology
from split_affinity.reports.tables import METRICS
from split_affinity.text import markdown_table
from split_affinity.training.schedules import SCHEDULES

SEEDS = (0, 1, 2)
OPTIONS = """--model resnet18 --image-size 32 --hflip 0 --min-scale 0.6
             --batch-size 16 --accumulate 2 --epochs 12 --lr 0.005 --lr-warmup-epochs 1
             --lr-scheduler cosine --workers 0""".split()


def accuracy(data: Path, schedule: str, seed: int) -> float:
    """Percent of the validation images that a model is right about after its last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            *OPTIONS,
            "--data-path",
            str(data),
            "--schedule",
            schedule,
            "--seed",
            str(seed),
        ]
        arguments += ["--output-dir", folder, "--log-file", f"{folder}/logs.md"]
        with contextlib.redirect_stdout(io.StringIO()):
            code = script.main(arguments)
        if code:
            raise SystemExit(code)
        lines = map(json.loads, Path(folder, METRICS).read_text().splitlines())
        return [line["val_top1"] for line in lines if line["type"] == "epoch"][-1]


def main(data: Path) -> None:
    """Train with every schedule and seed; print the table."""
    print(f"{' '.join(OPTIONS)}; {describe_topology(read_topology())}")
    rows = []
    for schedule in SCHEDULES:
        results = []
        for seed in SEEDS:
            results.append(accuracy(data, schedule, seed))
            print(f"{schedule}, seed {seed}: {results[-1]:.2f} %", flush=True)
        mean = f"{statistics.fmean(results):.2f} %"
        rows.append([schedule, *(f"{result:.2f} %" for result in results), mean])
    print(markdown_table(["schedule", *(f"seed {seed}" for seed in SEEDS), "mean"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="for the digits (default: a new one)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(write_digits(asked.folder or Path(temporary)))
