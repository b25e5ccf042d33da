"""What adding gradients up over two ranks takes, by itself and beside backpropagation. A
measurement of some minutes, not a test.

    python benchmarks/reduce.py --model resnet50 --image-size 224 --batch-size 32

Two ranks of one core each train on random images, as `compare` has them. The sums alone are timed
between steps, while nothing else runs and all ranks have come so far; then steps of four
micro-batches, in whose last backward phase the buckets set out. What the sums take in truth is the
rest that the phase `reduce` waits for, less the wait for the other rank's gradients, and what that
backward phase takes longer than those before it: gloo's threads work on the same core.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity import ALLOWED_CPUS
from split_affinity.data.loader import Batches
from split_affinity.data.samples import Loaded
from split_affinity.lanes.lane import (
    Lanes,
    coordinating,
    tune_allocator,
)
from split_affinity.machine.plan import (
    CorePlan,
    Group,
)
from split_affinity.machine.precision import choose_precision
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings
from split_affinity.ranks.ranks import SeveralRanks
from split_affinity.runs.measurement import (
    MeasuringProcess,
    send_to_all,
)
from split_affinity.runs.setup import build_train_state
from split_affinity.training.steps import run_schedule
from split_affinity.training.update import TrainState

MICRO_BATCHES = 4


def rank_of(settings: Settings, rank: int, store: str, steps: int) -> Iterator[dict]:
    """A rank: how many bytes travel, the seconds of the sums alone, and the steps."""
    tune_allocator()
    cpu = sorted(ALLOWED_CPUS)[rank]
    group = Group("all", (cpu,), 1)
    plan = CorePlan("none", group, group, (cpu,))
    ranks = SeveralRanks(rank, 2, distributed.FileStore(store, 2), 300.0)
    size = (settings.batch_size, 3, settings.image_size, settings.image_size)
    batch = torch.randn(size), torch.randint(settings.num_classes, size[:1])
    loaded = [Loaded(batch)]
    with coordinating(settings, plan), Lanes(plan, ()) as lanes:
        train_state = build_train_state(settings, lanes, ranks=ranks)
        lanes.backward.adopt(ranks.start)
        count = MICRO_BATCHES * (steps + 1)
        stream = Batches(loaded, count)
        made = list(run_schedule(settings, lanes, train_state, stream))[1:]
        alone_s = [lanes.backward.call(sum_alone, train_state) for _ in range(steps + 5)][5:]
        yield {"bytes": train_state.reducer.size_bytes, "alone_s": alone_s, "steps": made}
        ranks.close(together=True)


def sum_alone(train_state: TrainState) -> float:
    """Seconds of the sums of all gradients, begun by all ranks at once."""
    train_state.ranks.gather_numbers([0.0])
    start_s = time.perf_counter()
    train_state.reducer.finish(train_state.network.model)
    return time.perf_counter() - start_s


def describe(results: list[dict]) -> Iterator[str]:
    """The figures of both ranks: medians, in milliseconds."""
    size_bytes = results[0]["bytes"]
    alone_s = [statistics.median(each["alone_s"]) for each in results]
    sent_gb = size_bytes / 1e9  # of a ring of two: half of it, twice
    yield f"gradients {size_bytes / 1e6:.1f} MB a step; a rank sends and receives as much"
    yield f"sums alone {1e3 * max(alone_s):.0f} ms: {sent_gb / max(alone_s):.2f} GB/s each way"
    for rank, each in enumerate(results):
        rest_ms, waited_ms, last_ms, other_ms = [], [], [], []
        for step in each["steps"]:
            waited_ms.append(1e3 * step.waited_s[rank])
            rest_ms.append(1e3 * step.total("duration_s", "reduce"))
            times_ms = [1e3 * one.duration_s for one in step.records if one.phase == "backward"]
            last_ms.append(times_ms[-1])
            other_ms.append(statistics.fmean(times_ms[1:-1]))
        rest, waited, last, other = map(statistics.median, (rest_ms, waited_ms, last_ms, other_ms))
        yield (
            f"rank {rank}: phase reduce {rest:.0f} ms, of which {waited:.0f} ms wait for the other "
            f"rank's gradients; last backward phase {last:.0f} ms, others {other:.0f} ms"
        )


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    precision = choose_precision(Settings(), read_topology())[0]
    settings = Settings(
        model=asked.model,
        image_size=asked.image_size,
        batch_size=asked.batch_size,
        num_classes=1000,
        accumulate=MICRO_BATCHES,
        ranks=2,
        lr=0.0,
        precision=precision,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        store = str(Path(folder) / "store")
        processes = [
            stack.enter_context(
                contextlib.closing(
                    MeasuringProcess(lambda: None, rank_of, settings, rank, store, asked.steps)
                )
            )
            for rank in range(2)
        ]
        print("\n".join(describe(send_to_all(processes, None))))


if __name__ == "__main__":
    main()
