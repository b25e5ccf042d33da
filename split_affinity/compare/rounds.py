"""All ways in turn, round by round: A B C, A B C; disturbed rounds are repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

from split_affinity.compare.loops import ByLane, Order, Round, end_s, rounds_of
from split_affinity.compare.ways import MOST_STEPS, ROUNDS, Way
from split_affinity.lanes.contention import CONTENTION_SHARE
from split_affinity.options.settings import Settings
from split_affinity.reports.timeline import by_start
from split_affinity.runs.measurement import MeasuringProcess, phase_times, send_to_all
from split_affinity.signals import StopRequest
from split_affinity.terminal import say
from split_affinity.text import plural
from split_affinity.training.schedules import step_bound_s
from split_affinity.training.steps import StepResult

MOST_REPEATS = 3  # of disturbed rounds
TIME_LIMIT_S = 14 * 60  # for a comparison whose steps nobody has counted
# To measure of a way in a round, where steps are short.
LEAST_STEPS_S = 2.0


def measure(processes: Sequence[MeasuringProcess], order: Order) -> Round:
    """What a way does in a round, in all of its processes together."""
    return round_of_ranks(send_to_all(processes, order))


def round_of_ranks(rounds: Sequence[Round]) -> Round:
    """The rounds of a way's ranks as one. They make their steps together, each of which counts the
    images of all. A rank's phases always have company: that of the others'.
    """
    if len(rounds) == 1:
        return rounds[0]
    by_step = list(zip(*(each.steps for each in rounds), strict=True))
    return dataclasses.replace(
        rounds[0],
        steps=tuple(map(step_of_ranks, by_step)),
        busy=merged_lanes(each.busy for each in rounds),
        alone=None,
        matrix_flops=merged_lanes(each.matrix_flops for each in rounds),
        peak_memory_bytes=sum(each.peak_memory_bytes for each in rounds),
        update_s=statistics.median(min(map(end_s, steps)) for steps in by_step),
    )


def merged_lanes(by_rank: Iterable[ByLane]) -> ByLane:
    """The figures of all ranks' lanes."""
    return {lane: figure for lanes in by_rank for lane, figure in lanes.items()}


def step_of_ranks(steps: Sequence[StepResult]) -> StepResult:
    """A step of several ranks, with the phases of all: processes of a machine have one clock."""
    records = by_start(record for step in steps for record in step.records)
    seen = [step.contention for step in steps if step.contention]
    contention = None
    if seen:
        others = merged_lanes(each.others for each in seen)
        stolen = max(each.stolen for each in seen)
        contention = dataclasses.replace(seen[0], others=others, stolen=stolen)
    return dataclasses.replace(steps[0], records=tuple(records), contention=contention)


@dataclass(frozen=True)
class Pace:
    """How long a way to train takes, in seconds: its turn in a round but for the steps measured,
    and a whole step, of `batches`. A part of a step tells all of it if batches are `strict`.
    """

    rest_s: float
    step_s: float
    batches: int
    strict: bool

    def turn_s(self, steps: int, batches: int) -> float:
        """A turn with so many steps of so many batches."""
        return self.rest_s + steps * self.step_s * batches / self.batches


def find_pace(way: Way, first: Round, turn_s: float) -> Pace:
    """A way's pace by a round with a step of one batch or two, and what its turn took."""
    schedule, whole = way.settings.schedule, way.settings.accumulate
    measured_s, step_s = first.steps[0].step_s, first.step_s
    if not way.strict:
        counts = round(first.share * whole), whole
        part_s, whole_s = (step_bound_s(schedule, first.alone, count) for count in counts)
        step_s = measured_s * whole_s / part_s
    return Pace(max(0.0, turn_s - measured_s), step_s, whole, way.strict)


