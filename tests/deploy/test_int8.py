"""Models in int8: deploy/int8.py. Run: python -m pytest tests/deploy/test_int8.py"""

from __future__ import annotations

from collections import Counter

import checkpoint as cp
import formats
import int8
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from split_affinity.errors import RunError

RESNET, HYBRID, HARD_SWISH = "resnet20", "hybrid-light", "mobilenet_v3_small"


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """Gives a model's checkpoint, its ONNX file, its file in int8, validation images; each once."""
    known = {}

    def write(model: str):
        if model not in known:
            folder = tmp_path_factory.mktemp("int8")
            checkpoint = cp.read_checkpoint(trained(model))
            data = cp.open_images(checkpoint)
            source, target = folder / "model.onnx", folder / "int8.onnx"
            formats.write_onnx(checkpoint, source)
            int8.quantize(source, target, batches(checkpoint, data.train, 48))
            images = np.concatenate(list(batches(checkpoint, data.val, 64)))
            known[model] = checkpoint, source, target, images
        return known[model]

    return write


def batches(checkpoint, pictures, count):
    """The first pictures of a data set, 16 at a time."""
    for images, _ in cp.batches(checkpoint, pictures, range(count), 16):
        yield images.numpy()


def outputs(path, images):
    """All outputs of a file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


def distance(found, wanted) -> float:
    """How far arrays are apart, relative to the second."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("model", [RESNET, HYBRID, HARD_SWISH])
def test_answers_stay_near_those_in_float(written, model):
    _, source, target, images = written(model)
    for found, wanted in zip(outputs(target, images), outputs(source, images), strict=True):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        assert distance(found, wanted) < 0.15
        assert not np.array_equal(found, wanted)


def test_inputs_outputs_and_metadata_are_those_of_the_source(written):
    _, source, target, images = written(RESNET)
    before, after = onnx.load(source), onnx.load(target)
    onnx.checker.check_model(after, full_check=True)
    for place in ("input", "output"):
        names = [[each.name for each in getattr(m.graph, place)] for m in (before, after)]
        assert names[0] == names[1]
    facts = [{each.key: each.value for each in m.metadata_props} for m in (before, after)]
    assert facts[0] == facts[1] and "classes" in facts[0]
    assert sorted(each.name for each in target.parent.iterdir()) == ["int8.onnx", "model.onnx"]
    for count in (1, 5):  # the dynamic batch
        assert outputs(target, images[:count])[0].shape == (count, 10)


def test_weights_take_a_quarter_of_the_room(written):
    _, source, target, _ = written(HARD_SWISH)
    assert target.stat().st_size < 0.3 * source.stat().st_size


def test_convolutions_are_static_and_matrix_products_dynamic(written):
    _, source, target, _ = written(HYBRID)
    graph = onnx.load(target).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    inputs = {made[n.input[0]] for n in graph.node if n.op_type == "Conv"}
    assert inputs == {"DequantizeLinear"}
    kinds, before = (
        Counter(node.op_type for node in g.node) for g in (graph, onnx.load(source).graph)
    )
    assert kinds["MatMulInteger"] >= before["Gemm"]
    for name in ("LayerNormalization", "Softmax", "Gelu"):
        assert kinds[name] == before[name] > 0
        float_inputs = (made[n.input[0]] for n in graph.node if n.op_type == name)
        assert "DequantizeLinear" not in float_inputs


def test_maps_are_computed_in_float(written):
    _, _, target, _ = written(RESNET)
    graph = onnx.load(target).graph
    node = next(node for node in graph.node if "maps" in node.output)
    weights = {each.name: each.data_type for each in graph.initializer}
    assert weights[node.input[1]] == onnx.TensorProto.FLOAT


