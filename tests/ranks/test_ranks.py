"""Several ranks that train together. Run: python -m pytest tests/ranks/test_ranks.py

The ranks are processes that live as long as the tests here; each test sends them its work.
"""

import contextlib
import copy
import dataclasses
import datetime
import gc
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from kill import differing
from patching import set_everywhere
from places import SCRIPT
from small import as_loaded, needs_two_cpus, read_metrics, small_model
from torch import distributed, nn

import train_split_affinity as script
from split_affinity import ALLOWED_CPUS
from split_affinity.checkpoints.state import BadCheckpoint
from split_affinity.data.digits import write_digits
from split_affinity.data.loader import Batches
from split_affinity.data.samples import EpochOrder
from split_affinity.errors import RunError, Stopped, UserError
from split_affinity.lanes.audit import thread_ids
from split_affinity.lanes.lane import Lanes, confine_thread
from split_affinity.machine.plan import CorePlan, Group, this_host
from split_affinity.machine.topology import read_topology
from split_affinity.models.freezing import trainable_weights
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.settings import Settings, images_in_step, learning_rate
from split_affinity.ranks.launch import Launch, launched
from split_affinity.ranks.ranks import ONE_PROCESS, RankLost, SeveralRanks
from split_affinity.reports.tables import describe_run
from split_affinity.runs.measurement import MeasuringProcess, send_to_all
from split_affinity.runs.setup import check_same_images
from split_affinity.training.network import Network, interleave
from split_affinity.training.network import combine_scores as pool_scores
from split_affinity.training.optimizer import steps_in_epoch
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.steps import Diverged, run_schedule
from split_affinity.training.update import MovingAverage, TrainState, mean_rank_state

pytestmark = [needs_two_cpus, pytest.mark.alone]
ALL_SCHEDULES = pytest.mark.parametrize("schedule", list(SCHEDULES))


def obey(rank):
    """A rank's process: calls what it is sent, with the rank first.

    Gloo keeps a thread from its first process group on; it must have the mask of the rank's core.
    """
    confine_thread(one_core_plan(rank).loader_cpus)
    OWN_MODELS["small"] = small_model
    result = None
    while True:
        function, *args = yield [result]  # an exception by itself would be raised
        try:
            result = function(rank, *args)
        except Exception as error:
            result = error


