"""Load an exported file as those who get it do, in a process that has seen nothing of the training:

    python deploy/loading.py pt2 exported/model.pt2 images.npy logits.npy

writes the logits (n, classes) that the file has for images (n, 3, size, size) made ready. Of these
loaders only the one of plain weights needs the trainer, since those are no model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]  # images (n, 3, size, size) to logits (n, classes)


def load_onnx(path: Path) -> Run:
    """An ONNX file in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def load_pt2(path: Path) -> Run:
    """A file of torch.export."""
    import torch

    return in_torch(torch.export.load(path).module())


def load_torchscript(path: Path) -> Run:
    """A file of TorchScript."""
    import torch

    return in_torch(torch.jit.load(path, map_location="cpu"))


def load_weights(path: Path) -> Run:
    """Plain weights, in a model that the trainer builds as the file says."""
    import checkpoint  # noqa: F401  (which finds the package of the trainer)
    import safetensors

    from split_affinity.models.registry import build_model
    from split_affinity.models.weights import versioned

    with safetensors.safe_open(path, framework="pt") as file:
        facts = {name: json.loads(text) for name, text in file.metadata().items()}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    size = facts["preprocessing"]["image_size"]
    model = build_model(facts["model"], len(facts["classes"]), size)
    model.load_state_dict(versioned(weights, model))
    return in_torch(model.eval())


def in_torch(model: Callable) -> Run:
    """What a model of PyTorch makes of arrays."""
    import torch

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return run


LOADERS = {
    "onnx": load_onnx,
    "pt2": load_pt2,
    "torchscript": load_torchscript,
    "weights": load_weights,
}


def main(kind: str, path: str, images: str, logits: str) -> None:
    """Load a file of one of the LOADERS' kinds, and have it answer some images, one by one first,
    to see that their number is free.
    """
    given = np.load(images)
    run = LOADERS[kind](Path(path))
    made = [run(given[:1]), run(given[1:])] if len(given) > 1 else [run(given)]
    np.save(logits, np.concatenate(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