def test_each_output_channel_has_a_scale_of_its_own(written):
    _, _, target, _ = written(RESNET)
    graph = onnx.load(target).graph
    made = {name: node for node in graph.node for name in node.output}
    sizes = {each.name: each.dims for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv" and "maps" not in node.output:
            weight, scale, *_ = made[node.input[1]].input
            assert list(sizes[scale]) == [sizes[weight][0]]


def test_calibration_reads_one_batch_at_a_time(written, tmp_path):
    _, source, _, images = written(RESNET)
    alive = []

    def read():
        for start in range(0, 64, 16):
            alive.append(start)
            yield images[start : start + 16]
            assert alive == [start]
            alive.clear()

    int8.quantize(source, tmp_path / "int8.onnx", read())
    assert not alive


def test_without_images_nothing_is_written(written, tmp_path):
    _, source, _, _ = written(RESNET)
    with pytest.raises(RunError, match="calibrate"):
        int8.quantize(source, tmp_path / "int8.onnx", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("fpu sse2 avx2 avx512bw", True),
        ("sse2 avx2 avx_vnni", False),
        ("sse2 avx512bw avx512_vnni", False),
        ("fp asimd asimddp i8mm", False),
        ("", False),
    ],
)
def test_where_sums_of_products_saturate(flags, expected):
    assert int8.saturates(flags.split()) is expected


@pytest.mark.parametrize(
    "text, flags",
    [
        ("flags\t\t: sse2 avx\nflags : x\n", {"sse2", "avx"}),
        ("Features\t: asimd i8mm\n", {"asimd", "i8mm"}),
        ("", set()),
    ],
)
def test_flags_come_from_the_system(tmp_path, text, flags):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor : 0\n{text}")
    assert int8.cpu_flags(tmp_path) == flags


def test_weights_have_seven_bits_where_sums_would_saturate(written, tmp_path, monkeypatch):
    _, source, eight, images = written(RESNET)
    monkeypatch.setattr(int8, "cpu_flags", lambda: {"sse2", "avx2"})
    seven = tmp_path / "int8.onnx"
    int8.quantize(source, seven, [images])
    largest = {}
    for path in (eight, seven):
        arrays = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
        largest[path] = max(np.abs(a.astype(int)).max() for a in arrays if a.dtype == np.int8)
    assert largest[eight] == 127 and largest[seven] == 64


def test_the_layer_with_a_damaged_weight_is_the_worst(written, tmp_path):
    _, source, target, images = written(RESNET)
    model = onnx.load(target)
    wanted = "stage2.1.conv2"
    scale = next(w for w in model.graph.initializer if w.name == f"model.{wanted}.weight_scale")
    halved = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) / 2, scale.name)
    scale.CopyFrom(halved)
    damaged = tmp_path / "damaged.onnx"
    onnx.save(model, damaged)
    sound = int8.worst_layers(source, target, images[:4])
    assert len(sound) == 5 and all(0 < error < 0.05 for _, error in sound)
    (name, error), *_, last = int8.worst_layers(source, damaged, images[:4], most=100)
    assert name == wanted
    assert error == pytest.approx(0.5, abs=0.25)
    assert last[1] < 0.05


@pytest.mark.parametrize("model", [RESNET, HYBRID, HARD_SWISH])
def test_layers_have_the_names_that_pytorch_has_for_them(written, model):
    checkpoint, source, target, images = written(model)
    layers = int8.worst_layers(source, target, images[:2], most=10**6)
    known = dict(checkpoint.model.named_modules())
    named = {name for name, layer in known.items() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    found = [name for name, _ in layers]
    assert len(set(found)) == len(found)
    # Attention has its weights in one tensor, which belongs to no layer.
    assert named <= set(found)
    assert [error for _, error in layers] == sorted((e for _, e in layers), reverse=True)


def test_errors_are_those_of_a_layer_alone(tmp_path):
    """A matrix product, quantised dynamically: what NumPy makes of the same numbers."""
    torch.manual_seed(0)
    model = nn.Linear(32, 10).eval()
    source, target = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    torch.onnx.export(
        model, (torch.zeros(2, 32),), source, dynamo=True, input_names=["images"], verbose=False,
        output_names=["logits"], external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )  # fmt: skip
    images = torch.randn(1, 32).numpy()
    int8.quantize(source, target, [images])
    weight = model.weight.detach().numpy().T
    scale = np.abs(weight).max(0) / 127
    rounded = np.round(weight / scale) * scale
    low, high = min(images.min(), 0), max(images.max(), 0)
    step = (high - low) / 255
    zero = np.round(-low / step)
    seen = (np.clip(np.round(images / step) + zero, 0, 255) - zero) * step
    bias = model.bias.detach().numpy()
    wanted = distance(seen @ rounded + bias, images @ weight + bias)
    ((_, error),) = int8.worst_layers(source, target, images)
    assert error == pytest.approx(wanted, rel=0.05)
