"""Does a teacher help? A measurement of some minutes, not a test.

A ResNet-18 learns scikit-learn's digits, all that there are to learn from; then a ResNet-20, which
is a ResNet-56 thinned to three blocks a stage, learns three in a hundred of them, with and without
that teacher, through the whole program, with each seed. Prints the accuracies of the last
validations as a table:

    python benchmarks/distill.py data/digits
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
from split_affinity.checkpoints.folder import BEST
from split_affinity.data.digits import write_digits
from split_affinity.machine.description import describe_topology
from split_affinity.machine.topology import read_topology
from split_affinity.reports.tables import METRICS
from split_affinity.text import markdown_table

SEEDS = (0, 1, 2)
COMMON = """--image-size 32 --hflip 0 --min-scale 0.6 --lr-scheduler cosine --lr-warmup-epochs 1
            --split none --workers 0""".split()
TEACHER = "--model resnet18 --batch-size 32 --epochs 6 --lr 0.01".split()
STUDENT = "--model resnet20 --subset 0.03 --batch-size 10 --epochs 25 --lr 0.05".split()
SHARES = (0.0, 0.5)


def trained(folder: Path, *options: object) -> float:
    """Train into a folder; percent of the validation images that are right after the last epoch."""
    arguments = [
        *COMMON,
        *map(str, options),
        "--output-dir",
        folder,
        "--log-file",
        folder.with_name(f"{folder.name}.md"),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        code = script.main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(code)
    lines = map(json.loads, (folder / METRICS).read_text().splitlines())
    return [line["val_top1"] for line in lines if line["type"] == "epoch"][-1]


def main(data: Path, work: Path) -> None:
    """Train the teacher, then every student; print the table."""
    print(f"student: {' '.join([*STUDENT, *COMMON])}; {describe_topology(read_topology())}")
    best = trained(work / "teacher", "--data-path", data, *TEACHER)
    print(f"teacher: {best:.2f} %", flush=True)
    rows = []
    for share in SHARES:
        taught = ["--teacher", "resnet18", "--teacher-weights", work / "teacher" / BEST]
        taught += ["--teacher-share", share]
        results = []
        for seed in SEEDS:
            asked = [*STUDENT, "--data-path", data, "--seed", seed, *(taught if share else [])]
            results.append(trained(work / f"student-{share}-{seed}", *asked))
            print(f"share {share:g}, seed {seed}: {results[-1]:.2f} %", flush=True)
        mean = f"{statistics.fmean(results):.2f} %"
        rows.append([f"{share:g}", *(f"{result:.2f} %" for result in results), mean])
    header = ["the teacher's share", *(f"seed {seed}" for seed in SEEDS), "mean"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="for the digits (default: a new one)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(write_digits(asked.folder or Path(temporary, "digits")), Path(temporary))