class Crew:
    """Four processes; the first ones are the ranks."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.processes = [MeasuringProcess(lambda: None, obey, rank) for rank in range(4)]
        send_to_all(self.processes, None)

    def call(self, ranks, function, *args):
        """What the function returns on each of so many ranks, or the exception that it raises."""
        order = function, *args
        return [result for [result] in send_to_all(self.processes[:ranks], order)]

    def together(self, ranks, function, *args, timeout_s=60.0):
        """The same for a function that gets SeveralRanks first, each connected with all others."""
        self.count += 1
        store = str(self.folder / f"store {self.count}")
        return self.call(ranks, connected, ranks, store, timeout_s, function, *args)

    def main(self, ranks, folder, *options):
        """Exit code, output and errors of the program on each of so many ranks."""
        argv = [word for text in options for word in text.split()]
        return self.call(ranks, run_main, ranks, free_port(), folder, argv)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    crew = Crew(tmp_path_factory.mktemp("stores"))
    yield crew
    for process in crew.processes:
        process.close()


def connected(rank, size, store, timeout_s, function, *args):
    ranks = ONE_PROCESS
    if size > 1:
        store = distributed.FileStore(store, size)
        ranks = SeveralRanks(rank, size, store, timeout_s)
        ranks.hosts = ranks.gather_objects(this_host(read_topology()))
    try:
        return function(ranks, *args)
    finally:
        ranks.close(together=False)
        gc.collect()  # what still knows gloo would keep its threads


def run_main(rank, size, port, folder, argv):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = script.main(argv)
    gc.collect()
    return code, out.getvalue(), err.getvalue()


# What ranks tell each other


def tell(ranks):
    before = ranks.gather_objects(("before", ranks.rank)), ranks.on_rank_0(lambda: ranks.rank)
    ranks.start()
    after = ranks.gather_objects({"rank": ranks.rank}), ranks.on_rank_0(lambda: [ranks.rank])
    return before, after, ranks.gather_numbers([ranks.rank, 0.1])


def test_ranks_tell_each_other_what_they_have(crew):
    for told in crew.together(3, tell):
        before, after, numbers = told
        assert before == ([("before", 0), ("before", 1), ("before", 2)], 0)
        assert after == ([{"rank": 0}, {"rank": 1}, {"rank": 2}], [0])
        assert numbers == [[0.0, 0.1], [1.0, 0.1], [2.0, 0.1]]


def test_a_process_by_itself_tells_itself():
    ranks = ONE_PROCESS
    assert (ranks.gather_objects("x"), ranks.gather_numbers([1, 2])) == (["x"], [[1, 2]])
    assert ranks.on_rank_0(divmod, 7, 2) == (3, 1)
    with pytest.raises(KeyError), ranks.together():
        raise KeyError("ours")
    assert ranks.agreed


def fail_together(ranks, started, errors):
    if started:
        ranks.start()
    with ranks.together():
        if error := errors.get(ranks.rank):
            raise error
    return ranks.agreed


@pytest.mark.parametrize("started", [False, True])
def test_an_error_of_one_rank_is_one_of_all(started, crew):
    for errors, kind, text in (
        (
            {1: UserError("no data"), 2: RunError("later")},
            UserError,
            r"rank 1 on .*: no data",
        ),
        ({0: RunError("a disk")}, RunError, "a disk"),
        ({2: Stopped(signal.SIGTERM)}, Stopped, "stopped by SIGTERM"),
        ({0: Diverged("nan")}, Diverged, "nan"),
    ):
        for raised in crew.together(3, fail_together, started, errors):
            assert type(raised) is kind
            assert re.fullmatch(text, str(raised))
            assert raised.exit_code == errors[min(errors)].exit_code
    assert crew.together(2, fail_together, started, {}) == [False, False]


def test_an_error_that_nobody_foresaw_is_named_elsewhere(crew):
    told, own = crew.together(2, fail_together, True, {1: ZeroDivisionError("a bug")})
    assert isinstance(own, ZeroDivisionError), "with its traceback"
    reason = "an error that was not foreseen: ZeroDivisionError: a bug"
    assert re.fullmatch(rf"rank 1 on .*: {reason}", str(told))
    assert isinstance(told, RunError)


def test_what_only_the_first_rank_does_fails_on_all(crew):
    def check(raised):
        assert (type(raised), str(raised)) == (BadCheckpoint, "gone")

    list(map(check, crew.together(2, fail_first)))


def fail_first(ranks):
    def read():
        raise BadCheckpoint("gone")

    ranks.on_rank_0(read)


def keep_waiting(ranks):
    ranks.start()
    begun_s = time.perf_counter()
    if ranks.rank:
        time.sleep(3)
    ranks.gather_numbers([0.0])
    return time.perf_counter() - begun_s


def test_a_rank_that_does_not_answer_is_given_up(crew):
    first, second = crew.together(2, keep_waiting, timeout_s=1.0)
    assert re.fullmatch("rank 0 has lost another one: no answer within --timeout 1 s", str(first))
    assert re.fullmatch("rank 1 has lost another one: connection closed by peer .*", str(second))
    assert {type(first), type(second)} == {RankLost}
    assert first.exit_code == 1


def own_threads(ranks):
    """The threads that gloo has started, whether they are on the rank's core, and known to be."""
    with Lanes(one_core_plan(ranks.rank), ()) as lanes:
        before = set(thread_ids())
        lanes.backward.adopt(ranks.start)
        own = set(thread_ids()) - before
        cores = {frozenset(os.sched_getaffinity(thread)) for thread in own}
        born_for = lanes.backward._audit.born_for
        return len(own), cores, {born_for[thread].name for thread in own}


def test_gloo_s_threads_belong_to_the_backward_group(crew):
    for rank, (count, cores, groups) in enumerate(crew.together(2, own_threads)):
        assert count >= 2
        assert cores == {one_core_plan(rank).backward.cpu_set}
        assert groups == {"backward"}


# Numbers


def make_model():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def one_core_plan(rank):
    cpu = sorted(ALLOWED_CPUS)[rank % 2]
    groups = (Group(name, (cpu,), 1) for name in ("forward", "backward"))
    return CorePlan("even", *groups, (cpu,))


