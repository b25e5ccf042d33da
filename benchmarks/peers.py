"""How fast one lane over all cores is beside other trainers. A measurement, not a test.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --batch-size 32 --rounds 5

All train the same network on random images from memory, so that no loading is timed, with SGD and
momentum. Each has a process of its own, and keeps its model from round to round. They take turns: A
B C, A B C; the first round warms up. In a round each makes a step that is left out, then those that
are timed. Ratios are taken within a round, to the faster of timm's two ways. The peers:

    timm            timm's released parts, put together as in its train.py, with its best flags on
                    a CPU: --amp --amp-dtype bfloat16 --channels-last
    timm-compile    the same with --torchcompile; compiling is part of the first step
    timm-malloc     timm with this program's settings of glibc's allocator (only if asked for)
    torchvision     the loop of its references/classification: fp32 without channels_last, because
                    its --amp is for CUDA alone and it has no flag for the layout
    transformers    Hugging Face's Trainer: use_cpu, bf16, a model in channels_last
    lightning       Lightning's Trainer: accelerator cpu, precision bf16-mixed, likewise
    ours            this program with --split none, once for each --ours

A peer whose package is not installed is named, and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from other_trainers.loops import PEERS
from other_trainers.pace import PeerRound, summed_up, timed_round

from split_affinity.checkpoints.state import versions
from split_affinity.compare.loops import RoundRequest, rounds_of
from split_affinity.compare.rounds import free_memory_bytes
from split_affinity.compare.ways import Way
from split_affinity.errors import RunError, Stopped, UserError
from split_affinity.files import write_where_asked
from split_affinity.lanes.lane import confine_thread
from split_affinity.machine.description import describe_topology
from split_affinity.machine.plan import CorePlan, check_cpus, make_group
from split_affinity.machine.topology import Topology, read_topology
from split_affinity.models.registry import check_model_name
from split_affinity.options.commands import parse_arguments
from split_affinity.options.settings import Settings
from split_affinity.options.values import parse_cpu_list, whole_number
from split_affinity.reports.tables import describe_run
from split_affinity.runs.measurement import (
    MeasuringProcess,
    measured_settings,
    plan_for,
    send_to_all,
)
from split_affinity.signals import StopRequest
from split_affinity.terminal import say
from split_affinity.text import did_you_mean, markdown_table

REQUIREMENTS = "benchmarks/requirements-peers.txt"
OURS = "ours"
RIVALS = ("timm", "timm-compile")  # the faster one of them is what all are compared with
DEFAULT_PEERS = [*(name for name in PEERS if name != "timm-malloc"), OURS]


def peer_rounds(
    way: Way, online: Sequence[int], cores_listed: bool
) -> Generator[PeerRound | None, RoundRequest, None]:
    """A peer in its own process: None when it is ready, then a round for each request."""
    if cores_listed:  # otherwise it has the threads that PyTorch chooses
        confine_thread(way.plan.forward.cpus)
        torch.set_num_threads(way.plan.forward.threads)
    torch.manual_seed(0)
    loop = PEERS[way.name][0](way.settings)
    request = yield None
    while True:
        request = yield timed_round(loop, way, online, request.steps)


def our_rounds(
    way: Way, online: Sequence[int], cores_listed: bool
) -> Generator[PeerRound | None, RoundRequest, None]:
    """Ours in a process of its own, likewise; the plan of its lane has the cores already."""
    rounds = rounds_of(way, online)
    request = yield next(rounds)
    while True:
        request = yield summed_up(rounds.send(request))


def chosen_ways(asked: argparse.Namespace, topology: Topology) -> list[Way]:
    """What takes turns: the peers that are installed, and ours once for each set of options."""
    ways = []
    for name in asked.peers:
        needed = PEERS[name][1] if name in PEERS else ()
        if missing := next((package for package in needed if not find_spec(package)), ""):
            say(f"{name} is left out: {missing} is not installed (pip install -r {REQUIREMENTS})")
            continue
        for options in dict.fromkeys(asked.ours or [""]) if name == OURS else [""]:
            settings = measured_settings(our_settings(asked, options), topology)
            plan = plan_for(settings, topology)
            if asked.cores:
                check_cpus(topology, "--cores", asked.cores)
                group = make_group(topology, "all", asked.cores, settings.forward_threads)
                plan = CorePlan("none", group, group, group.cpus)
            ways.append(Way(f"{name} {options}".strip(), settings, plan))
    if not ways:
        raise UserError(f"--peers {','.join(asked.peers)}: none of them is installed")
    return ways


def our_settings(asked: argparse.Namespace, options: str) -> Settings:
    """The settings of one lane over all cores, with more options of ours."""
    typed = ["--model", asked.model, "--image-size", str(asked.image_size), "--split", "none"]
    typed += ["--batch-size", str(asked.batch_size)]
    typed += ["--precision", asked.precision] if asked.precision else []
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--ours {options!r}: {error}") from error
    command, settings = parse_arguments([*typed, *words])
    if command != "train" or settings.split != "none" or settings.data_path:
        raise UserError(f"--ours {options!r}: only options of one lane, with images from memory")
    check_model_name(settings.model)
    return settings


Round = dict[str, PeerRound]  # of all ways, by name


def run_rounds(
    ways: Sequence[Way], online: Sequence[int], rounds: int, steps: int, cores_listed: bool
) -> list[Round]:
    """All ways in turn, round by round, after one of one step that warms up and comes first."""
    done: list[Round] = []
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        running = {}
        # What was compiled by an earlier run is not taken from there: compiling is timed.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for way in ways:
            function = our_rounds if way.name.split()[0] == OURS else peer_rounds
            process = MeasuringProcess(stop.check, function, way, online, cores_listed)
            running[way.name] = stack.enter_context(contextlib.closing(process))
            next(process)
        free_bytes, keep = free_memory_bytes(), False
        for number in range(rounds + 1):
            request = RoundRequest(number, steps if number else 1, keep)
            done.append({name: send_to_all([each], request)[0] for name, each in running.items()})
            if not number:  # whether the memory of all ways fits at once
                peaks = (each.peak_memory_bytes for each in done[0].values())
                keep = sum(peaks) < 0.9 * free_bytes
            say(describe_round(number, done[-1]))
    return done


def describe_round(number: int, done: Round) -> str:
    """A round's speeds, and who disturbed which way."""
    speeds = ", ".join(f"{name} {each.images_per_s:.2f}" for name, each in done.items())
    text = f"round {number}{'' if number else ', which warms up'}, images/s: {speeds}"
    disturbed = [f"{each.disturbed} ({name})" for name, each in done.items() if each.disturbed]
    return "; ".join([text, *(["disturbed: " + ", ".join(disturbed)] if disturbed else [])])


