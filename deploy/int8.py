"""A model in ONNX with 8-bit whole numbers in place of most floating-point ones: a quarter of the
size, and faster on CPUs that multiply such numbers natively.

Convolutional parts are quantised statically: the ranges of their activations are found beforehand,
with training images. Matrix products, of transformers and of classifiers' heads, are quantised
dynamically: each finds the range of its input when it runs, as that of tokens differs much from
image to image. Attention itself, LayerNorm, Softmax, GELU and class activation maps stay float.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from checkpoint import needed_packages

from split_affinity.errors import RunError
from split_affinity.files import read_text, write_whole

with needed_packages():
    import numpy as np
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
    from onnxruntime.quantization.shape_inference import quant_pre_process

IMAGES, MAPS = "images", "maps"
LAYERS = "Conv", "Gemm", "MatMul"
# What can go on with the whole numbers that a convolution makes.
STATIC = "Conv", "Relu", "Clip", "Add", "Concat", "MaxPool", "AveragePool", "Pad", "Slice"
AT_ONCE = 8  # images; of ResNet-50 at 224 pixels, 32 would take 8 GB
DYNAMIC = "MatMul"  # and Gemm, of which onnxruntime makes that and an addition

CPU_FLAGS = re.compile(r"^(?:flags|Features)[ \t]*:(.*)$", re.MULTILINE)
DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}


class Calibration(CalibrationDataReader):
    """Batches (n, 3, size, size) in the form that onnxruntime asks for, fetched one at a time, and
    handed on in small parts: nothing of a layer's memory is used again while ranges are found.
    """

    def __init__(self, batches: Iterable[np.ndarray]):
        self._parts = (
            batch[start : start + AT_ONCE]
            for batch in batches
            for start in range(0, len(batch), AT_ONCE)
        )
        self._count = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input of the model, None at the end. Raises RunError if there is none at all."""
        part = next(self._parts, None)
        if part is None and not self._count:
            raise RunError("int8: there are no images to calibrate with")
        self._count += 1
        return None if part is None else {IMAGES: part}


def saturates(flags: Collection[str]) -> bool:
    """Whether a CPU with these flags adds two products of 8-bit numbers in 16 bits, where they may
    not fit: x86 before VNNI (VPMADDUBSW). Arm's CPUs, whose flags are others, do not.
    """
    return "sse2" in flags and DOT_PRODUCTS.isdisjoint(flags)


def cpu_flags(root: Path = Path("/")) -> set[str]:
    """The flags of the machine's CPU; none where they are unknown."""
    found = CPU_FLAGS.search(read_text(root / "proc/cpuinfo"))
    return set(found[1].split()) if found else set()


def constants(model: onnx.ModelProto) -> set[str]:
    """The names of a model's weights."""
    return {each.name for each in model.graph.initializer}


def static_nodes(model: onnx.ModelProto) -> list[str]:
    """The nodes to quantise statically, by name: convolutions, but for that which makes the maps,
    and what works on their outputs alone. An addition of tokens, say, has other inputs: float.
    """
    weights, made, names = constants(model), set(), []
    for node in model.graph.node:
        inputs = {name for name in node.input if name} - weights
        wanted = node.op_type in STATIC and MAPS not in node.output
        if wanted and (node.op_type == "Conv" or (inputs and inputs <= made)):
            made.update(node.output)
            names.append(node.name)
    return names


