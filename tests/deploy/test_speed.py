"""Ways to run a model, side by side: deploy/speed.py.

Run: python -m pytest tests/deploy/test_speed.py
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import threading

import checkpoint as cp
import formats
import int8
import loading
import numpy as np
import onnx
import pytest
import speed
import torch
from sklearn.metrics import accuracy_score
from speed import BF16, EAGER, INT8, ONNX, Comparison, Measured, Turns

from split_affinity.lanes.contention import Contention
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings


@pytest.fixture(scope="module")
def files(best, tmp_path_factory):
    """A ResNet-20's checkpoint, its data, its ONNX file, and that in int8."""
    folder = tmp_path_factory.mktemp("speed")
    checkpoint = cp.read_checkpoint(best)
    data = cp.open_images(checkpoint)
    source, target = folder / "model.onnx", folder / "int8.onnx"
    formats.write_onnx(checkpoint, source)
    images = [each.numpy() for each, _ in cp.batches(checkpoint, data.train, range(64), 32)]
    int8.quantize(source, target, images)
    return checkpoint, data, source, target


class Nobody:
    """Sees that others take nothing, or in each round what it is told."""

    def __init__(self, *_):
        self.looks, self.shares = 0, []

    def look(self, least_s):
        """What others took since the latest look: every second look ends a round."""
        self.looks += 1
        place = self.looks // 2 - 1
        share = self.shares[place] if 0 <= place < len(self.shares) else 0.0
        return Contention(0, 1, {"all": share}, 0.0)


def hurry(patch):
    """Turns of one call, in two rounds, which are too short to see whom others disturb."""
    patch.setattr(speed, "TURN_S", 1e-9)
    patch.setattr(speed, "ROUNDS", 2)
    patch.setattr(speed, "ContentionMonitor", Nobody)


@pytest.fixture
def hurried(monkeypatch):
    """Little time goes into measuring."""
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def found(files):
    """A comparison of all ways but the compiled one."""
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        return speed.compare(*files, 50)


def true_and_images(checkpoint, data):
    """The classes of all validation images, and the images."""
    read = list(cp.batches(checkpoint, data.val, range(len(data.val)), 64))
    classes = np.array(cp.true_classes(data.val))
    return classes[torch.cat([n for _, n in read])], torch.cat([images for images, _ in read])


def test_accuracy_is_that_of_all_validation_images(files, found):
    checkpoint, data, *_ = files
    classes, images = true_and_images(checkpoint, data)
    with torch.inference_mode():
        wanted = 100 * accuracy_score(classes, checkpoint.model(images).argmax(1))
    assert found.images == len(classes)
    assert found.top1(EAGER) == found.top1(ONNX) == pytest.approx(wanted)
    assert [way.name for way in found.ways] == [EAGER, BF16, ONNX, INT8]
    for name in (BF16, INT8):
        assert found.top1(name) == pytest.approx(wanted, abs=3)


def test_figures_are_plain_and_complete(files, found):
    _, _, source, target = files
    figures = json.loads(json.dumps(found.figures()))
    assert figures == found.figures()
    sizes = {name: way["size_bytes"] for name, way in figures["ways"].items()}
    assert sizes[ONNX] == source.stat().st_size and sizes[INT8] == target.stat().st_size
    floats = sum(p.numel() for p in files[0].model.parameters())
    assert 4 * floats < sizes[EAGER] < 4.5 * floats
    for way in figures["ways"].values():
        for key in ("batch_1", "batch_32"):
            turns = way[key]
            assert turns["images_per_s_range"][0] <= turns["images_per_s"]
            assert turns["images_per_s"] <= turns["images_per_s_range"][1]
            assert 0 < turns["latency_ms"] <= turns["latency_p95_ms"]
    assert figures["ways"][EAGER]["batch_32"]["to_eager"] == 1
    assert figures["threads"] == torch.get_num_threads()


def test_text_has_a_line_for_each_way(found):
    text = found.text()
    for name in (EAGER, BF16, ONNX, INT8):
        assert sum(line.startswith(f"| {name} ") for line in text.splitlines()) == 2
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 100
    assert "360 validation images" in text and "2 rounds" in text


def test_more_than_a_point_lost_names_the_worst_layers(files, hurried, monkeypatch):
    monkeypatch.setattr(speed, "LOST_POINTS", -100)
    found = speed.compare(*files, 64)
    images = speed.first_images(*files[:2])[: speed.LOOKED_AT].numpy()
    wanted = int8.worst_layers(*files[2:], images)
    assert [name for name, _ in found.worst] == [name for name, _ in wanted]
    for name, _ in wanted:
        assert name in found.text()