def rival_of(rounds: Sequence[Round]) -> str:
    """With what all are compared: timm's faster way; without timm, the first way."""
    rivals = [name for name in RIVALS if name in rounds[0]] or list(rounds[0])[:1]
    return max(rivals, key=lambda name: statistics.median(speeds_of(rounds, name)))


def speeds_of(rounds: Sequence[Round], name: str) -> list[float]:
    """A way's images/s in each round."""
    return [each[name].images_per_s for each in rounds]


def summaries(done: Sequence[Round]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The rival, and each way's figures, from all rounds but the first, which warms up."""
    warm_up, *rounds = done
    rival = rival_of(rounds)
    found = {}
    for name in warm_up:
        speeds = speeds_of(rounds, name)
        pairs = zip(speeds, speeds_of(rounds, rival), strict=True)
        found[name] = {
            "images_per_s": speeds,
            "ratios": [speed / other for speed, other in pairs],
            "first_step_s": warm_up[name].first_step_s,
            "peak_memory_bytes": max(each[name].peak_memory_bytes for each in rounds),
            "disturbed": {
                number: each[name].disturbed
                for number, each in enumerate(rounds, 1)
                if each[name].disturbed
            },
        }
    return rival, found


def table_of(rival: str, found: dict[str, dict[str, Any]]) -> str:
    """The figures as a table: medians, with the lowest and the highest round."""
    rows = []
    for name, each in found.items():
        speeds, ratios, first_s = each["images_per_s"], each["ratios"], each["first_step_s"]
        rows.append(
            [
                name,
                f"{statistics.median(speeds):.2f}",
                f"{min(speeds):.2f}-{max(speeds):.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{first_s:.1f}" if first_s is not None else "",
                f"{each['peak_memory_bytes'] / 2**30:.2f}",
            ]
        )
    header = ["way", "images/s", "range", f"to {rival}", "in the rounds", "first step, s", "GiB"]
    return markdown_table(header, rows)


def peer_names(text: str) -> list[str]:
    """The names of `--peers`, each known and given once."""
    names, known = text.split(","), [*PEERS, OURS]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}{hint}")
    return list(dict.fromkeys(names))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; wrong ones end the program with one line and exit code 2."""
    parser = OneLineParser(
        prog=f"{Path(__file__).name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = whole_number(1)
    default = ",".join(DEFAULT_PEERS)
    parser.add_argument(
        "--peers",
        type=peer_names,
        default=DEFAULT_PEERS,
        metavar="A,B",
        help=f"of {', '.join([*PEERS, OURS])} (default: {default})",
    )
    parser.add_argument(
        "--ours",
        action="append",
        metavar="OPTIONS",
        help="more options of ours, as in --ours='--precision fp32'; each --ours adds a way",
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: as in training")
    parser.add_argument("--model", default="resnet50", help="of timm and torchvision alike")
    parser.add_argument("-b", "--batch-size", type=count, default=32, help="images in a step")
    parser.add_argument("--image-size", type=count, default=224, help="pixels")
    parser.add_argument("--steps", type=count, default=3, help="timed in a round (default: 3)")
    parser.add_argument("--rounds", type=count, default=5, help="that count (default: 5)")
    parser.add_argument("--cores", type=parse_cpu_list, help="such as 0-3 (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return parser.parse_args(argv)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def measure(asked: argparse.Namespace) -> None:
    """Run all ways, and print and write how they compare."""
    topology = read_topology()
    ways = chosen_ways(asked, topology)
    known = versions() | {
        name: importlib.metadata.version(name)
        for name in dict.fromkeys(itertools.chain(*(needed for _, needed in PEERS.values())))
        if find_spec(name)
    }
    say(f"{describe_run(ways[0].settings)}; {describe_topology(topology)}")
    say(", ".join(f"{name} {version}" for name, version in known.items()))
    done = run_rounds(ways, topology.online, asked.rounds, asked.steps, bool(asked.cores))
    rival, found = summaries(done)
    say(f"\n{table_of(rival, found)}")
    for name, each in found.items():
        for number, who in each["disturbed"].items():
            say(f"round {number}, {name}: {who}")
    if asked.json:
        figures = {
            "run": describe_run(ways[0].settings),
            "machine": describe_topology(topology),
            "versions": known,
            "steps": asked.steps,
            "compared_with": rival,
            "ways": found,
        }
        write_where_asked(asked.json, json.dumps(figures, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code, as that of the program."""
    asked = parsed(argv)
    try:
        measure(asked)
    except (UserError, RunError, Stopped) as error:
        say(f"{Path(__file__).name}: error: {error}", sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
