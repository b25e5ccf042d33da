"""Write a checkpoint's model into files that run without its training script.

    python deploy/export.py out/digits/best.pt --output-dir exported

Every file is loaded again and compared with the checkpoint's model on real images before it is
kept, and has in it how pictures are made ready and what the classes are called.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoint as cp
import feature_maps
from checkpoint import tsa

with cp.needed_packages():
    import numpy as np
    import onnx
    import onnxruntime
    import torch

LARGEST_DIFFERENCE = 1e-3  # of logits, relative to the largest of them
COMPARED_IMAGES = 64
ONNX_FILE = "model.onnx"
IMAGES, LOGITS, MAPS = "images", "logits", "maps"  # names of the input and the outputs


@dataclass(frozen=True)
class Sample:
    """Validation images that every file is compared on: `images` (n, 3, size, size), made ready,
    and the model's own `logits` (n, classes) of them.
    """

    images: torch.Tensor
    logits: torch.Tensor


def sample_images(checkpoint: cp.Checkpoint, data: tsa.ImageData, batch_size: int) -> Sample:
    """Validation images, spread evenly over all of them, and the logits of the model."""
    step = max(1, len(data.val) // COMPARED_IMAGES)
    chosen = range(0, len(data.val), step)[:COMPARED_IMAGES]
    images = torch.cat([each for each, _ in cp.batches(checkpoint, data.val, chosen, batch_size)])
    with torch.inference_mode():
        logits = torch.cat([checkpoint.model(each) for each in images.split(batch_size)])
    return Sample(images, logits)


def compare_logits(what: str, logits: torch.Tensor, sample: Sample) -> str:
    """In words how far a file's logits are from the model's. Raises RunError if that is more than
    rounding: another top-1, or a difference of a thousandth of the largest logit.
    """
    scale = sample.logits.abs().max().item() or 1.0
    difference = (logits - sample.logits).abs().max().item() / scale
    count = len(logits)
    same = int((logits.argmax(1) == sample.logits.argmax(1)).sum())
    text = (
        f"{what}: top-1 of {same} of {tsa.plural(count, 'image')} equal, "
        f"largest difference {difference:.1e} of the largest logit"
    )
    if not difference <= LARGEST_DIFFERENCE or same < count:
        raise tsa.RunError(f"{text}: not the model that was trained; nothing is kept")
    return text


def write_onnx(checkpoint: cp.Checkpoint, path: Path) -> None:
    """Write the model as ONNX, by the dynamo exporter, for any number of images at once: one file,
    with a second output of class activation maps where the head allows it.
    """
    head = feature_maps.find_linear_head(checkpoint)
    model = feature_maps.WithMaps(checkpoint.model, head).eval() if head else checkpoint.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making
        exported = torch.onnx.export(
            model,
            (feature_maps.zero_images(checkpoint, 2),),
            dynamo=True,
            input_names=[IMAGES],
            output_names=[LOGITS, MAPS] if head else [LOGITS],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2**16)},),
            verbose=False,
        )
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, cp.describe(checkpoint))
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)


def onnx_logits(path: Path, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """What an ONNX file makes of images (n, 3, size, size): logits (n, classes)."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    made = (session.run([LOGITS], {IMAGES: each.numpy()}) for each in images.split(batch_size))
    return torch.from_numpy(np.concatenate(list(itertools.chain.from_iterable(made))))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cp.common_parser(__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="for the files"
    )
    return parser


@cp.program
def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint."""
    asked = build_parser().parse_args(argv)
    checkpoint = cp.read_checkpoint(asked.checkpoint)
    data = cp.open_images(checkpoint, asked.data_path)
    cp.use_allowed_cores()
    sample = sample_images(checkpoint, data, asked.batch_size)
    with tempfile.TemporaryDirectory(dir=asked.output_dir.parent) as folder:
        staged = Path(folder, ONNX_FILE)
        write_onnx(checkpoint, staged)
        tsa.say(compare_logits(ONNX_FILE, onnx_logits(staged, sample.images, 32), sample))
        asked.output_dir.mkdir(parents=True, exist_ok=True)
        shutil.move(staged, asked.output_dir / ONNX_FILE)


if __name__ == "__main__":
    raise SystemExit(main())
