"""What each way to run a model is worth: accuracy on all validation images, size, speed.

The ways take turns in rounds, on the same cores with as many threads, so that whatever else the
machine does meets all of them; ratios are taken within a round. Rounds that others disturb are
repeated. Those that are disturbed all the same have a row in the tables; if most are, there are no
ratios.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint as cp
import int8
import torch

from split_affinity.data.pictures import ImageData
from split_affinity.errors import Stopped, one_line
from split_affinity.lanes.contention import CONTENTION_SHARE, Contention, ContentionMonitor
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings
from split_affinity.reports.tables import contention_texts
from split_affinity.text import format_cpu_list, in_markdown, markdown_table, plural, speed_text

with cp.needed_packages():
    import numpy as np
    import onnx
    import onnxruntime
    from tqdm import tqdm

LOGITS = "logits"
ONE, MANY = 1, 32  # images at once: how soon an answer comes, and how many come
ROUNDS, MOST_REPEATS = 5, 3  # of disturbed ones
TURN_S = 1.0  # of measured calls, at the least, in a round
LOST_POINTS = 1.0  # of top-1: more is too much
LOOKED_AT = 8  # images, for the errors of layers

EAGER, BF16, COMPILED = "PyTorch fp32", "PyTorch bf16", "torch.compile"
ONNX, INT8 = "ONNX fp32", "ONNX int8"
DISTURBED = "disturbed rounds"  # a row below the ways, if any that count were

Run = Callable[[torch.Tensor], np.ndarray]


@dataclass(frozen=True)
class Way:
    """A way to run a model: `run` maps images (n, 3, size, size) to logits (n, classes)."""

    name: str
    size_bytes: int
    run: Run


@dataclass(frozen=True)
class Turns:
    """What a way's turns measured, at one number of images at once: for each round that counts
    images a second and their ratio to those of PyTorch in fp32; `calls_ms` are how long all calls
    took; `disturbed` tells, of each such round that others disturbed, what they took.
    """

    images_per_s: tuple[float, ...]
    to_eager: tuple[float, ...]
    calls_ms: tuple[float, ...]
    disturbed: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """How many undisturbed rounds a ratio takes: medians then lie between their figures."""
        return len(self.images_per_s) // 2 + 1

    @property
    def is_judged(self) -> bool:
        """Whether there are so many."""
        return len(self.images_per_s) - len(self.disturbed) >= self.needed

    @property
    def mark(self) -> str:
        """How many of the rounds were disturbed, for a table; empty if none was."""
        return f"{len(self.disturbed)} of {len(self.images_per_s)}" if self.disturbed else ""

    def figures(self) -> dict[str, Any]:
        """Medians, and of rounds the lowest and the highest, as JSON types; no ratio of too few
        undisturbed rounds.
        """
        p50, p95 = torch.tensor(self.calls_ms, dtype=torch.float64).quantile(
            torch.tensor([0.5, 0.95], dtype=torch.float64)
        )
        ends = [min(self.to_eager), max(self.to_eager)]
        return {
            "images_per_s": statistics.median(self.images_per_s),
            "images_per_s_range": [min(self.images_per_s), max(self.images_per_s)],
            "to_eager": statistics.median(self.to_eager) if self.is_judged else None,
            "to_eager_range": ends if self.is_judged else None,
            "latency_ms": p50.item(),
            "latency_p95_ms": p95.item(),
            "disturbed_rounds": len(self.disturbed),
        }


@dataclass(frozen=True)
class Measured:
    """A way's figures: how many validation images it has `right`, and its turns by the number of
    images at once.
    """

    name: str
    size_bytes: int
    right: int
    turns: dict[int, Turns]


@dataclass(frozen=True)
class Comparison:
    """Ways to run a model side by side, on `images` validation images, with so many threads on the
    logical CPUs `cpus`. `worst` are the layers with the largest errors by quantisation, if that
    lost too much; `notes` say what has been left out.
    """

    ways: tuple[Measured, ...]
    images: int
    threads: int
    cpus: tuple[int, ...]
    cpu_model: str
    worst: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()

    def top1(self, name: str) -> float:
        """The share of images, in percent, that a way has right."""
        return 100 * next(way.right for way in self.ways if way.name == name) / self.images

    @property
    def lost_points(self) -> float:
        """Points of top-1 that int8 loses against ONNX in fp32; 0 without int8."""
        if all(way.name != INT8 for way in self.ways):
            return 0.0
        return self.top1(ONNX) - self.top1(INT8)

    def figures(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        ways = {
            way.name: {
                "top1": self.top1(way.name),
                "size_bytes": way.size_bytes,
                **{f"batch_{count}": turns.figures() for count, turns in way.turns.items()},
            }
            for way in self.ways
        }
        rest = {name: value for name, value in vars(self).items() if name != "ways"}
        plain = {
            name: list(value) if type(value) is tuple else value for name, value in rest.items()
        }
        versions = {package.__name__: str(package.__version__) for package in (torch, onnxruntime)}
        plain["worst"] = [list(each) for each in self.worst]
        return {**plain, "lost_points": self.lost_points, "versions": versions, "ways": ways}

    def text(self) -> str:
        """The tables, and what is to say about them."""
        told = "\n".join(map(in_markdown, sentences(self)))
        return "\n\n".join([accuracy_table(self), speed_table(self), told])


def accuracy_table(found: Comparison) -> str:
    """How good, how large and how prompt the ways are."""
    rows = []
    for way in found.ways:
        one = way.turns[ONE].figures()
        times = (f"{one[key]:.2f}" for key in ("latency_ms", "latency_p95_ms"))
        size = f"{way.size_bytes / 1e6:.1f}"
        rows.append((way.name, f"{found.top1(way.name):.2f} %", size, *times))
    if mark := found.ways[0].turns[ONE].mark:
        rows.append((DISTURBED, "", "", mark, mark))
    return markdown_table(("way", "top-1", "MB", "ms, 1 image", "p95 ms"), rows)


def speed_table(found: Comparison) -> str:
    """How many images the ways take in a second, one at a time and many at once."""
    rows = []
    for way in found.ways:
        cells = []
        for turns in way.turns.values():
            figures = turns.figures()
            low, high = map(speed_text, figures["images_per_s_range"])
            speed = speed_text(figures["images_per_s"])
            ratio = f"{figures['to_eager']:.2f}" if turns.is_judged else "none"
            cells += [speed, f"{low}-{high}", ratio]
        rows.append((way.name, *cells))
    counts = found.ways[0].turns
    marks = [cell for turns in counts.values() for cell in (turns.mark, "", "")]
    if any(marks):
        rows.append((DISTURBED, *marks))
    heads = itertools.chain(*((f"img/s, {count}", "range", "ratio") for count in counts))
    return markdown_table(("way", *heads), rows)


def sentences(found: Comparison) -> Iterator[str]:
    """What the tables do not say by themselves."""
    rounds = plural(len(found.ways[0].turns[ONE].images_per_s), "round")
    yield (
        f"top-1 of {plural(found.images, 'validation image')}; medians of {rounds} in which "
        f"the ways took turns, {plural(found.threads, 'thread')} each on CPUs "
        f"{format_cpu_list(found.cpus)} ({found.cpu_model}), {ONE} or {MANY} images at "
        f"once; ratio: to {EAGER}, within a round"
    )
    yield from disturbances(found)
    yield from found.notes
    if found.lost_points > LOST_POINTS:
        layers = ", ".join(f"{name} ({error:.1%})" for name, error in found.worst)
        yield (
            f"int8 loses {found.lost_points:.2f} points of top-1, more than {LOST_POINTS:g}: the "
            f"layers with the largest errors are {layers}"
        )


def disturbances(found: Comparison) -> Iterator[str]:
    """Who disturbed the rounds, if anybody did, and what cannot be told for that."""
    for count, turns in found.ways[0].turns.items():
        if not turns.disturbed:
            continue
        rounds = plural(len(turns.images_per_s), "round")
        told = (
            f"with {plural(count, 'image')} at once, {len(turns.disturbed)} of {rounds} were "
            f"disturbed, in one of which {turns.disturbed[0]}"
        )
        if not turns.is_judged:
            told += (
                f": no ratio, and no verdict on speed; {turns.needed} undisturbed rounds are "
                "needed. Measure once more while nothing else runs on this machine"
            )
        yield told


@contextlib.contextmanager
def kept_on(cpus: Sequence[int]) -> Iterator[None]:
    """Keep all threads of the process on these logical CPUs meanwhile; those that they start have
    that from them. Where the system cannot do that (macOS), or refuses it, nothing happens.
    """
    before = {}
    for thread in own_threads():
        with contextlib.suppress(OSError):  # ended just now, or it is refused
            before[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, cpus)
    try:
        yield
    finally:
        for thread in own_threads() if os.getpid() in before else ():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, before.get(thread, before[os.getpid()]))


def own_threads() -> list[int]:
    """The process's threads; none where they cannot be kept on cores, or are hidden."""
    try:
        return (
            [*map(int, os.listdir("/proc/self/task"))] if hasattr(os, "sched_setaffinity") else []
        )
    except OSError:
        return []


