"""The kinds of files that a model is exported to, and what writes each of them. No file tells where
on the machine it was made: PyTorch's exporters put the paths of sources into all graphs.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoint as cp
import feature_maps
import onnx
import safetensors.torch
import torch

BATCH = {0: torch.export.Dim("batch", min=1, max=2**16)}  # any number of images at once
LAYER_NAMES = "pkg.torch.onnx.name_scopes"  # what int8.py names layers by


def write_onnx(checkpoint: cp.Checkpoint, path: Path) -> None:
    """Write the model as ONNX, by the dynamo exporter: one file, with a second output of class
    activation maps where the head allows it, checked by ONNX's own checker.
    """
    head = feature_maps.find_linear_head(checkpoint)
    model = feature_maps.WithMaps(checkpoint.model, head).eval() if head else checkpoint.model
    exported = torch.onnx.export(
        model,
        (feature_maps.zero_images(checkpoint, 2),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits", "maps"] if head else ["logits"],
        dynamic_shapes=(BATCH,),
        verbose=False,
    )
    proto = exported.model_proto  # made anew whenever it is asked for
    for node in proto.graph.node:  # where in whose files the exporter was called, say
        kept = [each for each in node.metadata_props if each.key == LAYER_NAMES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.helper.set_model_props(proto, cp.describe(checkpoint))
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)


def write_pt2(checkpoint: cp.Checkpoint, path: Path) -> None:
    """Write the model as torch.export has it: PyTorch runs it without the model's code."""
    images = feature_maps.zero_images(checkpoint, 2)
    exported = torch.export.export(checkpoint.model, (images,), dynamic_shapes=(BATCH,))
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(exported, path, extra_files=cp.describe(checkpoint))


def write_torchscript(checkpoint: cp.Checkpoint, path: Path) -> None:
    """Write the model as TorchScript, traced, for programs that cannot read anything newer."""
    with torch.no_grad():
        traced = torch.jit.trace(checkpoint.model, feature_maps.zero_images(checkpoint, 2))
    whole = path.with_suffix(".whole")
    traced.save(whole, _extra_files=cp.describe(checkpoint))
    with zipfile.ZipFile(whole) as made, zipfile.ZipFile(path, "w") as kept:
        for name in made.namelist():
            if not name.endswith(".debug_pkl"):  # which line of whose files an operator is from
                kept.writestr(name, made.read(name))
    whole.unlink()


def write_weights(checkpoint: cp.Checkpoint, path: Path) -> None:
    """Write the weights and buffers alone."""
    weights = {name: each.contiguous() for name, each in checkpoint.model.state_dict().items()}
    # Its own save_file makes files that only their owner can read.
    path.write_bytes(safetensors.torch.save(weights, cp.describe(checkpoint)))


@dataclass(frozen=True)
class Format:
    """A kind of file: its name, what writes it, what is to be said of it."""

    file: str
    write: Callable[[cp.Checkpoint, Path], None]
    about: str


FORMATS = {
    "onnx": Format("model.onnx", write_onnx, "onnxruntime, without PyTorch"),
    "pt2": Format("model.pt2", write_pt2, "PyTorch, by torch.export.load"),
    "torchscript": Format(
        "model_cpu.pt", write_torchscript, "PyTorch, by torch.jit.load; deprecated since torch 2.11"
    ),
    "weights": Format(
        "model.safetensors", write_weights, "weights alone, for a model of the same name"
    ),
}
INT8_FILE, INT8_ABOUT = "model.int8.onnx", "onnxruntime, quantised to 8 bits"  # of int8.py
