"""A page that says what a picture shows, by a model in ONNX; `python app.py` serves it.

All that it knows of classes, and of how pictures are made ready, stands in the model's file.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nobody is told of what is done here; read while the packages below are imported.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", ORT_DISABLE_TELEMETRY="1")
import gradio as gr
import numpy as np
import onnxruntime
import pictures
import threads
from PIL import Image

HERE = Path(__file__).resolve().parent
FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx"}
CSS = ".image-frame img { width: 100%; height: 100%; object-fit: contain; }"  # small ones as well
KEPT_S, CLEANED_EVERY_S = 60, 15  # uploads, which requests that wait in the queue still need


@dataclass(frozen=True)
class Demo:
    """Models by precision; the classes, and how pictures are made ready; what is asked of them."""

    models: dict[str, onnxruntime.InferenceSession]
    classes: list[str]
    ready: dict[str, Any]

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
            square = pictures.middle(pictures.open_picture(picture), self.ready)
        except pictures.Unusable as error:
            raise gr.Error(str(error), print_exception=False) from None
        read_ms = 1e3 * (time.perf_counter() - begin)
        shares, heat, took = self.answer(square, heat_map, of_class, precision)
        return shares, heat, f"{took}, {read_ms:.1f} ms to read the picture", square

    def answer(self, square: Image.Image | None, heat_map: bool, of_class: str, precision: str):
        """The same for a picture that was read before."""
        if square is None:
            return None, None, ""
        begin = time.perf_counter()
        images = pictures.to_input(square, self.ready)
        logits, *maps = self.models[precision].run(None, {"images": images})
        model_ms = 1e3 * (time.perf_counter() - begin)
        shares = np.exp(logits[0] - logits[0].max())
        shares /= shares.sum()
        number = self.classes.index(of_class) if of_class else shares.argmax()
        heat = pictures.heat_map(square, maps[0][0, number]) if heat_map and maps else None
        named = dict(zip(self.classes, shares.tolist(), strict=True))
        return named, heat, f"{model_ms:.1f} ms in the model ({precision})"


def open_demo(folder: Path) -> Demo:
    """The models that are in a folder, and what their files say of them."""
    options = onnxruntime.SessionOptions()
    cpus = threads.available_cpus()
    options.intra_op_num_threads = threads.allowed_threads(cpus, threads.quotas())
    found = {name: folder / file for name, file in FILES.items() if (folder / file).is_file()}
    models = {name: onnxruntime.InferenceSession(file, options) for name, file in found.items()}
    facts = models["fp32"].get_modelmeta().custom_metadata_map
    return Demo(models, json.loads(facts["classes"]), json.loads(facts["preprocessing"]))


def build_page(demo: Demo, title: str, card: str) -> gr.Blocks:
    """The page, with the model card, in Markdown, on a tab of its own."""
    gr.set_static_paths([HERE / "examples"])  # to stay, unlike what is uploaded
    with gr.Blocks(title=title, delete_cache=(CLEANED_EVERY_S, KEPT_S)) as page:
        gr.Markdown(f"# {title}")
        with gr.Tab("Try it"), gr.Row():
            build_form(demo)
        with gr.Tab("Model card"):
            gr.Markdown(card)
    return page


def build_form(demo: Demo) -> None:
    """Two columns, of what is asked and of the answer, and what happens when."""
    with gr.Column():
        picture = gr.Image(type="filepath", label="Picture", height=320, buttons=[])
        picture.preprocess = lambda sent: sent and sent.path  # the file as it is, not opened yet
        examples = gr.Examples(sorted(map(str, (HERE / "examples").iterdir())), picture)
        both = "int8" in demo.models
        precision = gr.Radio([*demo.models], value="fp32", label="Model", visible=both)
    with gr.Column():
        bars = gr.Label(num_top_classes=5, label="What it shows")
        took = gr.Markdown(label="Time")
        show = gr.Checkbox(label="Heat map", visible=demo.has_maps())
        with gr.Column(visible=False) as seen:
            choices = [("the likeliest", ""), *demo.classes]
            of_class = gr.Dropdown(choices, value="", label="Class of the heat map")
            heat = gr.Image(label="Heat map", interactive=False, buttons=["fullscreen"])
    square = gr.State(time_to_live=3600)
    options, told = [show, of_class, precision], [bars, heat, took]
    asked, kept = [picture, *options], [*told, square]
    in_turn = {"concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
    asking = picture.upload(demo.predict, asked, kept, api_name="predict", **in_turn)
    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    examples.load_input_event.success(demo.predict, asked, kept, **hidden, **in_turn)
    for event in (asking.failure, picture.clear):
        event(lambda: (None, None, "", None), None, kept, **hidden)
    show.change(lambda on: gr.Column(visible=on), show, seen, **hidden)
    gr.on(
        [each.input for each in options], demo.answer, [square, *options], told, **hidden, **in_turn
    )


def read_card(folder: Path) -> tuple[str, str]:
    """The page's title and the model card, from a README with a header, a heading and text."""
    _, _, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    heading, _, card = text.partition("\n## This page\n")[0].strip().partition("\n")
    return heading.removeprefix("# "), card


def main() -> None:
    """Serve the page until it is stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(open_demo(HERE), *read_card(HERE)).queue(max_size=256)
        theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        limits = {"max_file_size": "20mb", "state_session_capacity": 500}
        bare = {"footer_links": ["api"], "run_history": False, "ssr_mode": False}
        page.launch(theme=theme, css=CSS, **limits, **bare)


if __name__ == "__main__":
    main()