def train_part(ranks, schedule, accumulate, steps=10, bad=None, switches=()):
    """Losses of the micro-batches of each step in their order; weights, buffers, the phases."""
    torch.manual_seed(1)
    count = accumulate * ranks.size
    batches = [
        (torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))) for _ in range(count * steps)
    ]
    if bad is not None:
        batches[bad] = (math.nan * batches[bad][0], batches[bad][1])
    model = make_model()
    switches = dict(switches)
    if switches.pop("frozen", False):
        model[0].requires_grad_(False)
    network = Network(model, nn.CrossEntropyLoss(), accumulate, ranks=ranks.size)
    optimizer = torch.optim.SGD(trainable_weights(model).values(), lr=0.05, momentum=0.9)
    train_state = TrainState(network, optimizer, ranks=ranks, **switches)
    settings = Settings(schedule=schedule)
    own = batches[ranks.rank :: ranks.size]
    losses, phases, result = [], [], None
    with Lanes(one_core_plan(ranks.rank), ()) as lanes:
        if ranks.size > 1:
            lanes.backward.adopt(ranks.start)
        try:
            stream = Batches(as_loaded(own), len(own))
            for result in run_schedule(settings, lanes, train_state, stream):
                losses.append(result.loss)
                phases.append([record.phase for record in result.records])
        except Exception as error:
            result = error
    return losses, copy.deepcopy(model.state_dict()), phases, result


def first_losses(ranks, schedule, accumulate):
    """The losses of the first step's micro-batches, in the order in which they were dealt out."""
    found = []

    def combine_scores(scores):
        found.append([each.loss for each in scores])
        return pool_scores(scores)

    with pytest.MonkeyPatch.context() as patch:
        set_everywhere(patch, "combine_scores", combine_scores)
        train_part(ranks, schedule, accumulate, steps=1)
    return found[0]


