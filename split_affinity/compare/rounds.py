"""All ways in turn, round by round: A B C, A B C; disturbed rounds are repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterable, Sequence

import psutil

from split_affinity.compare.loops import ByLane, RoundRequest, WayRound, rounds_of
from split_affinity.compare.ways import ROUNDS, Way, steps_in_round
from split_affinity.lanes.contention import CONTENTION_SHARE
from split_affinity.options.settings import Settings, images_in_step
from split_affinity.reports.timeline import by_start
from split_affinity.runs.measurement import MeasuringProcess, phase_times, send_to_all
from split_affinity.signals import StopRequest
from split_affinity.terminal import say
from split_affinity.text import plural

MOST_REPEATS = 3  # of disturbed rounds
LONG_S = 10 * 60  # a comparison that takes longer names --quick

Round = dict[str, WayRound]  # of all ways, by name


def measure_way(processes: Sequence[MeasuringProcess], order: RoundRequest) -> WayRound:
    """What a way does in a round, in all of its processes together."""
    return combine_ranks(send_to_all(processes, order))


def combine_ranks(rounds: Sequence[WayRound]) -> WayRound:
    """The rounds of a way's ranks as one: they make their steps together."""
    if len(rounds) == 1:
        return rounds[0]
    steps = []
    for of_ranks in zip(*(each.steps for each in rounds), strict=True):
        # All processes of a machine have one clock.
        records = by_start(record for step in of_ranks for record in step.records)
        seen = [step.contention for step in of_ranks if step.contention]
        contention = None
        if seen:
            others = merge_lanes(each.others for each in seen)
            stolen = max(each.stolen for each in seen)
            contention = dataclasses.replace(seen[0], others=others, stolen=stolen)
        steps.append(
            dataclasses.replace(of_ranks[0], records=tuple(records), contention=contention)
        )
    return WayRound(
        steps=tuple(steps),
        busy=merge_lanes(each.busy for each in rounds),
        phase_times_alone=None,  # a rank's phases overlap with those of the others
        matrix_flops=merge_lanes(each.matrix_flops for each in rounds),
        peak_memory_bytes=sum(each.peak_memory_bytes for each in rounds),
        fused=all(each.fused for each in rounds),
    )


def merge_lanes(by_rank: Iterable[ByLane]) -> ByLane:
    """The figures of all ranks' lanes."""
    return {lane: figure for lanes in by_rank for lane, figure in lanes.items()}


def start_ways(
    stack: contextlib.ExitStack, stop: StopRequest, ways: Sequence[Way], online: Sequence[int]
) -> dict[str, list[MeasuringProcess]]:
    """The processes of all ways, one for each rank, once all of them are ready."""
    count = plural(len(ways), "way")
    say(f"{count} to train, {ROUNDS} rounds; after one to warm up you see how long they will take")
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


def free_memory_bytes() -> int:
    """Memory that no process uses; 0, to be safe, where the system does not say."""
    try:
        return psutil.virtual_memory().available
    except (OSError, LookupError):
        return 0


def run_round(
    ways: Sequence[Way], running: dict[str, list[MeasuringProcess]], order: RoundRequest
) -> Round:
    """What each way does in one round, one after the other."""
    done: Round = {}
    for way in ways:
        done[way.name] = with_phases(way, measure_way(running[way.name], order), done)
    return done


def with_phases(way: Way, result: WayRound, others: Round) -> WayRound:
    """A way's round, with the phase times of `sequential` on the same lanes if it has none."""
    if result.phase_times_alone or way.plain or way.ranks > 1:
        return result
    alone = others[way.name.replace(way.settings.schedule, "sequential")].phase_times_alone
    own = phase_times(record for step in result.steps for record in step.records)
    return dataclasses.replace(
        result, phase_times_alone=dataclasses.replace(alone, refresh_s=own.refresh_s)
    )


def describe_course(settings: Settings, ways: int, steps: int, seconds: float) -> str:
    """How long all rounds will take, and what is measured in one."""
    took = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    images = plural(images_in_step(settings), "image")
    text = f"about {took}: {ROUNDS} rounds of {ways} ways, {images} a step, "
    text += f"{plural(steps, 'step')} of each in a round"
    return text + ("; --quick is shorter" if seconds > LONG_S and not settings.quick else "")


def describe_round(number: int, done: Round) -> str:
    """The speeds in a round, and who disturbed it, if anybody did."""
    head = f"round {number}/{ROUNDS}" if number <= ROUNDS else f"round {number}, a repetition"
    speeds = ", ".join(f"{way} {each.images_per_s:.2f}" for way, each in done.items())
    share, text = disturbance(done)
    return f"{head}, images/s: {speeds}" + (f"; disturbed: {text}" if share else "")


def disturbance(done: Round) -> tuple[float, str]:
    """The largest share of a way's cores that others took, and who; 0 below CONTENTION_SHARE."""
    share, who, way = max((*each.disturbance, way) for way, each in done.items())
    return (share, f"{who} ({way})") if share >= CONTENTION_SHARE else (0.0, "")


def rounds_used(rounds: Sequence[Round]) -> list[int]:
    """Indices of the ROUNDS that count, in order: if too few are clean, the least disturbed too."""
    order = sorted(range(len(rounds)), key=lambda index: disturbance(rounds[index])[0])
    return sorted(order[:ROUNDS])


def run_rounds(ways: Sequence[Way], online: Sequence[int]) -> list[Round]:
    """All ways in turn, round by round: A B C, A B C; at the end others for disturbed rounds.

    A first one warms up, and is left out: it tells how long the others take, and whether the memory
    of all ways fits at once. If not, each gives it back after a round, and fetches it again.
    """
    rounds: list[Round] = []
    settings = ways[0].settings
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        running = start_ways(stack, stop, ways, online)
        free_bytes, start_s = free_memory_bytes(), time.perf_counter()
        first = run_round(ways, running, RoundRequest(0, 1, keep_memory=False)).values()
        first_s = time.perf_counter() - start_s
        keep = sum(each.peak_memory_bytes for each in first) < 0.9 * free_bytes
        steps = steps_in_round(settings.steps, min(each.step_s for each in first))
        round_s = first_s + (steps - 1) * sum(each.step_s for each in first)
        say(describe_course(settings, len(ways), steps, ROUNDS * round_s))
        for number in range(1, ROUNDS + MOST_REPEATS + 1):
            if sum(not disturbance(each)[0] for each in rounds) >= ROUNDS:
                break
            rounds.append(run_round(ways, running, RoundRequest(number, steps, keep)))
            say(describe_round(number, rounds[-1]))
    return rounds
