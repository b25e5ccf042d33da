"""What the models of the page make of a picture."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import onnxruntime
import pictures
import threads
import uploads
from PIL import Image

FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx"}


@dataclass(frozen=True)
class Demo:
    """Models by precision, which compute one at a time; the classes, and how pictures are made
    ready; the folders that pictures may be in; what is asked of them.
    """

    models: dict[str, onnxruntime.InferenceSession]
    classes: list[str]
    ready: dict[str, Any]
    folders: Sequence[Path]
    turn: threading.Lock = field(default_factory=threading.Lock)

    def has_maps(self) -> bool:
        """Whether the models say where they see a class, beside how likely it is."""
        return all(len(model.get_outputs()) > 1 for model in self.models.values())

    def predict(self, picture: str | None, heat_map=False, of_class="", precision="fp32"):
        """What a picture shows: its classes with their probabilities; if a heat map is asked for,
        a picture of where a class is seen (the likeliest if none is named); how long that took.
        """
        if picture is None:
            return None, None, "", None
        begin = time.perf_counter()
        try:
            file = uploads.read_upload(picture, self.folders)
            square = pictures.middle(pictures.open_picture(file, self.ready), self.ready)
        except pictures.Unusable as error:
            raise gr.Error(str(error), print_exception=False) from None
        read_ms = 1e3 * (time.perf_counter() - begin)
        shares, heat, took = self.answer(square, heat_map, of_class, precision)
        return shares, heat, f"{took}, {read_ms:.1f} ms to read the picture", square

    def answer(self, square: Image.Image | None, heat_map: bool, of_class: str, precision: str):
        """The same for a picture that was read before."""
        if square is None:
            return None, None, ""
        images = pictures.to_input(square, self.ready)
        with self.turn:
            begin = time.perf_counter()
            logits, *maps = self.models[precision].run(None, {"images": images})
            model_ms = 1e3 * (time.perf_counter() - begin)
        shares = np.exp(logits[0] - logits[0].max())
        shares /= shares.sum()
        number = self.classes.index(of_class) if of_class else shares.argmax()
        heat = pictures.heat_map(square, maps[0][0, number]) if heat_map and maps else None
        named = dict(zip(self.classes, shares.tolist(), strict=True))
        return named, heat, f"{model_ms:.1f} ms in the model ({precision})"


def open_demo(folder: Path, places: Sequence[Path]) -> Demo:
    """The models that are in a folder, and what their files say of them, for pictures that are in
    one of the places.
    """
    options = onnxruntime.SessionOptions()
    cpus = threads.available_cpus()
    options.intra_op_num_threads = threads.allowed_threads(cpus, threads.quotas())
    found = {name: folder / file for name, file in FILES.items() if (folder / file).is_file()}
    models = {name: onnxruntime.InferenceSession(file, options) for name, file in found.items()}
    facts = models["fp32"].get_modelmeta().custom_metadata_map
    classes, ready = json.loads(facts["classes"]), json.loads(facts["preprocessing"])
    ready["full_decode"] = json.loads(facts.get("full_decode", "true"))  # of an earlier version
    return Demo(models, classes, ready, places)