@ALL_SCHEDULES
def test_the_same_training_whatever_the_number_of_ranks(schedule, crew):
    """Four micro-batches a step: on one rank, two of each of two, one of each of four."""
    [one] = crew.together(1, train_part, schedule, 4)
    [expected] = crew.together(1, first_losses, schedule, 4)
    for ranks in (2, 4):
        several = crew.together(ranks, train_part, schedule, 4 // ranks)
        assert crew.together(ranks, first_losses, schedule, 4 // ranks) == ranks * [expected]
        for losses, state, _, _ in several:
            assert losses == several[0][0]
            assert losses == pytest.approx(one[0], abs=1e-5)
            for name, weight in make_model().named_parameters():
                assert torch.equal(state[name], several[0][1][name]), "equal on all ranks"
                torch.testing.assert_close(state[name], one[1][name], rtol=0, atol=1e-5)
                assert not torch.equal(state[name], weight), "something was learnt"
        means = [state["1.running_mean"] for _, state, _, _ in several]
        assert not torch.equal(means[0], means[1]), "statistics are each rank's own"


@ALL_SCHEDULES
def test_a_step_over_ranks_has_a_reduce_phase_before_its_update(schedule, crew):
    for _, _, phases, _ in crew.together(2, train_part, schedule, 2, 2):
        for step in phases:
            assert step.index("reduce") + 1 == step.index("update") or schedule == "delayed"
            assert step.count("reduce") == step.count("update") == 1
    [(_, _, phases, _)] = crew.together(1, train_part, schedule, 2, 2)
    assert not any("reduce" in step for step in phases)


@pytest.mark.parametrize(
    "switches",
    [{"grads_to_none": False}, {"frozen": True}, {"clip_grad_norm": 0.1}],
    ids=lambda switches: next(iter(switches)),
)
@pytest.mark.parametrize("schedule", ["sequential", "delayed"])
def test_what_else_happens_to_gradients(schedule, switches, crew):
    [(_, expected, _, _)] = crew.together(1, train_part, schedule, 2, 10, None, switches)
    for _, state, _, _ in crew.together(2, train_part, schedule, 1, 10, None, switches):
        for name in dict(make_model().named_parameters()):
            torch.testing.assert_close(state[name], expected[name], rtol=0, atol=1e-5)


def watch_buckets(ranks, bucket_bytes):
    """How many buckets there are, and have set out when the backward phase ends."""
    set_everywhere(pytest.MonkeyPatch(), "BUCKET_BYTES", bucket_bytes)
    ranks.start()
    model = make_model()
    network = Network(model, nn.CrossEntropyLoss(), 2, ranks=2)
    train_state = TrainState(network, torch.optim.SGD(model.parameters(), lr=0.1), ranks=ranks)
    train_state.attach_reducer(model)
    underway = []
    for _ in range(2):
        batch = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
        network.backward(network.forward(batch))
        underway.append(train_state.reducer._sent)
    train_state.reduce()
    names = [list(bucket.parts) for bucket in train_state.reducer._buckets]
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    return underway, names, grads


def test_buckets_set_out_while_backpropagation_goes_on(crew):
    (underway, names, grads), (_, _, others) = crew.together(2, watch_buckets, 2000)
    assert underway == [0, len(names)], "none before the last micro-batch, all by its end"
    assert len(names) > 2
    weights = [name for bucket in names for name in bucket]
    assert weights == [name for name, _ in make_model().named_parameters()][::-1]
    for name, grad in grads.items():
        assert torch.equal(grad, others[name])
    [whole] = crew.together(2, watch_buckets, 25 * 2**20)[0][1]
    assert whole == weights


def unused(ranks):
    """A weight that no image needs keeps no gradient, and holds nobody up."""
    ranks.start()
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    network = Network(model, nn.CrossEntropyLoss(), ranks=2)
    train_state = TrainState(network, torch.optim.SGD(model.parameters(), lr=0.1), ranks=ranks)
    train_state.attach_reducer(model)
    (model["used"](torch.ones(1, 2)).sum() * (1 + ranks.rank)).backward()
    train_state.reduce()
    return model["unused"].weight.grad, model["used"].bias.grad.tolist()


def test_a_weight_without_a_gradient(crew):
    assert crew.together(2, unused) == 2 * [(None, [3.0, 3.0])]


@ALL_SCHEDULES
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_before_the_update(schedule, crew):
    """Of the third step, the second micro-batch of rank 1."""
    whole = crew.together(2, train_part, schedule, 2, 2)
    several = crew.together(2, train_part, schedule, 2, 5, 11)
    for (losses, state, _, error), (expected, weights, _, _) in zip(several, whole, strict=True):
        assert type(error) is Diverged
        assert re.fullmatch(r"rank 1 on .*: step 3: the loss is nan; try a lower --lr", str(error))
        assert losses == expected
        for name, _ in make_model().named_parameters():
            assert torch.equal(state[name], weights[name])


# The mean of what each rank has for itself


def average_buffers(ranks):
    ranks.start()
    model = make_model()
    model[1].running_mean.fill_(ranks.rank)
    network = Network(model, nn.CrossEntropyLoss(), ranks=ranks.size)
    average = MovingAverage(model, 0.9)
    average.values["1.running_var"].fill_(3.0 * ranks.rank)
    train_state = TrainState(
        network, torch.optim.SGD(model.parameters(), lr=0.1), average=average, ranks=ranks
    )
    with train_state.with_mean_buffers():
        inside = model[1].running_mean.tolist(), average.values["1.running_var"].tolist()
    return inside, model[1].running_mean.tolist(), average.values["1.running_var"].tolist()


def test_statistics_are_averaged_for_a_while(crew):
    for rank, (inside, mean, variance) in enumerate(crew.together(3, average_buffers)):
        assert inside == (8 * [1.0], 8 * [3.0])
        assert (mean, variance) == (8 * [float(rank)], 8 * [3.0 * rank])


def test_a_mean_leaves_equal_values_and_counts_as_they_are():
    value = torch.tensor([0.1, 1e-30, 3e30])
    parts = [{"buffers": {"x": value.clone(), "n": torch.tensor(7)}, "average": {}}] * 3
    mean = mean_rank_state(parts)
    assert torch.equal(mean["buffers"]["x"], value)
    assert mean["buffers"]["n"].item() == 7


def test_dealt_out_and_in_turn_again():
    assert interleave([[0, 3, 6], [1, 4], [2, 5]]) == [0, 1, 2, 3, 4, 5, 6]
    assert interleave([[], []]) == []
    for ranks in (1, 2, 3, 4):
        orders = [EpochOrder(range(30), 4, 1, (rank, ranks)) for rank in range(ranks)]
        whole = EpochOrder(range(30), 4, 1)
        for start, stop in ((0, None), (0, 4), (2, 6)):
            counts = [order.begin(3, start, stop) for order in orders]
            assert sum(counts) == whole.begin(3, start, stop)
            dealt = list(map(list, orders))
            assert list(map(len, dealt)) == counts
            assert interleave(dealt) == list(whole)


# Whole runs

TINY = "--model small --image-size 32 --num-classes 5 -j 0 --lr 0.05 --precision fp32"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "digits")


def state_of(path):
    return torch.load(path, weights_only=True)


def test_a_run_over_ranks(crew, digits, tmp_path):
    data = f"--data-path {digits} --subset 0.2 --model small --image-size 32 -b 8 -j 1 --lr 0.05"
    options = f"{data} --epochs 2 --accumulate 2 --output-dir out --model-ema"
    first, second = crew.main(2, tmp_path, options)
    assert (first[0], first[2], second) == (0, "", (0, "", "")), "the second one is silent"
    assert re.search(r"^  rank +0 +1$", first[1], re.MULTILINE)
    assert re.search(r"^rank 1 on \S+: forward cores", first[1], re.MULTILINE)
    assert re.search(r"^\| 1 \S+ +\| ", first[1], re.MULTILINE)
    log = (tmp_path / "logs.md").read_text()
    assert log.count("\n## ") == 1
    assert ", 2 ranks\n" in log
    assert re.search(r"<details><summary>rank 1 on \S+</summary>\n\n\| phase", log)
    assert re.search(r"\| rank, ms a step \| forward \| +backward \| +reduce \| .* waited \|", log)
    steps = read_metrics(tmp_path / "out", "step")
    assert [step["images"] for step in steps] == [32] * len(steps)
    assert all(min(step["waited_s"]) == 0.0 < step["reduce_s"] for step in steps)
    run, *_, summary = read_metrics(tmp_path / "out")
    assert [rank["host"] for rank in run["ranks"]] == 2 * [platform.node()]
    assert [each["steps"] for each in summary["ranks"]] == 2 * [len(steps)]
    assert all(each["stray_s"] == 0 for each in summary["ranks"])
    events = json.loads((tmp_path / "out/trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1}
    assert min(event["ts"] for event in spans) <= 0 < max(event["dur"] for event in spans)
    reduces = [[e for e in spans if e["pid"] == rank and e["name"] == "reduce"] for rank in (0, 1)]
    step_us = 1e6 * statistics.median(step["step_s"] for step in steps)
    for both in zip(*reduces, strict=True):
        begun_us = max(event["ts"] for event in both)
        ended_us = min(event["ts"] + event["dur"] for event in both)
        assert begun_us < ended_us + step_us, "by one clock, no rank has the sum before all begin"
    state = state_of(tmp_path / "out/last.pt")
    assert len(state["ranks"]) == 2
    own = [part["buffers"]["1.running_mean"] for part in state["ranks"]]
    torch.testing.assert_close(state["model"]["1.running_mean"], (own[0] + own[1]) / 2)
    assert not torch.equal(own[0], own[1])
    code, text, _ = crew.main(1, tmp_path, "--test-only --resume out/last.pt")[0]
    several = crew.main(2, tmp_path, "--test-only --resume out/last.pt")
    assert [each[0] for each in several] == [code, 0] == [0, 0]
    figures = re.compile(r"^360 images: loss .*|^raw, .*", re.MULTILINE)
    assert figures.findall(several[0][1]) == figures.findall(text) != []


@ALL_SCHEDULES
def test_a_resumed_run_is_exact(schedule, crew, tmp_path):
    """Stopped in the middle, with dropout, and a moving average."""
    options = f"{TINY} -b 4 --accumulate 2 --schedule {schedule} --model-ema"
    steps = "--steps 6 --save-steps 3 --lr-warmup-epochs 0 --resume auto"
    for folder in ("whole", "parts"):
        command = f"{options} {steps} --output-dir {folder}"
        assert [each[0] for each in crew.main(2, tmp_path, command)] == [0, 0]
        if folder == "whole":
            (tmp_path / "parts").mkdir()
            shutil.copy(tmp_path / "whole/previous.pt", tmp_path / "parts/last.pt")
    whole, parts = (state_of(tmp_path / folder / "last.pt") for folder in ("whole", "parts"))
    for part in ("model", "average", "optimizer", "scheduler", "ranks", "ahead"):
        assert not list(differing(whole[part], parts[part], part))
    masks = [part["random_state"] for part in whole["ranks"]]
    assert not torch.equal(masks[0], masks[1]), "dropout differs from rank to rank"


def test_another_number_of_ranks_goes_on_with_the_same_batches(crew, tmp_path):
    options = f"{TINY} -b 4 --output-dir out"
    assert crew.main(2, tmp_path, f"{options} --accumulate 2 --steps 3")[0][0] == 0
    [(code, text, _)] = crew.main(1, tmp_path, "--resume out/last.pt --steps 5")
    assert code == 0
    assert "ranks 2 -> 1 (BatchNorm starts from the mean of all ranks" in text
    assert [step["images"] for step in read_metrics(tmp_path / "out", "step")] == 5 * [16]
    assert state_of(tmp_path / "out/last.pt")["settings"]["accumulate"] == 4
    [(code, _, errors)] = crew.main(1, tmp_path, "--resume out/last.pt --steps 6 --accumulate 2")
    assert code == 2
    assert "--accumulate 2: out/last.pt has 4 batches a step; --init-from" in errors
    several = crew.main(4, tmp_path, "--resume out/last.pt --steps 6")
    assert [each[0] for each in several] == 4 * [2]
    assert "4 ranks on" in several[0][2]


def test_find_lr_over_ranks(crew, tmp_path):
    first, second = crew.main(2, tmp_path, f"find-lr {TINY} -b 4 --steps 4 --output-dir out")
    assert (first[0], second) == (0, (0, "", ""))
    assert len(re.findall(r"^lr .*: loss", first[1], re.MULTILINE)) == 4
    assert (tmp_path / "out/lr.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("predict x.png --resume y.pt", "predict answers in one process, on all cores"),
        ("compare --quick", "compare starts the ranks that it measures itself"),
        ("plan --ranks 3", "--ranks 3: 2 processes started; torchrun --nproc-per-node 3"),
        (f"{TINY} --data-path nowhere", "--data-path nowhere does not exist"),
        (f"{TINY} --resume no.pt --steps 1", "no.pt: no such checkpoint"),
        ("--batchsize 4", "unrecognized arguments: --batchsize 4"),
    ],
)
def test_what_ranks_refuse(options, message, crew, tmp_path):
    first, second = crew.main(2, tmp_path, options)
    assert (first[0], second[0], second[1:]) == (2, 2, ("", "")), "said once on a machine"
    assert message in first[2]
    assert first[2].count("\n") == 1
    assert not list(tmp_path.iterdir())


def run_own(rank, size, port, folder, words):
    return run_main(rank, size, port, folder, words[rank].split())


def test_options_that_differ_from_rank_to_rank(crew, digits, tmp_path):
    """But for what is a machine's own, such as where the data are."""
    shutil.copytree(digits, tmp_path / "copy")
    same = f"--model small --image-size 32 -b 8 -j 0 --subset 0.05 --steps 1 --data-path {digits}"
    words = [f"{same} --lr 0.1", f"{same} --lr 0.2"]
    first, second = crew.call(2, run_own, 2, free_port(), tmp_path, words)
    assert (first[0], second[0], second[2]) == (2, 2, "")
    assert first[2].endswith("error: rank 1 was given --lr 0.2, rank 0 --lr 0.1\n")
    words = [f"{same} --lr 0.1", f"{same} --lr 0.1 --schedule delayed"]
    first, _ = crew.call(2, run_own, 2, free_port(), tmp_path, words)
    assert "rank 1 was given --schedule delayed, rank 0 no --schedule" in first[2]
    words = [f"{same} --lr 0.1", f"{same} --lr 0.1 -j 1 --data-path {tmp_path}/copy"]
    several = crew.call(2, run_own, 2, free_port(), tmp_path, words)
    assert [each[0] for each in several] == [0, 0]


def other_torch(ranks):
    real = this_host

    def other_host(topology):
        return dataclasses.replace(real(topology), torch_version=f"2.{ranks.rank}")

    with pytest.MonkeyPatch.context() as patch:
        set_everywhere(patch, "this_host", other_host)
        ranks.meet(read_topology())


def test_ranks_need_the_same_torch(crew):
    for raised in crew.together(2, other_torch):
        assert type(raised) is UserError
        assert re.fullmatch(r"rank 1 on \S+ has torch 2\.1, rank 0 has 2\.0: .*", str(raised))


def send_signal(rank, delay_s, signum):
    threading.Timer(delay_s, os.kill, (os.getpid(), signum)).start()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(crew, tmp_path):
    send_to_all(crew.processes[1:2], (send_signal, 3.0, signal.SIGTERM))
    options = f"{TINY} -b 4 --steps 1000000 --print-freq 1000000 --output-dir out"
    first, second = crew.main(2, tmp_path, options)
    assert (first[0], second[0]) == (143, 143)
    assert first[2].endswith("train_split_affinity.py: stopped by SIGTERM\n")
    assert second[2] == ""
    state = state_of(tmp_path / "out/last.pt")
    assert state["progress"]["step"] == len(read_metrics(tmp_path / "out", "step")) > 0
    assert len(state["ranks"]) == 2


def test_broken_images_of_all_ranks_count_together(crew, digits, tmp_path):
    data = tmp_path / "data"
    write_digits(data)
    for number in (1, 2):
        for path in sorted(data.glob(f"train/{number}/*.png"))[:3]:
            path.write_bytes(b"no picture")
    options = f"--data-path {data} --model small --image-size 32 -b 16 -j 0 --lr 0.05 --epochs 1"
    first, second = crew.main(2, tmp_path, f"{options} --output-dir out --max-bad-images 5")
    assert (first[0], second[0], second[2]) == (1, 1, "")
    assert re.search(
        r"broken image .*\(more than --max-bad-images 5\); .* --max-bad-images 50", first[2]
    )
    state = state_of(tmp_path / "out/last.pt")
    assert 0 < len(state["progress"]["bad_images"]) <= 6
    many = crew.main(2, tmp_path, f"{options} --output-dir all --max-bad-images 6")
    assert [each[0] for each in many] == [0, 0]
    assert len(state_of(tmp_path / "all/last.pt")["progress"]["bad_images"]) == 6
    assert many[0][2].count("broken image") == 6
    assert many[1][2] == ""


def run_apart(rank, folder, argv):
    """The weights of the second rank are touched in the midst of the run."""
    update = TrainState.update

    def touched(train_state, *args):
        update(train_state, *args)
        if rank:
            with torch.no_grad():
                next(train_state.network.model.parameters()).mul_(1 + 1e-7)

    TrainState.update = touched
    try:
        return run_main(rank, *argv)
    finally:
        TrainState.update = update


def test_weights_that_come_apart_end_the_run(crew, tmp_path):
    argv = f"{TINY} -b 4 --steps 3 --output-dir out".split()
    several = crew.call(2, run_apart, tmp_path, (2, free_port(), tmp_path, argv))
    for code, _, _ in several:
        assert code == 1
    reason = r"the weights of rank 1 on \S+ are not those of rank 0 after step 3"
    assert re.search(reason, several[0][2])
    assert not (tmp_path / "out/last.pt").exists()


# Launchers


def test_what_a_launcher_says():
    said = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "box", "MASTER_PORT": "29500"}
    assert launched(said) == Launch(3, 8, 0)
    assert launched(said | {"LOCAL_RANK": "1"}) == Launch(3, 8, 1)
    for name in said:
        others = {key: value for key, value in said.items() if key != name}
        assert launched(others) == Launch(0, 1, 0), "something else has set these"
    assert launched(said | {"WORLD_SIZE": "many"}) == Launch(0, 1, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [("RANK", "²"), ("RANK", "٣"), ("RANK", "8"), ("RANK", "-1"), ("RANK", "1" * 5000)]
    + [("WORLD_SIZE", "0"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "²"), ("LOCAL_RANK", "x")],
)
def test_what_no_launcher_says(name, text):
    said = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "box", "MASTER_PORT": "29500"}
    assert launched(said | {name: text}) == Launch(0, 1, 0)


