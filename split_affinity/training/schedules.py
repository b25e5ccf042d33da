"""Schedules: how an optimizer step is laid over the two lanes.

To add one, enter it in SCHEDULES, in step_bound_s, and in the choices of `--schedule`
(options/settings.py). Three places ask for `delayed` by name: the memory of its copies
(models/cost.py), the weights with which it has begun a step (checkpoints/state.py), and compare's
verdict.

A schedule is a generator. Each `next` runs one step and yields the scores of its micro-batches,
until the batches run out. All share the same phase functions, hold at most two micro-batches of
activations, and read data only while no forward pass runs (see Batches.prefetch).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

from torch import nn

from split_affinity.data.loader import Batches
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import PhaseTimes
from split_affinity.training.network import Scores, StepEnd
from split_affinity.training.update import TrainState

Steps = Iterator[list[Scores]]


def submit_update(
    lanes: Lanes,
    train_state: TrainState,
    copied: nn.Module | None = None,
    begun: StepEnd | None = None,
    after: Future | None = None,
) -> Future:
    """Queue TrainState.update on the backward lane, with several ranks after a reduce phase."""
    if train_state.reducer:
        after = lanes.backward.submit("reduce", train_state.reduce, copied, after)
    return lanes.backward.submit("update", train_state.update, copied, begun, after)


def sequential(lanes: Lanes, train_state: TrainState, batches: Batches) -> Steps:
    """Forward, then backward, strictly alternating: one group works while the other waits.

    The next batch is fetched during backward, since the loader runs on the forward group.
    """
    network = train_state.network
    lanes.backward.call(train_state.attach_reducer, network.model)
    while batches.left:
        scores = []
        for _ in range(network.accumulate):
            output = lanes.forward.run("forward", network.forward, next(batches))
            backward = lanes.backward.submit("backward", network.backward, output)
            del output  # so that the graph is freed with the backward phase
            batches.prefetch()
            scores.append(backward.result())
        submit_update(lanes, train_state).result()
        yield scores


def overlap(lanes: Lanes, train_state: TrainState, batches: Batches) -> Steps:
    """Forward of micro-batch k+1 beside backward of micro-batch k, inside one optimizer step.

    Computes what `sequential` computes, bit for bit with equal thread counts: no weight changes
    within a step, and BatchNorm's statistics are updated in the same order.
    """
    network = train_state.network
    lanes.backward.call(train_state.attach_reducer, network.model)
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
    take turns. While a step runs on one copy, the forward lane refreshes the other, whose own step
    has been applied, and begins the next step on it. Only the optimizer writes the model's weights,
    never during a refresh; only the forward lane writes the buffers. Each epoch begins with the
    weights of today, since the pipeline has run empty.
    """
    network, begun = train_state.network, train_state.end and train_state.end.weights
    model, other = (lanes.forward.call(network.copy, begun) for _ in range(2))
    lanes.backward.call(train_state.attach_reducer, model, other)
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
                error = failure  # of the next step: first finish this one
            scores.append(backward.result())
        update.result()
        yield scores
        if error:
            raise error


SCHEDULES = {"sequential": sequential, "overlap": overlap, "delayed": delayed}


def step_bound_s(schedule: str, times: PhaseTimes, accumulate: int) -> float:
    """The shortest step that two lanes allow if neither slows the other down.

    `overlap` begins each step with a forward pass that nothing runs beside. `delayed` does so only
    once in a run, and is bound by the busier lane: its forward lane alone has work to do while the
    gradients of other ranks arrive.
    """
    forward_s, backward_s = times.forward_s, times.backward_s
    end_s = times.reduce_s + times.update_s
    if schedule == "sequential":
        return accumulate * (forward_s + backward_s) + end_s
    if schedule == "overlap":
        beside_s = (accumulate - 1) * max(forward_s, backward_s)
        return forward_s + beside_s + backward_s + end_s
    if schedule != "delayed":
        raise ValueError(f"no bound is known for {schedule}")
    forward_lane_s = accumulate * forward_s + times.refresh_s
    return max(forward_lane_s, accumulate * backward_s + end_s)
