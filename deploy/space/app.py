"""A page that says what a picture shows, by a model in ONNX; `python app.py` serves it.

All that it knows of classes, and of how pictures are made ready, stands in the model's file.
"""

from __future__ import annotations

import html
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Nobody is told of what is done here; read while the packages below are imported.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", ORT_DISABLE_TELEMETRY="1")
try:
    import gradio as gr
    import pictures
    import uploads
    from answers import Demo, open_demo
    from starlette.middleware import Middleware
except (ImportError, MemoryError, OSError) as error:  # nothing of the trainer is here to explain it
    is_full = not isinstance(error, ImportError) or "map segment" in str(error)
    names = (".venv", "requirements.txt", "app.py")
    venv, needed, program = (shlex.quote(str(HERE / name)) for name in names)
    own = f"the page has packages of its own: python3 -m venv {venv} && {venv}/bin/pip install -r "
    own += f"{needed} && {venv}/bin/python {program}"
    remedy = "raise `ulimit -v`" if is_full else own
    print(f"app.py: error: {str(error) or 'no memory'}: {remedy}", file=sys.stderr)
    raise SystemExit(2) from None

EXAMPLES = HERE / "examples"  # there may be none
MOST_BARS, MOST_NAMES = 5, 12  # classes: in the answer, and named on the page without unfolding
KEPT_S, CLEANED_EVERY_S = 60, 15  # uploads, which requests that wait in the queue still need
AT_ONCE, WAITING = 4, 64  # requests: one that takes long does not stop the others


async def fetch_nothing(*_: object, **__: object) -> str:
    """In place of Gradio's download of an address that a request names in place of an upload."""
    raise gr.Error("Nothing is fetched from elsewhere.", print_exception=False)


def build_page(demo: Demo, title: str, card: str) -> gr.Blocks:
    """The page, with the model card, in Markdown, on a tab of its own."""
    gr.set_static_paths([EXAMPLES])  # to stay, unlike what is uploaded
    gr.processing_utils.async_ssrf_protected_download = fetch_nothing
    with gr.Blocks(title=title, delete_cache=(CLEANED_EVERY_S, KEPT_S)) as page:
        gr.Markdown(f"# {title}")
        with gr.Tab("Try it"), gr.Row(elem_classes="columns"):
            build_form(demo)
        with gr.Tab("Model card"):
            gr.Markdown(card, elem_classes="card")
    return page


def known_classes(classes: Sequence[str]) -> str:
    """The names of all classes, as HTML; of many the first, and the others to unfold."""
    seen = ("".join(c if c.isprintable() else "\ufffd" for c in name) for name in classes)
    items = [f"<li><bdi>{html.escape(name)}</bdi></li>" for name in seen]
    first, more = "".join(items[:MOST_NAMES]), "".join(items[MOST_NAMES:])
    text = f"It tells {len(items)} classes apart:<ul>{first}</ul>"
    if more:
        rest = len(items) - MOST_NAMES
        text += f"<details><summary>and {rest} more</summary><ul>{more}</ul></details>"
    return f"<div class='known'>{text}</div>"


def heat_scale() -> str:
    """What the colours of a heat map say, as HTML."""
    colours = f"linear-gradient(90deg, {', '.join(pictures.SCALE)})"
    scale = f"nothing <i style='background: {colours}'></i> the most of this picture"
    return f"<div class='scale'>What speaks for the class: <span>{scale}</span></div>"


def build_form(demo: Demo) -> None:
    """Two columns, of what is asked and of the answer, and what happens when."""
    with gr.Column():
        look = {"height": 320, "elem_classes": "picture", "buttons": []}
        picture = gr.Image(type="filepath", label="Picture", **look)
        picture.preprocess = lambda sent: sent and sent.path  # not looked at yet
        with gr.Column(elem_classes="later"):
            gr.HTML(known_classes(demo.classes))
            files = sorted(map(str, EXAMPLES.glob("*")))
            examples = gr.Examples(files, picture) if files else None
            both = "int8" in demo.models
            precision = gr.Radio([*demo.models], value="fp32", label="Model", visible=both)
    with gr.Column():
        count = min(MOST_BARS, len(demo.classes))
        bars = gr.Label(num_top_classes=count, label="What it shows")
        took = gr.Markdown(label="Time")
        show = gr.Checkbox(label="Heat map", visible=demo.has_maps())
        with gr.Column(visible=False) as seen:
            choices = [("the likeliest", ""), *demo.classes]
            of_class = gr.Dropdown(choices, value="", label="Class of the heat map")
            heat = gr.Image(label="Heat map", interactive=False, buttons=["fullscreen"])
            gr.HTML(heat_scale())
    square = gr.State(time_to_live=3600)
    options, told = [show, of_class, precision], [bars, heat, took]
    asked, kept = [picture, *options], [*told, square]
    in_turn = {"concurrency_limit": AT_ONCE, "concurrency_id": "all", "trigger_mode": "always_last"}
    asking = picture.upload(demo.predict, asked, kept, api_name="predict", **in_turn)
    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    if examples:
        examples.load_input_event.success(demo.predict, asked, kept, **hidden, **in_turn)
    for event in (asking.failure, picture.clear):
        event(lambda: (None, None, "", None), None, kept, **hidden)
    show.change(lambda on: gr.Column(visible=on), show, seen, **hidden)
    gr.on(
        [each.input for each in options], demo.answer, [square, *options], told, **hidden, **in_turn
    )


def read_card(folder: Path) -> tuple[str, str]:
    """The page's title and the model card, from a README with a header, a heading and text."""
    text = (folder / "README.md").read_text(encoding="utf-8").partition("\n---\n")[2]
    heading, _, card = text.partition("\n## This page\n")[0].strip().partition("\n")
    return heading.removeprefix("# "), card


def main() -> None:
    """Serve the page until it is stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        demo = open_demo(HERE, (Path(folder), EXAMPLES))
        page = build_page(demo, *read_card(HERE)).queue(max_size=WAITING, api_open=False)
        theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        limits = {"max_file_size": uploads.LARGEST_BYTES, "state_session_capacity": 500}
        bare = {"footer_links": ["api"], "run_history": False, "ssr_mode": False}
        alone = {"app_kwargs": {"middleware": [Middleware(uploads.NothingFromElsewhere)]}}
        page.launch(theme=theme, css_paths=HERE / "page.css", **limits, **bare, **alone)


if __name__ == "__main__":
    main()