def made_up(right: dict[str, int]) -> Comparison:
    """A comparison with so many of 200 images right."""
    turns = Turns((10.0,), (1.0,), (100.0,))
    ways = [Measured(name, 1, count, {1: turns, 32: turns}) for name, count in right.items()]
    return Comparison(tuple(ways), 200, 2, (0, 1), "a CPU", worst=(("layer4.2.conv3", 0.125),))


@pytest.mark.parametrize("right, warned", [(188, False), (187, True), (192, False)])
def test_loss_is_counted_against_onnx_in_float(right, warned):
    found = made_up({EAGER: 150, ONNX: 190, INT8: right})
    assert found.lost_points == pytest.approx((190 - right) / 2)
    assert ("layer4.2.conv3 (12.5%)" in found.text()) is warned


def test_ratios_are_taken_within_a_round():
    rounds = [[[2.0, 2.0], [1.0]], [[1.0], [0.25, 0.25]], [[4.0], [4.0]]]
    slow, fast = speed.turns_of(rounds, 8)
    assert slow.images_per_s == (4, 8, 2) and fast.images_per_s == (8, 32, 2)
    assert slow.to_eager == (1, 1, 1) and fast.to_eager == (2, 4, 1)
    assert fast.calls_ms == (1000, 250, 250, 4000)
    figures = fast.figures()
    assert figures["to_eager"] == 2 and figures["to_eager_range"] == [1, 4]
    assert figures["images_per_s"] == 8 and figures["images_per_s_range"] == [2, 32]


def test_latencies_are_quantiles_of_all_calls():
    calls_ms = tuple(float(ms) for ms in range(1, 102))
    figures = Turns((1.0,), (1.0,), calls_ms).figures()
    assert figures["latency_ms"] == statistics.median(calls_ms)
    assert figures["latency_p95_ms"] == pytest.approx(np.percentile(calls_ms, 95))


def test_ways_take_turns_and_the_first_call_is_left_out(monkeypatch):
    clock_s, order = [0.0], []

    def way(name, call_s):
        def run(images):
            clock_s[0] += call_s if order and order[-1] == name else 100
            order.append(name)

        return speed.Way(name, 1, run)

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock_s[0])
    turns = speed.time_ways([way("a", 0.5), way("b", 0.75)], torch.zeros(4, 3, 2, 2), Nobody())
    assert order == [*"aaabbb"] * speed.ROUNDS
    assert turns[0].images_per_s == (8,) * speed.ROUNDS
    assert turns[1].to_eager == pytest.approx((2 / 3,) * speed.ROUNDS)


def test_disturbed_rounds_are_repeated_and_those_disturbed_least_count(monkeypatch):
    monkeypatch.setattr(speed, "TURN_S", 1e-9)
    clock_s = [0.0]

    def run(images):
        clock_s[0] += 1 + seen.looks // 2  # each round takes another second

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock_s[0])
    for shares, used, disturbed in (
        ([0.9, 0.0, 0.05, 0.5], [2, 3, 5, 6, 7], 0),
        ([0.9, 0.2, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [2, 5, 6, 7, 8], 5),
    ):
        seen = Nobody()
        seen.shares = shares
        (turns,) = speed.time_ways([speed.Way("a", 1, run)], torch.zeros(1, 3, 2, 2), seen)
        assert turns.images_per_s == pytest.approx([1 / each for each in used])
        assert len(turns.disturbed) == disturbed


@pytest.mark.parametrize("disturbed", range(6))
def test_there_is_no_ratio_without_enough_undisturbed_rounds(disturbed):
    texts = ("other processes took 85 % of all cores",) * disturbed
    eager, fast = (Turns((x,) * 5, (r,) * 5, (1.0,), texts) for x, r in ((2.0, 1.0), (52.6, 26.32)))
    ways = [Measured(name, 1, 9, {1: turns}) for name, turns in ((EAGER, eager), (ONNX, fast))]
    found = Comparison(tuple(ways), 9, 2, (0, 1), "a CPU")
    assert ("26.32" in found.text()) == ("26.32" in str(found.figures())) == (disturbed < 3)
    assert ("no verdict on speed; 3 undisturbed rounds are needed" in found.text()) == (
        disturbed > 2
    )
    assert (f"{disturbed} of 5 rounds were disturbed" in found.text()) == (disturbed > 0)
    marked = re.findall(r"^\| disturbed rounds .*$", found.text(), re.MULTILINE)
    assert [line.count(f" {disturbed} of 5 ") for line in marked] == [2, 1] * (disturbed > 0)


def test_what_others_disturb_is_no_ratio_in_the_text(files, hurried, monkeypatch):
    class Somebody(Nobody):
        def look(self, least_s):
            return Contention(0, 1, {"all": 0.6}, 0.0)

    monkeypatch.setattr(speed, "ContentionMonitor", Somebody, raising=False)
    text = speed.compare(*files[:3], None, 64).text()
    assert "other processes took 60 % of all cores" in text
    assert "no ratio, and no verdict" in text
    assert not re.search(r"\| +1\.00 \|", text)


def test_others_are_seen(monkeypatch):
    """Processes that compute on all cores meanwhile."""
    monkeypatch.setattr(speed, "TURN_S", 0.5)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "MOST_REPEATS", 0)
    plan, online = plan_cores(read_topology(), Settings(split="none")), read_topology().online
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in plan.forward.cpus]
    try:
        with speed.kept_on(plan.forward.cpus):
            monitor = speed.ContentionMonitor(plan, online)
            way = speed.Way("a", 1, lambda images: images.sum())
            (turns,) = speed.time_ways([way], torch.zeros(1, 3, 8, 8), monitor)
    finally:
        for each in others:
            each.kill()
            each.wait()
    assert len(turns.disturbed) == 1 and not turns.is_judged


