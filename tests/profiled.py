"""Operators of profiled steps made by hand, shared by the tests of sums and of tables."""

from types import SimpleNamespace

from records import step

from split_affinity.training.operators import ENGINE, operator_times


def event(name, thread, start_ms, total_ms, parent=None, number=-1, forward_thread=0):
    """An operator of the profiler; its own time goes off that of its parent."""
    if parent:
        parent.self_cpu_time_total -= 1e3 * total_ms
    return SimpleNamespace(
        name=name,
        thread=thread,
        time_range=SimpleNamespace(start=1e3 * start_ms, end=1e3 * (start_ms + total_ms)),
        cpu_time_total=1e3 * total_ms,
        self_cpu_time_total=1e3 * total_ms,
        cpu_parent=parent,
        sequence_nr=number,
        fwd_thread=forward_thread,
    )


def made_up_times():
    """One step: forward on thread 1 for 100 ms, backward on thread 2 for 200, update for 50."""
    forward = event("phase measured/forward/forward", 1, 0, 99)
    conv = event("aten::conv2d", 1, 21, 40, forward, number=6)
    backward = event("phase measured/backward/backward", 2, 100, 199)
    engine = event(f"{ENGINE}ConvolutionBackward0", 2, 130, 60, backward, 6, forward_thread=1)
    events = [
        forward,
        event("aten::clone", 1, 1, 5, forward, number=5),  # before any layer
        event("layer/conv1", 1, 20, 0, forward),
        event("aten::clone", 1, 20.5, 0.5, forward, number=6),  # is asked no gradient
        conv,
        event("aten::copy_", 1, 25, 10, conv),
        event("layer/fc", 1, 65, 0, forward),
        event("aten::linear", 1, 66, 8, forward, number=7),
        backward,
        event("aten::topk", 2, 101, 4, backward, number=2),
        event(f"{ENGINE}NllLossBackward0", 2, 106, 3, backward, 2, forward_thread=2),
        event(f"{ENGINE}AddmmBackward0", 2, 110, 20, backward, 7, forward_thread=1),
        engine,
        event("aten::convolution_backward", 2, 131, 50, engine),
        event(f"{ENGINE}torch::autograd::AccumulateGrad", 2, 191, 6, backward),
        event("aten::add", 2, 299.5, 3),  # in no phase
        event("phase before/forward/forward", 1, 300, 50),
        event("aten::relu", 1, 301, 9),  # before what is measured
        event("phase measured/backward/update", 2, 310, 50),
    ]
    made = step(3, forward_s=0.1, backward_s=0.2)
    return operator_times(events, [made])
