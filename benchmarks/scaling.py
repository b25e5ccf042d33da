"""What more machines would reach, on paper: a calculation from measured figures, not a measurement.

    python benchmarks/scaling.py --forward-ms 777 --backward-ms 1615

prints two tables in Markdown, for a number of machines with one rank each: the images a second of
all of them, and in brackets the share of so many times one machine. Assumptions:

- A machine is the one whose figures are given (`none`: one lane over all of its cores; `delayed`:
  forward and backward lane, on their groups). All are alike, and data loading keeps up.
- Gradients are added up by a ring: of n bytes, each of W machines sends and receives 2 (W-1)/W x n
  (Patarasuk and Yuan 2009), in 2 (W-1) rounds that take a latency each. Bytes go at the slower of
  two rates: a share of the link's, and what one process was seen to handle over loopback.
- Buckets are of one size, and are ready one by one, evenly over the backward phase of a step's last
  micro-batch; they travel one after the other. So the last one is never hidden. (A ResNet has most
  of its weights in its last layers, which come first: in truth more is hidden.)
- They cost backpropagation nothing. (In truth the threads that carry them took 80 ms of a core.)
- With `none` a step takes all phases and what is not hidden. With `delayed` the lanes go side by
  side: it takes what the busier one needs, and what is not hidden is the backward lane's.
- All wait for the slowest. Step times are taken as normal, with a deviation of the jitter's share;
  the expected maximum of W such times is Blom's (1958).
"""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Iterator
from statistics import NormalDist

MACHINES = (1, 2, 4, 8, 16, 32, 64)


def rate_bytes_per_s(given: Namespace, link_gbit: float) -> float:
    """How fast a machine sends, and at the same time receives."""
    return min(link_gbit / 8 * 1e9 * given.link_share, given.process_gb * 1e9)


def all_reduce_s(given: Namespace, size_bytes: float, machines: int, link_gbit: float) -> float:
    """How long the sum of so many bytes takes, by itself."""
    sent_bytes = 2 * (machines - 1) / machines * size_bytes
    rounds = 2 * (machines - 1)
    return sent_bytes / rate_bytes_per_s(given, link_gbit) + rounds * given.latency_us / 1e6


def exposed_s(given: Namespace, backward_s: float, machines: int, link_gbit: float) -> float:
    """What backpropagation of a step's last micro-batch, so long, does not hide of the sums."""
    buckets = math.ceil(given.gradient_mb / given.bucket_mb)
    each_s = all_reduce_s(given, given.gradient_mb * 1e6 / buckets, machines, link_gbit)
    end_s = 0.0
    for number in range(1, buckets + 1):
        end_s = max(end_s, backward_s * number / buckets) + each_s
    return end_s - backward_s if machines > 1 else 0.0


def slowest(given: Namespace, machines: int) -> float:
    """How much longer than the mean the slowest of all machines takes: a factor."""
    if machines == 1:
        return 1.0
    return 1 + given.jitter * NormalDist().inv_cdf((machines - 0.375) / (machines + 0.25))


def step_s(given: Namespace, way: str, batches: int, machines: int, link_gbit: float) -> float:
    """An optimizer step of so many micro-batches on each machine."""
    if way == "none":
        forward_s, backward_s = given.forward_ms / 1e3, given.backward_ms / 1e3
    else:
        forward_s, backward_s = given.lane_forward_ms / 1e3, given.lane_backward_ms / 1e3
    ending_s = given.update_ms / 1e3 + exposed_s(given, backward_s, machines, link_gbit)
    phases = batches * forward_s, batches * backward_s + ending_s
    return (sum(phases) if way == "none" else max(phases)) * slowest(given, machines)


def cells(given: Namespace, batches: int, machines: int) -> Iterator[str]:
    """A row of a table, with so many micro-batches a step on each machine."""
    yield str(machines)
    yield f"{machines * batches * given.images:,}"
    for link_gbit in given.links:
        size_bytes = given.gradient_mb * 1e6
        yield f"{1e3 * all_reduce_s(given, size_bytes, machines, link_gbit):.0f}"
        for way in ("none", "delayed"):
            speeds = [
                count * batches * given.images / step_s(given, way, batches, count, link_gbit)
                for count in (machines, 1)
            ]
            yield f"{speeds[0]:.0f} ({speeds[0] / speeds[1] / machines:.0%})"


def table(given: Namespace, shared: bool) -> Iterator[str]:
    """Each machine has the micro-batches of a step, or they are shared out among all."""
    heads = ["machines", "images a step"]
    for link in given.links:
        heads += [f"all-reduce ms, {link:g} Gbit/s", "`none`", "`delayed`"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --: |' * len(heads)}"
    for machines in MACHINES:
        batches, rest = divmod(given.batches, machines) if shared else (given.batches, 0)
        if not rest:
            yield f"| {' | '.join(cells(given, batches, machines))} |"


def parse_arguments() -> Namespace:
    """The options, whose defaults are ResNet-50's on the machine that the page names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    for name, default, text in (
        ("images", 32, "images of a micro-batch"),
        ("batches", 8, "micro-batches of a step"),
        ("forward-ms", 777.0, "forward phase of a micro-batch, one lane over all cores"),
        ("backward-ms", 1615.0, "backward phase of a micro-batch, one lane over all cores"),
        ("lane-forward-ms", 1491.0, "forward phase of a micro-batch with delayed"),
        ("lane-backward-ms", 3007.0, "backward phase of a micro-batch with delayed"),
        ("update-ms", 20.0, "update phase"),
        ("gradient-mb", 102.2, "gradients, millions of bytes"),
        ("bucket-mb", 26.2, "a bucket, millions of bytes"),
        (
            "process-gb",
            1.05,
            "what one process sends and receives over loopback, 1e9 bytes a second",
        ),
        ("link-share", 0.9, "of a link's rate that is reached"),
        ("latency-us", 50.0, "of a round of the ring, in microseconds"),
        ("jitter", 0.02, "standard deviation of a machine's step times, as a share"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--links", type=float, nargs="+", default=[10.0, 100.0], help="Gbit/s")
    return parser.parse_args()


if __name__ == "__main__":
    asked = parse_arguments()
    print(f"{asked.batches} micro-batches on each machine:\n", *table(asked, False), sep="\n")
    print(f"\n{asked.batches} micro-batches in all:\n", *table(asked, True), sep="\n")
