"""Schedules: how an optimizer step is laid over the two lanes.

A new one is entered in SCHEDULES, in step_bound_s, and in the choices of `--schedule`
(options/settings.py).

Each is a generator: a `next` runs one step and gives the scores of each of its micro-batches, until
the batches run out. All share the same phase functions, hold no more than two micro-batches of
activations, and read data only while no forward pass runs (see Batches.prefetch).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from split_affinity.data.loader import Batches
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import PhaseTimes
from split_affinity.training.network import Scores
from split_affinity.training.update import TrainState

Steps = Iterator[list[Scores]]


def submit_update(lanes: Lanes, train_state: TrainState, *args: Any) -> Future:
    """Queue what ends a step on the backward lane: Work.update with these arguments; over several
    ranks the sum of the gradients comes first.
    """
    if train_state.reducer:
        copied, begun, after = args or (None, None, None)
        args = copied, begun, lanes.backward.submit("reduce", train_state.reduce, copied, after)
    return lanes.backward.submit("update", train_state.update, *args)


def sequential(lanes: Lanes, train_state: TrainState, batches: Batches) -> Steps:
    """Forward, then backward, strictly alternating: one group works while the other waits.

    The next batch is fetched while the backward group works, since the loader's home, the forward
    group, is idle then.
    """
    network = train_state.network
    lanes.backward.call(train_state.watch, network.model)
    while batches.left:
        scores = []
        for _ in range(network.accumulate):
            output = lanes.forward.run("forward", network.forward, next(batches))
            backward = lanes.backward.submit("backward", network.backward, output)
            del output  # the graph shall die with the backward phase
            batches.prefetch()
            scores.append(backward.result())
        submit_update(lanes, train_state).result()
        yield scores


def overlap(lanes: Lanes, train_state: TrainState, batches: Batches) -> Steps:
    """Forward of micro-batch k+1 beside backward of micro-batch k, inside one optimizer step.

    Computes what `sequential` computes, bit for bit with equal thread counts: no weight changes
    within a step, and BatchNorm's statistics are touched in the same order.
    """
    network = train_state.network
    lanes.backward.call(train_state.watch, network.model)
    while batches.left:
        scores = []
        output = lanes.forward.run("forward", network.forward, next(batches))
        for ahead in reversed(range(network.accumulate)):
            backward = lanes.backward.submit("backward", network.backward, output)
            del output
            if ahead:
                output = lanes.forward.run("forward", network.forward, next(batches))
            batches.prefetch()
            scores.append(backward.result())
        submit_update(lanes, train_state).result()
        yield scores


def delayed(lanes: Lanes, train_state: TrainState, batches: Batches) -> Steps:
    """As `overlap`, and across steps too: the forward lane is always one micro-batch ahead.

    PipeDream-2BW (arXiv 2006.09503): w(t+1) = w(t) - lr * gradient(w(t-1)). Two copies of the model
    take turns: while a step goes forward and back on one, the forward lane refreshes the other,
    whose own step has been applied, and begins the next step on it. The optimizer alone writes the
    model's weights, never beside the refresh; the forward lane alone writes the buffers. The
    pipeline is empty when the batches have run out: an epoch begins with the weights of today.
    """
    network, begun = train_state.network, train_state.end and train_state.end.weights
    model, other = (lanes.forward.call(network.copy, begun) for _ in range(2))
    lanes.backward.call(train_state.watch, model, other)
    output = lanes.forward.run("forward", network.forward, next(batches), model)
    while output:
        scores, error = [], None
        for left in reversed(range(network.accumulate)):
            backward = lanes.backward.submit("backward", network.backward, output)
            output = None
            if not left:
                end = lanes.forward.run("refresh", network.refresh, other) if batches.left else None
                update = submit_update(lanes, train_state, model, end, backward)
                model, other = other, model
            try:
                if batches.left:
                    output = lanes.forward.run("forward", network.forward, next(batches), model)
                batches.prefetch()
            except Exception as failure:
                if left:
                    raise
                error = failure  # of the next step: this one comes to its end
            scores.append(backward.result())
        update.result()
        yield scores
        if error:
            raise error


SCHEDULES = {"sequential": sequential, "overlap": overlap, "delayed": delayed}


def step_bound_s(schedule: str, times: PhaseTimes, accumulate: int) -> float:
    """The shortest step that two lanes allow, if neither slows the other down.

    `overlap` begins each step with a forward pass that nothing runs beside; `delayed` does so only
    once in a run, and is bound by the busier of the two lanes. What gradients of other ranks take
    after the last backward phase, the forward lane of `delayed` alone has something to do beside.
    """
    forward_s, backward_s, end_s = (
        times.forward_s,
        times.backward_s,
        times.reduce_s + times.update_s,
    )
    if schedule == "sequential":
        return accumulate * (forward_s + backward_s) + end_s
    if schedule == "overlap":
        beside_s = (accumulate - 1) * max(forward_s, backward_s)
        return forward_s + beside_s + backward_s + end_s
    forward_lane_s = accumulate * forward_s + times.refresh_s
    return max(forward_lane_s, accumulate * backward_s + end_s)