def prepare(source: Path, folder: Path) -> Path:
    """A model with constants folded and the shapes of its tensors known, in a file of the folder.

    Shapes come from the exporter, which knows of the dynamic batch; symbolic inference, which would
    find them out, is not needed. Those of weights go: quantisation transposes some of them.
    """
    target = folder / "prepared.onnx"
    quant_pre_process(source, target, skip_symbolic_shape=True)
    model = onnx.load(target)
    weights = constants(model)
    shapes = [each for each in model.graph.value_info if each.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    onnx.save(model, target)
    return target


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said below an error: the quantiser recommends what is done already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def in_int8(source: Path, calibration: Iterable[np.ndarray], folder: Path) -> onnx.ModelProto:
    """A model in int8; files in the folder are made on the way.

    Weights are int8, each output channel with a scale of its own. Activations are uint8: on x86,
    the instructions multiply unsigned by signed, and with signed activations a ResNet-56 took three
    times as long. On CPUs that would saturate, weights have 7 bits. Ranges are means,
    over AT_ONCE images each, of the least and the largest value: rare outliers stretch them little.
    """
    weights = {
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "reduce_range": saturates(cpu_flags()),
    }
    dynamic, static = folder / "dynamic.onnx", folder / "static.onnx"
    quantize_dynamic(prepare(source, folder), dynamic, [DYNAMIC], **weights)
    names = static_nodes(onnx.load(dynamic))
    if not names:  # which onnxruntime would take for all
        return onnx.load(dynamic)
    quantize_static(
        dynamic,
        static,
        Calibration(calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(STATIC),
        nodes_to_quantize=names,
        activation_type=QuantType.QUInt8,
        extra_options={"CalibMovingAverage": True},
        **weights,
    )
    return onnx.load(static)


def quantize(source: Path, target: Path, calibration: Iterable[np.ndarray]) -> None:
    """Write `target`, the model of `source` in int8, with the same inputs, outputs and metadata,
    in one file. `calibration` are batches of training images (n, 3, size, size), float32, made
    ready as for validation. Raises RunError if there are none.
    """
    with quiet(), tempfile.TemporaryDirectory() as folder:
        model = in_int8(source, calibration, Path(folder))
    for node in model.graph.node:  # where the exporter left stack traces
        del node.metadata_props[:]
    facts = onnx.load(source).metadata_props
    onnx.helper.set_model_props(model, {each.key: each.value for each in facts})
    onnx.checker.check_model(model, full_check=True)
    write_whole(target, model.SerializeToString())


def scopes(source: onnx.ModelProto) -> dict[str, str]:
    """Where in the PyTorch model each tensor of an exported one was made, as the exporter says: in
    the innermost of the layers that it lists, before the operation.
    """
    return {
        name: ["", *re.findall(r"'([^']*)'", each.value)][-2]
        for node in source.graph.node
        for each in node.metadata_props
        for name in node.output
        if each.key.endswith(".name_scopes")
    }


def layer_name(node: onnx.NodeProto, scope: str) -> str:
    """What a layer is called in the PyTorch model: by its weight, or by where it stood; "model." is
    what the second output, of maps, has put before it.
    """
    weight, found, _ = node.input[1].rpartition(".weight")
    return (weight if found else scope or node.name).removeprefix("model.")


def quantized_layers(
    prepared: onnx.ModelProto, quantized: onnx.ModelProto
) -> dict[str, onnx.NodeProto]:
    """The float layers that were quantised, by the name that their output has in the quantised
    model: a convolution has that of the activation after it, if there is one (see `float_twin`).
    """
    convolutions = {node.name: node for node in quantized.graph.node if node.op_type == "Conv"}
    made = {name: node for node in quantized.graph.node for name in node.output}
    layers = {}
    for node in prepared.graph.node:
        now = convolutions.get(node.name) or made.get(node.output[0])
        if node.op_type in LAYERS and now is not None and now.input != node.input:
            layers[now.output[0]] = node
    return layers


def float_twin(node: onnx.NodeProto, renamed: Callable[[str], str], output: str) -> onnx.NodeProto:
    """A float node once more, with other names of inputs and output."""
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.name, twin.output[0] = f"{output}/node", output
    twin.input[:] = map(renamed, node.input)
    return twin


def with_twins(
    quantized: onnx.ModelProto, prepared: onnx.ModelProto, layers: dict[str, onnx.NodeProto]
) -> onnx.ModelProto:
    """The quantised model with, beside each layer, its float twin on the same input; its outputs
    are those of each layer and of its twin in turn.

    Quantisation takes ReLUs away, since whole numbers that know no negative ones do their work: on
    what twins get, they have to be done.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    graph, kept = model.graph, {node.name for node in quantized.graph.node}
    del graph.output[:], graph.value_info[:]
    for weight in prepared.graph.initializer:
        graph.initializer.add().CopyFrom(weight)
        graph.initializer[-1].name = f"{weight.name}/float"
    twins = {weight.name for weight in prepared.graph.initializer}
    for node in prepared.graph.node:
        if node.op_type in ("Relu", "Clip") and node.name not in kept:
            after = node.output[0]
            graph.node.append(float_twin(node, lambda name, own=after: own, f"{after}/float"))
            twins.add(after)
    for output, node in layers.items():
        pair = output, f"{output}/exact"
        renamed = lambda name: f"{name}/float" if name in twins else name  # noqa: E731
        graph.node.append(float_twin(node, renamed, pair[1]))
        graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in pair)
    return model


def relative_errors(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """For each pair of a model's outputs, how far the first is from the second, relative to it:
    root mean squares over images (n, 3, size, size), which are taken one at a time.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # of weights that no twin uses, nobody wants to know
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    noise = signal = 0.0
    for image in images:
        made = session.run(None, {IMAGES: image[None]})
        pairs = list(zip(made[::2], made[1::2], strict=True))
        noise = noise + np.array([np.square(int8 - exact).sum() for int8, exact in pairs])
        signal = signal + np.array([np.square(exact).sum() for _, exact in pairs])
    return np.sqrt(noise / np.maximum(signal, np.finfo(np.float32).tiny))


def worst_layers(
    source: Path, target: Path, images: np.ndarray, most: int = 5
) -> list[tuple[str, float]]:
    """The layers of a quantised model with the largest errors of their own, worst first, by their
    names in the PyTorch model. An error is how far a layer's output is from what float weights and
    a float input would have given, relative to that; the errors of layers before it are in both.

    A few images (n, 3, size, size) tell it.
    """
    with quiet(), tempfile.TemporaryDirectory() as folder:
        prepared = onnx.load(prepare(source, Path(folder)))
    quantized = onnx.load(target)
    layers = quantized_layers(prepared, quantized)
    if not layers:
        return []
    errors = relative_errors(with_twins(quantized, prepared, layers), images)
    where = scopes(onnx.load(source))
    names = (layer_name(node, where.get(node.output[0], "")) for node in layers.values())
    ranked = sorted(zip(names, errors.tolist(), strict=True), key=lambda each: -each[1])
    return ranked[:most]
