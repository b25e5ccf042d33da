"""Do the schedules reach the same test accuracy? A measurement of some minutes, not a test.

Trains torchvision's ResNet-18 on scikit-learn's digits, without augmentation, with each schedule
and seed, through the program's own lanes, and prints the accuracies as a table:

    python tests/convergence.py data/digits
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from digits import make_digits
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_split_affinity as tsa  # noqa: E402

SEEDS = (0, 1, 2)
SETTINGS = tsa.Settings(
    model="resnet18",
    num_classes=10,
    image_size=32,
    batch_size=16,
    accumulate=2,
    epochs=8,
    lr=0.02,
    workers=0,
)


def train(settings: tsa.Settings, dataset: ImageFolder, topology: tsa.Topology) -> torch.nn.Module:
    """Train on the data set as the program does; returns the model."""
    plan = tsa.plan_cores(topology, settings)
    steps = tsa.steps_to_train(settings, len(dataset))
    with contextlib.ExitStack() as stack:
        stack.enter_context(tsa.coordinating(settings, plan))
        torch.manual_seed(settings.seed)
        loader = tsa.make_loader(dataset, settings, plan.loader_cpus)
        batches = tsa.Batches(loader, steps * settings.accumulate)
        lanes = stack.enter_context(tsa.Lanes(plan, topology.online))
        work = tsa.build_work(settings, lanes)
        for _ in tsa.run_schedule(settings, lanes, work, batches):
            pass
    return work.model


def accuracy(model: torch.nn.Module, dataset: ImageFolder) -> float:
    """Percent of the images that the model classifies rightly."""
    model.eval()
    with torch.inference_mode():
        right = sum(
            (model(images).argmax(1) == targets).sum().item()
            for images, targets in DataLoader(dataset, 60)
        )
    return 100 * right / len(dataset)


def main(root: Path) -> None:
    """Train with every schedule and seed; print the table."""
    topology = tsa.read_topology()
    transform = v2.Compose(tsa.to_tensor())
    training, validation = (ImageFolder(root / part, transform) for part in ("train", "val"))
    precision, reason = tsa.choose_precision(SETTINGS, topology)
    print(f"{len(training)} images to train, {len(validation)} to test; {precision}: {reason}")
    rows = []
    for schedule in tsa.SCHEDULES:
        results = []
        for seed in SEEDS:
            settings = dataclasses.replace(
                SETTINGS, schedule=schedule, seed=seed, precision=precision
            )
            results.append(accuracy(train(settings, training, topology), validation))
            print(f"{schedule}, seed {seed}: {results[-1]:.2f} %", flush=True)
        mean = f"{statistics.fmean(results):.2f} %"
        rows.append([schedule, *(f"{result:.2f} %" for result in results), mean])
    print(tsa.markdown_table(["schedule", *(f"seed {seed}" for seed in SEEDS), "mean"], rows))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(make_digits(Path(sys.argv[1] if len(sys.argv) > 1 else folder)))