def test_where_affinity_is_refused_threads_stay_where_they_are(monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refused)
    with speed.kept_on([0]):
        assert os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_getaffinity", refused)
    with speed.kept_on([0]):
        pass


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_all_threads_are_kept_on_the_cores_and_let_go():
    before, first = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    begun, ended = threading.Event(), threading.Event()
    older = threading.Thread(target=lambda: (begun.set(), ended.wait()))
    older.start()
    begun.wait()
    inside = []
    with speed.kept_on([first]):
        younger = threading.Thread(target=lambda: inside.append(os.sched_getaffinity(0)))
        younger.start()
        younger.join()
        masks = [os.sched_getaffinity(thread) for thread in (0, older.native_id)]
    after = [os.sched_getaffinity(thread) for thread in (0, older.native_id)]
    ended.set()
    older.join()
    assert masks == [{first}] * 2 and inside == [{first}]
    assert after == [before] * 2


def test_maps_are_not_computed_where_logits_are_timed(files):
    _, _, source, target = files
    images = speed.first_images(*files[:2])
    for path in (source, target):
        session = speed.session_without_maps(path, 1)
        assert [output.name for output in session.get_outputs()] == ["logits"]
        assert "maps" in [output.name for output in onnx.load(path).graph.output]
        logits = speed.onnx_way("any", path, 1).run(images)
        assert np.allclose(logits, loading.load_onnx(path)(images.numpy()), atol=1e-4)


def test_few_images_are_timed_more_than_once(files, monkeypatch):
    checkpoint, data, *_ = files
    images = speed.first_images(checkpoint, data)
    monkeypatch.setattr(speed, "MANY", 8)
    assert torch.equal(speed.first_images(checkpoint, data), images[:8])
    few = torch.utils.data.Subset(data.val, range(3))
    short = type("Data", (), {"val": few})
    assert torch.equal(speed.first_images(checkpoint, short), images[[0, 1, 2, 0, 1, 2, 0, 1]])


def test_bf16_leaves_the_model_as_it_was(files):
    model, images = files[0].model, speed.first_images(*files[:2])
    weight = next(each for each in model.parameters() if each.ndim == 4)
    before = speed.eager(model)(images)
    logits = speed.in_bf16(model)(images)
    assert logits.dtype == np.float32 and weight.is_contiguous()
    assert np.allclose(logits, before, atol=0.1 * np.abs(before).max())
    assert not np.array_equal(logits, before)


def test_compiled_models_see_only_lengths_that_they_were_compiled_for(files, monkeypatch):
    model, images = files[0].model, speed.first_images(*files[:2])
    lengths = []

    def compile_(model, **options):
        return lambda batch: (lengths.append(len(batch)), model(batch))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    run = speed.compiled_run(model, [images[:1], images[:8]])
    for count in (1, 5, 8, 20):
        made, wanted = run(images[:count]), speed.eager(model)(images[:count])
        assert np.allclose(made, wanted, atol=1e-4)
    assert set(lengths) == {1, 8}


def test_without_a_compiler_or_int8_a_way_is_left_out(files, hurried, monkeypatch):
    def compile_(*_, **__):
        raise RuntimeError("No working C++ compiler found in\n$CXX")

    monkeypatch.setattr(torch, "compile", compile_)
    found = speed.compare(*files[:3], None, 64, compiled=True)
    assert [way.name for way in found.ways] == [EAGER, BF16, ONNX]
    (line,) = (line for line in found.text().splitlines() if "left out" in line)
    assert "torch.compile" in line and "No working C++ compiler" in line
    assert found.lost_points == 0 and "int8" not in found.text()
