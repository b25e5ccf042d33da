"""Does the split pay? The example study of docs/placement.md, by one command: half an hour on two
cores.

    python benchmarks/placement.py out/study

For each model, without loading and with it, `compare --quick` trains in all ways, in turn, round by
round. Its figures stay in a JSON file each, and one that is there is not measured again: a study
that was broken off goes on. From all of them come placement.csv, a row for each model, loading and
way, and the picture placement.png. With --figures nothing is measured. Options of `compare` go to
each comparison: with --steps 7 a way has one step a round, which takes a quarter of an hour. On a
machine whose cores have several hardware threads, all is measured with one thread for a core and
with one for each hardware thread.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from split_affinity.compare.sweep_picture import LOOKS
from split_affinity.machine.topology import Topology, read_topology
from split_affinity.reports.timeline import new_figure, save_figure, write_title
from split_affinity.terminal import say

MODELS = ("resnet50", "mobilenet_v3_large", "vit_b_16", "hybrid")
CLASSES, PICTURES, SIDES_PX = 4, 64, (500, 375)


@dataclass(frozen=True)
class Case:
    """One comparison of the study."""

    model: str
    loading: bool
    threads: int  # for each core

    @property
    def name(self) -> str:
        """Its file's name, without the ending."""
        threads = f"-{self.threads}threads" if self.threads > 1 else ""
        return f"{self.model}{'-loading' if self.loading else ''}{threads}"

    def options(self, topology: Topology, pictures: Path) -> list[str]:
        """What `compare` is asked for."""
        given = ["--quick", "--model", self.model, "--batch-size", "16"]
        if self.model.startswith("hybrid"):
            given += ["--image-size", "224"]
        if self.loading:
            given += ["--data-path", str(pictures)]
        if self.threads > 1:
            half = len(topology.cores) // 2
            lanes = {"forward": half, "backward": len(topology.cores) - half}
            for lane, cores in lanes.items():
                given += [f"--{lane}-threads", str(self.threads * cores)]
        return given


def cases(models: Sequence[str], topology: Topology) -> Iterator[Case]:
    """All comparisons: those with several threads for a core only where cores have as many."""
    most = min(len(core.cpus) for core in topology.cores)
    for threads, loading in itertools.product(dict.fromkeys((1, most)), (False, True)):
        for model in models:
            yield Case(model, loading, threads)


def make_pictures(folder: Path) -> None:
    """JPEGs of a camera's usual size for data sets: parts of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    draw, photographs = np.random.default_rng(0), load_sample_images().images
    for number in range(CLASSES * PICTURES):
        whole = Image.fromarray(photographs[number % len(photographs)])
        side = int(draw.integers(150, 400))
        left, top = (int(draw.integers(0, length - side)) for length in whole.size)
        path = folder / f"train/{number % CLASSES}/{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.crop((left, top, left + side, top + side)).resize(SIDES_PX).save(path, quality=90)


def measure(case: Case, topology: Topology, folder: Path, further: Sequence[str]) -> None:
    """Run a comparison, with further options, unless its file is there."""
    path = folder / f"{case.name}.json"
    if path.exists():
        return
    say(f"{case.name}: measuring")
    command = [sys.executable, str(ROOT / "train_split_affinity.py"), "compare"]
    command += [*case.options(topology, folder / "pictures"), "--json", str(path)]
    subprocess.run([*command, "--log-file", str(folder / "log.md"), *further], check=True)


def rows_of(case: Case, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a comparison: a row for each way to train."""
    disturbed = sum(each["counts"] and bool(each["disturbance"]) for each in found["rounds"])
    for way in found["ways"]:
        busy = [*way["busy"].values()]
        low, high = way["images_per_s_range"]
        yield {
            "machine": found["machine"],
            "torch": found["versions"]["torch"],
            "model": case.model,
            "image_size": found["settings"]["image_size"],
            "batches": way["batches"],
            "loading": case.loading,
            "threads": case.threads,
            "way": way["way"],
            "cores": way["cores"],
            "images_per_s": way["images_per_s"],
            "lowest_images_per_s": low,
            "highest_images_per_s": high,
            "to_none": way["to_none"],
            "lowest_to_none": min(way["to_none_rounds"]),
            "highest_to_none": max(way["to_none_rounds"]),
            "bound_images_per_s": way["bound_images_per_s"],
            "forward_busy": busy[0],
            "backward_busy": busy[-1],
            "peak_memory_bytes": way["peak_memory_bytes"],
            "stray_s": way["stray_s"],
            "rounds_disturbed": disturbed,
        }


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Each way's speed beside that of one lane, with its range over the rounds: a panel for each
    kind of loading and number of threads.
    """
    panels = list(dict.fromkeys((row["threads"], row["loading"]) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    footer = f"{rows[0]['machine']}; torch {rows[0]['torch']}; medians and ranges over rounds"
    figure = new_figure(4.5 * len(panels), 1.2 + 1.1 * len(models), footer)
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for ax, (threads, loading) in zip(axes, panels, strict=True):
        for row in rows:
            if (row["threads"], row["loading"]) != (threads, loading):
                continue
            if row["way"] not in LOOKS:
                continue
            y = models.index(row["model"]) + 0.17 * (list(LOOKS).index(row["way"]) - 1.5)
            ratio, color = row["to_none"], LOOKS[row["way"]][0]
            ax.plot([row["lowest_to_none"], row["highest_to_none"]], [y, y], color=color, lw=1.5)
            ax.plot(ratio, y, "o", color=color, label=row["way"], markersize=5)
        ax.axvline(1, color="#8f8f8f", linewidth=1)
        kind = "images loaded meanwhile" if loading else "images loaded beforehand"
        more = f", {threads} threads for a core" if threads > 1 else ""
        ax.set_title(f"{kind}{more}", fontsize=9, loc="left")
        ax.set_xlabel("speed beside one lane over all cores (none = 1)", fontsize=9)
        ax.set_xlim(left=0)
        ax.set_yticks(range(len(models)), models, fontsize=9)
        ax.set_ylim(len(models) - 0.5, -0.5)
        ax.grid(axis="x", color="#e9e9e9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    style = {"ncols": len(handles), "frameon": False, "fontsize": 9}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", **style)
    write_title(figure, "Does the split pay? Schedules and ranks beside one lane, a model each")
    save_figure(figure, path)


def main() -> None:
    """Measure what is missing, then write the table and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS, help="(default: %(default)s)")
    parser.add_argument("--figures", action="store_true", help="measure nothing")
    given, further = parser.parse_known_args()
    topology = read_topology()
    if not given.figures and not (given.folder / "pictures").exists():
        make_pictures(given.folder / "pictures")
    rows: list[dict[str, Any]] = []
    for case in cases(given.models, topology):
        if not given.figures:
            measure(case, topology, given.folder, further)
        path = given.folder / f"{case.name}.json"
        if path.exists():
            rows += rows_of(case, json.loads(path.read_text()))
    if not rows:
        raise SystemExit(f"placement.py: {given.folder} has no comparison yet")
    with (given.folder / "placement.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(given.folder / "placement.png", rows)
    say(f"written: {given.folder}/placement.csv and placement.png")


if __name__ == "__main__":
    main()