def choose_steps(asked: int | None, paces: Iterable[Pace]) -> int:
    """Steps of a way to measure in each round: as asked in all, or enough to take a while."""
    if asked:
        return -(-asked // ROUNDS)
    shortest_s = min(pace.step_s for pace in paces)
    return max(1, min(MOST_STEPS, math.ceil(LEAST_STEPS_S / shortest_s)))


def choose_batches(paces: dict[str, Pace], steps: int, round_s: float) -> dict[str, int]:
    """Of how many batches the steps of each way are that are measured: whole steps, if a round then
    takes `round_s` at most. Else strict ways share the time that others leave, and measure as much
    of a step as their part of it allows; a batch at the least.
    """
    turns_s = (pace.turn_s(steps, 0 if pace.strict else pace.batches) for pace in paces.values())
    left_s, batches = round_s - sum(turns_s), {way: pace.batches for way, pace in paces.items()}
    strict = sorted((pace.step_s, way) for way, pace in paces.items() if pace.strict)
    for others, (step_s, way) in zip(range(len(strict), 0, -1), strict, strict=True):
        batch_s = steps * step_s / batches[way]
        batches[way] = int(max(1, min(batches[way], left_s / others / batch_s + 1e-6)))
        left_s -= batches[way] * batch_s
    return batches


def start_ways(
    stack: contextlib.ExitStack, stop: StopRequest, ways: Sequence[Way], online: Sequence[int]
) -> dict[str, list[MeasuringProcess]]:
    """The processes of all ways, one for each rank, ready to begin: nothing else shall run while a
    way is measured.
    """
    say(f"{len(ways)} ways to train in {ROUNDS} rounds; first a round to warm up, which tells more")
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    running: dict[str, list[MeasuringProcess]] = {way.name: [] for way in ways}
    for way in ways:
        for rank in range(way.ranks):
            process = MeasuringProcess(
                stop.check, rounds_of, way, online, rank, f"{folder}/{way.name}"
            )
            running[way.name].append(stack.enter_context(contextlib.closing(process)))
    for processes in running.values():
        send_to_all(processes, None)
    return running


def warm_up(
    ways: Sequence[Way], running: dict[str, list[MeasuringProcess]]
) -> tuple[bool, dict[str, Pace]]:
    """Whether the memory of all ways fits at once, and how long each takes, by a first round.

    If it does not fit, each has to give it back after a round, and to fetch it again in the next.
    """
    free_bytes = free_memory_bytes()
    firsts: dict[str, Round] = {}
    paces = {}
    for way in ways:
        start_s = time.perf_counter()
        # Two batches where two are held at once.
        count = 1 if way.strict else min(2, way.settings.accumulate)
        first = measure(running[way.name], Order(0, count, 1, keep_memory=False))
        firsts[way.name] = first = with_phases(way, first, firsts)
        paces[way.name] = find_pace(way, first, time.perf_counter() - start_s)
    peak_bytes = sum(first.peak_memory_bytes for first in firsts.values())
    return peak_bytes < 0.9 * free_bytes, paces


def free_memory_bytes() -> int:
    """Memory that no process uses; 0, as the safe side, where the system does not tell."""
    try:
        return psutil.virtual_memory().available
    except (OSError, LookupError):
        return 0


def with_phases(way: Way, result: Round, others: dict[str, Round]) -> Round:
    """A round of a way with lanes that has phases without company: if none were timed, those of
    `sequential` on the same lanes, among the other ways' rounds. Ranks have none.
    """
    if result.alone or way.plain or way.ranks > 1:
        return result
    alone = others[way.name.replace(way.settings.schedule, "sequential")].alone
    own = phase_times(record for step in result.steps for record in step.records)
    return dataclasses.replace(result, alone=dataclasses.replace(alone, refresh_s=own.refresh_s))


def describe_course(
    settings: Settings, paces: dict[str, Pace], steps: int, batches: dict[str, int]
) -> str:
    """How long the rounds will take, and how much of each way is measured in one."""
    left_s = ROUNDS * sum(pace.turn_s(steps, batches[name]) for name, pace in paces.items())
    took = f"{left_s / 60:.0f} minutes" if left_s >= 90 else f"{left_s:.0f} seconds"
    images = plural(settings.batch_size * settings.accumulate, "image")
    text = f"about {took}: {ROUNDS} rounds of {len(paces)} ways, {images} a step"
    parts = {name: (batches[name], pace.batches) for name, pace in paces.items()}
    text += f", {plural(steps, 'step')} of each in a round{part_note(parts)}"
    return text + ("; --quick is shorter" if left_s > 900 and not settings.quick else "")


def part_note(parts: dict[str, tuple[int, int]]) -> str:
    """Which ways are measured by a part of their steps: by so many of so many batches."""
    texts = [f"{name} {part} of {whole}" for name, (part, whole) in parts.items() if part < whole]
    note = "; of steps whose batches come one after the other, a part is measured: "
    return f"{note}{', '.join(texts)} batches" if texts else ""


def describe_round(rounds: dict[str, list[Round]]) -> str:
    """The speeds in the latest round, and who disturbed it, if anybody did."""
    number = len(next(iter(rounds.values())))
    head = f"round {number}/{ROUNDS}" if number <= ROUNDS else f"round {number}, a repetition"
    speeds = ", ".join(f"{way} {each[-1].images_per_s:.2f}" for way, each in rounds.items())
    share, text = disturbance(rounds, number - 1)
    return f"{head}, images/s: {speeds}" + (f"; disturbed: {text}" if share else "")


def disturbance(rounds: dict[str, list[Round]], index: int) -> tuple[float, str]:
    """The largest share of a way's cores that others took in a round, and in words; 0 if nobody
    took enough to count.
    """
    found = [(*each[index].disturbance, way) for way, each in rounds.items()]
    share, who, way = max(found)
    return (share, f"{who} ({way})") if share >= CONTENTION_SHARE else (0.0, "")


def clean_rounds(rounds: dict[str, list[Round]]) -> list[int]:
    """Indices of the rounds that nobody disturbed."""
    count = len(next(iter(rounds.values())))
    return [index for index in range(count) if not disturbance(rounds, index)[0]]


def rounds_used(rounds: dict[str, list[Round]]) -> list[int]:
    """Indices of the rounds that count, as many as the verdict needs: the clean ones, and if these
    are too few, those disturbed least.
    """
    count = len(next(iter(rounds.values())))
    order = sorted(range(count), key=lambda index: disturbance(rounds, index)[0])
    return sorted(order[:ROUNDS])


def run_rounds(
    ways: Sequence[Way], online: Sequence[int], begun_s: float, drawn: bool
) -> dict[str, list[Round]]:
    """The rounds of each way, in turn: A B C, A B C; at the end others for those disturbed.

    The round that warms the ways up is left out. In the seventh, whose steps are `drawn`, these are
    whole ones.
    """
    rounds: dict[str, list[Round]] = {way.name: [] for way in ways}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        running = start_ways(stack, stop, ways, online)
        keep, paces = warm_up(ways, running)
        asked = ways[0].settings.steps
        steps = choose_steps(asked, paces.values())
        wholes_s = [
            paces[way.name].step_s for way in ways if drawn and way.strict and not way.plain
        ]
        left_s = TIME_LIMIT_S - (time.perf_counter() - begun_s) - sum(wholes_s)
        limit_s = math.inf if asked else left_s
        batches = choose_batches(paces, steps, limit_s / ROUNDS)
        say(describe_course(ways[0].settings, paces, steps, batches))
        for number in range(1, ROUNDS + MOST_REPEATS + 1):
            if number > ROUNDS and len(clean_rounds(rounds)) >= ROUNDS:
                break
            latest: dict[str, Round] = {}
            for way in ways:
                whole = drawn and number == ROUNDS and not way.plain
                count = way.settings.accumulate if whole else batches[way.name]
                result = measure(running[way.name], Order(number, count, steps, keep))
                latest[way.name] = with_phases(way, result, latest)
                rounds[way.name].append(latest[way.name])
            say(describe_round(rounds))
    return rounds