def test_all_images_of_a_step_count():
    settings = Settings(batch_size=32, accumulate=2, ranks=4)
    assert images_in_step(settings) == 256
    assert learning_rate(settings) == 0.1
    assert steps_in_epoch(settings, 17) == 2
    assert "4 ranks with 2 batches of 32 images" in describe_run(
        dataclasses.replace(settings, image_size=32)
    )


def test_drawing_ranks_that_are_not_there(in_tmp, capsys):
    assert script.main(["plan", "--ranks", "2", "--split", "none"]) == 0
    printed = capsys.readouterr().out
    cpus = sorted(ALLOWED_CPUS)
    if len(cpus) == 2:
        assert re.search(r"^  rank +0 +1$", printed, re.MULTILINE)
    assert re.search(rf"^rank 0 on this machine: all cores {cpus[0]}", printed, re.MULTILINE)
    assert script.main(["plan", "--ranks", str(len(cpus) + 1)]) == 2
    assert f"{len(cpus) + 1} ranks on this machine: more than its" in capsys.readouterr().err
    assert script.main(["--ranks", "2", "--steps", "1"]) == 2
    reason = "--ranks 2: 1 process started; torchrun --nproc-per-node 2 starts so many\n"
    assert capsys.readouterr().err.endswith(reason)


