"""A sweep of a machine that is made up, whose phases and rounds take no time."""

import dataclasses
import itertools

import machines
from patching import set_everywhere
from records import record

from split_affinity.compare.loops import WayRound
from split_affinity.compare.ratios import lane_times, way_bound_s
from split_affinity.compare.sweep import sweep
from split_affinity.machine.plan import PhaseTimes
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings, images_in_step
from split_affinity.training.steps import StepResult

SETTINGS = Settings(
    model="resnet18", image_size=32, num_classes=5, batch_size=8, accumulate=4, precision="bf16"
)
FLOPS = {"forward": 1.0, "backward": 2.0}
CONTENTION = {"overlap": 0.95, "delayed": 0.9, "ranks": 0.9}  # of the bound that is reached


def make_machine(folder, rows, files=None):
    """A machine of `rows`, all of whose CPUs are allowed."""
    root = machines.write_machine(folder, rows, files)
    return read_topology(root, frozenset(row[0] for row in rows), look_s=0)


def times_on(cores, size=8):
    """Phases that follow Amdahl's law: a 40th of them is serial."""
    part = size / 8 * (0.025 + 0.975 / cores)
    return PhaseTimes(0.4 * part, 0.8 * part, 0.04 * part, 0.02 * part)


def round_of(way, jitter=1.0):
    """A round of a way, with `jitter` in its speed."""
    sizes = way.plan.forward.cores, way.plan.backward.cores
    times = [times_on(cores, way.settings.batch_size) for cores in sizes]
    step_s = way_bound_s(way.settings, *times) / jitter
    step_s /= CONTENTION.get(way.settings.schedule if way.ranks == 1 else "ranks", 1.0)
    records = (record("forward", 0, times[0].forward_s), record("backward", 1, times[1].backward_s))
    steps = tuple(StepResult(n, 1.0, images_in_step(way.settings), step_s, records) for n in (1, 2))
    lanes = dict.fromkeys((group.name for group in way.plan.groups), 1e9)
    alone = None if way.plain or way.ranks > 1 else lane_times(*times)
    return WayRound(steps, dict.fromkeys(lanes, 0.5), alone, lanes, 2**30)


def made_up_sweep(monkeypatch, topology, machine=None, settings=SETTINGS, asked=None):
    """A sweep, and the names of the ways that were run, ratio by ratio."""
    ran = []

    def phases(settings, online, groups):
        jitters = itertools.cycle((1.0, 1.01, 0.99))
        return [
            PhaseTimes(
                *(
                    jitter * seconds
                    for seconds in dataclasses.astuple(times_on(group.cores, settings.batch_size))
                )
            )
            for group, jitter in zip(groups, jitters, strict=False)
        ]

    def rounds(ways, online):
        ran.append([way.name for way in ways])
        return [{way.name: round_of(way, 1 + 0.005 * n) for way in ways} for n in range(7)]

    set_everywhere(monkeypatch, "times_on_groups", phases)
    set_everywhere(monkeypatch, "run_rounds", rounds)
    asked = asked or dataclasses.replace(settings, split="sweep")
    chosen = dataclasses.replace(settings, split="sweep", output_dir=asked.output_dir)
    return sweep(asked, chosen, topology, machine, FLOPS), ran