def eager(model: torch.nn.Module) -> Run:
    """PyTorch as it is."""

    def run(images: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return model(images).numpy()

    return run


def in_bf16(model: torch.nn.Module) -> Run:
    """PyTorch with autocast, and memory laid out as convolutions in bf16 are fastest."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def run(images: torch.Tensor) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return model(images.to(memory_format=torch.channels_last)).float().numpy()

    return run


def compiled_run(model: torch.nn.Module, examples: Sequence[torch.Tensor]) -> Run:
    """PyTorch's compiler, for batches as long as the examples and none else; others are filled up
    with zeros. Raises whatever the compiler does, for want of a C++ compiler most of all.
    """
    fast = torch.compile(model, dynamic=False)
    lengths = sorted(map(len, examples))

    def run(images: torch.Tensor) -> np.ndarray:
        count = len(images)
        if count > lengths[-1]:
            return np.concatenate([run(part) for part in images.split(lengths[-1])])
        length = next(length for length in lengths if length >= count)
        filled = torch.cat([images, images.new_zeros(length - count, *images.shape[1:])])
        with torch.inference_mode():
            return fast(filled if length > count else images)[:count].numpy()

    for example in examples:
        run(example)
    return run


def weights_bytes(model: torch.nn.Module) -> int:
    """The size of a model's weights, and of its statistics."""
    return sum(each.nbytes for each in model.state_dict().values())


def session_without_maps(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session that computes nothing but logits. To ask for them alone is not enough: all of a
    graph is computed (onnxruntime 1.31, with RunOptions.only_execute_path_to_fetches too).

    Its threads wait actively while they run, as they do by default, but no longer: by default they
    go on with that for about a second, in the others' turns.
    """
    model = onnx.load(path)
    kept = [output for output in model.graph.output if output.name == LOGITS]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # of weights of the maps, now without use, nobody wants to know
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def onnx_way(name: str, path: Path, threads: int) -> Way:
    """An ONNX file."""
    session = session_without_maps(path, threads)

    def run(images: torch.Tensor) -> np.ndarray:
        return session.run([LOGITS], {int8.IMAGES: images.numpy()})[0]

    return Way(name, path.stat().st_size, run)


def compiled_ways(
    model: torch.nn.Module, examples: Sequence[torch.Tensor]
) -> tuple[list[Way], list[str]]:
    """The compiled model, if it can be compiled here, or else a note that says why not."""
    logging.disable(logging.WARNING)  # which the compiler has many of
    try:
        return [Way(COMPILED, weights_bytes(model), compiled_run(model, examples))], []
    except Stopped:
        raise
    except Exception as error:
        reason = one_line(error)
        return [], [f"{COMPILED} is left out: {reason}"]
    finally:
        logging.disable(logging.NOTSET)


def first_images(checkpoint: cp.Checkpoint, data: ImageData) -> torch.Tensor:
    """Validation images to time the ways with (MANY, 3, size, size); again, if there are fewer."""
    chosen = range(min(MANY, len(data.val)))
    images = torch.cat([each for each, _ in cp.batches(checkpoint, data.val, chosen, MANY)])
    return images[torch.arange(MANY) % len(images)].contiguous()


def count_right(
    ways: Sequence[Way], checkpoint: cp.Checkpoint, data: ImageData, batch_size: int
) -> tuple[list[int], int]:
    """How many of the validation images each way has right, and of how many."""
    classes = torch.tensor(cp.true_classes(data.val))
    right, count = [0] * len(ways), 0
    with tqdm(total=len(classes), unit=" images", leave=False, disable=None) as bar:
        for images, numbers in cp.batches(checkpoint, data.val, range(len(classes)), batch_size):
            wanted = classes[numbers].numpy()
            hits = (int((way.run(images).argmax(1) == wanted).sum()) for way in ways)
            right = [before + more for before, more in zip(right, hits, strict=True)]
            count += len(images)
            bar.update(len(images))
    return right, count


def calls_s(run: Run, images: torch.Tensor) -> list[float]:
    """A turn: seconds of each call, after one that is left out, until they add up to TURN_S."""
    run(images)
    times_s: list[float] = []
    while sum(times_s) < TURN_S:
        start_s = time.perf_counter()
        run(images)
        times_s.append(time.perf_counter() - start_s)
    return times_s


def turns_of(
    rounds: Sequence[Sequence[list[float]]], images: int, disturbed: Sequence[str] = ()
) -> list[Turns]:
    """What came of rounds, each of a list of seconds for each way, the first way being PyTorch in
    fp32, with so many images a call.
    """
    speeds = [[images * len(turn) / sum(turn) for turn in each] for each in rounds]
    return [
        Turns(
            tuple(each[way] for each in speeds),
            tuple(each[way] / each[0] for each in speeds),
            tuple(1e3 * call_s for each in rounds for call_s in each[way]),
            tuple(disturbed),
        )
        for way in range(len(rounds[0]))
    ]


def share_of(contention: Contention | None) -> float:
    """The largest share of the cores that others took; 0 where nobody can tell."""
    return max(contention.stolen, *contention.others.values()) if contention else 0.0


def time_ways(ways: Sequence[Way], images: torch.Tensor, monitor: ContentionMonitor) -> list[Turns]:
    """The turns of the ways with these images, in rounds: A B C, A B C; in the end others for those
    disturbed. The ROUNDS that others disturbed least count.
    """
    rounds: list[list[list[float]]] = []
    contentions: list[Contention | None] = []
    clean = 0
    with tqdm(total=ROUNDS, unit=" rounds", leave=False, disable=None) as bar:
        while clean < ROUNDS and len(rounds) < ROUNDS + MOST_REPEATS:
            monitor.look(0)
            rounds.append([calls_s(way.run, images) for way in ways])
            contentions.append(monitor.look(0))
            is_clean = share_of(contentions[-1]) < CONTENTION_SHARE
            clean += is_clean
            bar.update(is_clean)
    order = sorted(range(len(rounds)), key=lambda place: share_of(contentions[place]))
    used = sorted(order[:ROUNDS])
    told = [
        contention_texts(contentions[place], CONTENTION_SHARE)
        for place in used
        if contentions[place]
    ]
    disturbed = [text for text in map(" and ".join, told) if text]
    return turns_of([rounds[place] for place in used], len(images), disturbed)


def all_ways(
    checkpoint: cp.Checkpoint, onnx_path: Path, int8_path: Path | None, threads: int
) -> list[Way]:
    """The ways that every machine has, PyTorch in fp32 first."""
    model = checkpoint.model
    size_bytes = weights_bytes(model)
    ways = [Way(EAGER, size_bytes, eager(model)), Way(BF16, size_bytes, in_bf16(model))]
    files = {ONNX: onnx_path, INT8: int8_path}
    return ways + [onnx_way(name, path, threads) for name, path in files.items() if path]


def compare(
    checkpoint: cp.Checkpoint,
    data: ImageData,
    onnx_path: Path,
    int8_path: Path | None,
    batch_size: int,
    compiled: bool = False,
) -> Comparison:
    """Measure the ways to run a checkpoint's model, on its validation images: PyTorch, also
    `compiled` if asked for, and its ONNX files.
    """
    threads, topology = cp.use_allowed_cores(), read_topology()
    plan = plan_cores(topology, Settings(split="none"))
    cpus = plan.forward.cpus
    images, notes = first_images(checkpoint, data), []
    with kept_on(cpus):
        monitor = ContentionMonitor(plan, topology.online)
        ways = all_ways(checkpoint, onnx_path, int8_path, threads)
        if compiled:
            more, notes = compiled_ways(checkpoint.model, [images[:ONE], images])
            ways[2:2] = more
        right, count = count_right(ways, checkpoint, data, batch_size)
        timed = {batch: time_ways(ways, images[:batch], monitor) for batch in (ONE, MANY)}
    measured = tuple(
        Measured(way.name, way.size_bytes, hits, {batch: timed[batch][i] for batch in timed})
        for i, (way, hits) in enumerate(zip(ways, right, strict=True))
    )
    found = Comparison(measured, count, threads, cpus, topology.cpu_model, notes=tuple(notes))
    if found.lost_points <= LOST_POINTS:
        return found
    worst = int8.worst_layers(onnx_path, int8_path, images[:LOOKED_AT].numpy())
    return dataclasses.replace(found, worst=tuple(worst))