def test_wrong_arguments_are_said_once_on_a_machine(in_tmp):
    said = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--batchsize", "4"],
            env=said | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert texts[0].count("\n") == 1
    assert texts[1] == ""


def torchrun(folder, *options):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2".split()
    with (folder / "printed.txt").open("w") as printed:
        return subprocess.Popen(
            [sys.executable, *launcher, SCRIPT, *options],
            cwd=folder,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )


def wait_for(text, folder):
    printed = folder / "printed.txt"
    end_s = time.perf_counter() + 300  # a busy machine starts ranks slowly
    while text not in printed.read_text():
        assert time.perf_counter() < end_s, printed.read_text()
        time.sleep(0.02)


def test_killed_ranks_come_back_and_the_run_ends_as_if_they_had_not(crew, tmp_path):
    """Under torchrun --max-restarts, by --resume auto; and the other says what has happened."""
    options = "--model resnet20 --image-size 32 --num-classes 5 -j 0 --lr 0.05 --precision fp32"
    options += " -b 8 --steps 40 --save-steps 1 --print-freq 1 --resume auto --output-dir"
    process = torchrun(tmp_path, *options.split(), "out")
    for victim, step in ((1, 10), (0, 25)):
        wait_for(f"step {step}/40", tmp_path)
        ranks = psutil.Process(process.pid).children()
        chosen = [rank for rank in ranks if rank.environ()["RANK"] == str(victim)]
        chosen[0].kill()
    assert process.wait(300) == 0
    printed = (tmp_path / "printed.txt").read_text()
    for victim in (0, 1):
        other = (
            f"train_split_affinity.py: error: rank {1 - victim} has lost another one: connection"
        )
        assert printed.count(other) == 1
    assert printed.count("resumed from out/last.pt, after step ") == 2
    assert "gloo" not in printed
    assert [each[0] for each in crew.main(2, tmp_path, f"{options} whole")] == [0, 0]
    states = [state_of(tmp_path / folder / "last.pt") for folder in ("out", "whole")]
    for part in ("model", "optimizer", "ranks"):
        assert not list(differing(*(state[part] for state in states), part))


