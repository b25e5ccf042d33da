"""How fast one lane over all cores is beside timm's training loop. A measurement, not a test.

    pip install timm
    python benchmarks/peers.py data/photos     (made by: python tests/photos.py data/photos 640)

Both train ResNet-50 on the same pictures, with the same augmentation, loader processes, batches
and optimizer: the program with `--split none`, and timm's released parts as its own train.py uses
them (create_model, create_dataset, create_loader with its prefetcher, create_optimizer_v2), with
its best flags on a CPU: --amp --amp-dtype bfloat16 --channels-last; and these parts once more with
the program's settings of glibc's allocator, to tell what comes from them. They take turns, each in
a process of its own; what is printed are images a second and the ratios within each round. With
--operators each is profiled instead: the operators that take most of its time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity.checkpoints.state import versions
from split_affinity.lanes.lane import tune_allocator
from split_affinity.machine.description import describe_topology
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.precision import choose_precision
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings
from split_affinity.reports.tables import describe_run
from split_affinity.runs.find_lr import endless_steps
from split_affinity.runs.measurement import MeasuringProcess
from train_split_affinity import set_up

Turns = Generator["float | str | None", int, None]  # takes steps to make, gives images/s


def measured_turns(step: Callable[[], int], operators: bool) -> Turns:
    """Make as many steps as asked, after one to warm up: images/s, or where the time went."""
    count = yield None
    while True:
        step()
        with profiled(operators) as profile:
            start_s = time.perf_counter()
            images = sum(step() for _ in range(count))
            images_per_s = images / (time.perf_counter() - start_s)
        if operators:
            table = profile.key_averages().table("self_cpu_time_total", row_limit=14)
            count = yield f"{images_per_s:.2f} images/s\n{table}"
        else:
            count = yield images_per_s


def profiled(operators: bool) -> contextlib.AbstractContextManager:
    """A profile of all threads, lanes too, if it is asked for."""
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    profile = torch.profiler.profile(experimental_config=config)
    return profile if operators else contextlib.nullcontext()


def our_turns(settings: Settings, operators: bool) -> Turns:
    """The script: one lane over all cores, its own loaders, the learning rate as it is."""
    topology = read_topology()
    plan = plan_cores(topology, settings)
    with set_up(settings, topology, plan) as run:
        steps = endless_steps(run)
        yield from measured_turns(lambda: next(steps).images, operators)


def timm_turns(settings: Settings, operators: bool, tuned: bool = False) -> Turns:
    """timm's parts, put together as in the training loop of its train.py."""
    from timm import create_model
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.optim import create_optimizer_v2

    if tuned:
        tune_allocator()
    size, device = settings.image_size, torch.device("cpu")
    dataset = create_dataset("", root=str(settings.data_path), split="train", is_training=True)
    model = create_model(settings.model, num_classes=len(dataset.reader.class_to_idx))
    model.to(device=device, memory_format=torch.channels_last)
    found = resolve_data_config({"input_size": (3, size, size)}, model=model)
    loader = create_loader(
        dataset,
        input_size=found["input_size"],
        batch_size=settings.batch_size,
        is_training=True,
        scale=(settings.min_scale, 1.0),
        hflip=settings.hflip,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=settings.workers,
        device=device,
    )
    rates = {"lr": settings.lr, "momentum": settings.momentum}
    optimizer = create_optimizer_v2(model, "sgd", weight_decay=settings.weight_decay, **rates)
    criterion = torch.nn.CrossEntropyLoss()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, settings.precision == "bf16")
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model.train()

    def step() -> int:
        images, targets = next(batches)
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return len(images)

    yield from measured_turns(step, operators)


TUNED = "timm, tuned malloc"
WAYS = {"none": our_turns, "timm": timm_turns, TUNED: partial(timm_turns, tuned=True)}


def compare(turns: dict[str, MeasuringProcess], rounds: int, steps: int) -> None:
    """Take turns, and print speeds and ratios; the first round warms up."""
    ratios: dict[str, list[float]] = {"timm": [], TUNED: []}
    for number in range(rounds + 1):
        speeds = {name: process.send(steps) for name, process in turns.items()}
        for name, found in ratios.items():
            found += [speeds["none"] / speeds[name]] if number else []
        text = ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items())
        print(f"round {number}, images/s: {text}", flush=True)
    for name, found in ratios.items():
        median, low, high = statistics.median(found), min(found), max(found)
        print(f"none / {name}: {median:.3f} ({low:.3f} to {high:.3f})")


def main() -> None:
    """Start a process for each way, and let them take turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="image folder with a folder train")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("-j", "--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each turn")
    parser.add_argument("--operators", action="store_true", help="profile one round instead")
    given = parser.parse_args()
    topology = read_topology()
    settings = Settings(
        model=given.model,
        data_path=given.folder,
        batch_size=given.batch_size,
        workers=given.workers,
        image_size=224,
        split="none",
        lr=0.001,
    )
    settings = dataclasses.replace(settings, precision=choose_precision(settings, topology)[0])
    print(f"{describe_topology(topology)}; {describe_run(settings)}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    with contextlib.ExitStack() as stack:
        turns = {}
        for name, function in WAYS.items():
            process = MeasuringProcess(lambda: None, function, settings, given.operators)
            turns[name] = stack.enter_context(contextlib.closing(process))
            next(process)
        if given.operators:
            for name, process in turns.items():
                print(f"\n{name}: {process.send(given.steps)}")
        else:
            compare(turns, given.rounds, given.steps)


if __name__ == "__main__":
    main()