def test_ranks_find_those_started_with_them_whatever_earlier_ones_left_in_the_store():
    store = distributed.HashStore()

    def start(rank):
        ranks = SeveralRanks(rank, 2, store, timeout_s=20)
        ranks.begin()
        return ranks.gather_objects(os.urandom(4))

    for _ in range(3):
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(start, 0)
            time.sleep(0.1)  # it meets the name that is left there first
            second = threads.submit(start, 1)
            assert first.result() == second.result()
        store.set("here/1", "one that was killed before it could answer")


def test_a_rank_that_does_not_come_is_not_waited_for_without_end():
    store = distributed.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.2))
    for _ in range(2):
        with pytest.raises(RankLost, match=r"no answer within --timeout 0\.2 s"):
            SeveralRanks(0, 2, store, timeout_s=0.2).begin()
        store.set("here/1", "one that was killed before it could answer")


def hand_in(ranks):
    check_same_images(ranks, f"images {ranks.rank // 2}")


def test_ranks_with_other_images_are_refused(crew):
    assert crew.together(2, hand_in) == [None, None]
    for error in crew.together(3, hand_in):
        assert isinstance(error, UserError)
        assert re.match(r"the images of rank 2 on \S+ are not those of rank 0", str(error))


def hand_in_weights(ranks):
    check_same_images(ranks, "images", [1.0, 2.0 - ranks.rank])


def test_ranks_with_other_class_weights_are_refused(crew):
    for error in crew.together(2, hand_in_weights):
        assert isinstance(error, UserError)
        expected = r"the --class-weights of rank 1 on \S+ are not those of rank 0"
        assert re.match(expected, str(error))
