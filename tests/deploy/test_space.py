"""The demo page, as its visitors and programs meet it: served from its folder by a process of its
own, without a network. Run: python -m pytest tests/deploy/test_space.py
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import app
import checkpoint as cp
import demo
import formats
import heat_maps
import numpy as np
import onnx
import onnxruntime
import pictures
import pytest
import threads
import uploads
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from scipy.special import softmax

from split_affinity.data.decoding import picture_reader
from split_affinity.data.pictures import PICTURE_FORMATS
from split_affinity.data.transforms import validation_transform
from split_affinity.models.pretrained import Preprocessing
from split_affinity.reports import page as report_page
from train_split_affinity import main

BROWSERS = "chromium", "chromium-browser", "google-chrome"
START = [sys.executable, "app.py"]
QUICKLY = "import app; app.KEPT_S, app.CLEANED_EVERY_S = 5, 1; app.main()"
SMALL_PHONE_PX = 667  # of a window's height
READY = {"image_size": 32, "val_resize": 40, "interpolation": "bilinear"}
WIDE_TABLE = "\n".join(
    (
        f"| {8 * 'uncommonly '}way |{7 * ' images/s |'}",
        f"| :-- |{7 * ' --: |'}",
        f"| PyTorch |{7 * ' 148-162 |'}",
    )
)
CLASS_WITH_HTML = "<img src=x onerror=alert(1)> & co"


@dataclass(frozen=True)
class Server:
    """A page that is served: its address, its folder, what it prints, and where uploads lie."""

    url: str
    folder: Path
    log: Path
    uploads: Path

    def files(self) -> list[Path]:
        """What of visitors' pictures is on the disk."""
        return [path for path in self.uploads.rglob("*") if path.is_file()]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_until_served(url: str, process: subprocess.Popen, log: Path) -> None:
    """Wait for a page; fails with what was printed if the program ends instead."""
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(url).close()
        except OSError:
            time.sleep(0.05)
    pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Serves a folder with a page, with a proxy for whatever is not here that does not exist, until
    the tests are done. Whatever they have uploaded is gone then.
    """
    running = []

    def start(folder: Path, command=START) -> Server:
        work = tmp_path_factory.mktemp("served")
        url = f"http://127.0.0.1:{free_port()}"
        server = Server(url, folder, work / "log", work / "uploads")
        nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
        here = {"no_proxy": "127.0.0.1,localhost", "GRADIO_SERVER_PORT": url.rpartition(":")[2]}
        environment = os.environ | nowhere | here | {"TMPDIR": str(server.uploads)}
        server.uploads.mkdir()
        with server.log.open("w") as log:
            output = {"stdout": log, "stderr": log}
            process = subprocess.Popen(command, cwd=folder, env=environment, **output)
        running.append((server, process))
        wait_until_served(url, process, server.log)
        return server

    yield start
    for _, process in running:
        process.terminate()
    for server, process in running:
        assert process.wait(30) == 0, server.log.read_text()
        assert server.files() == []


def rgb(width: int = 60, height: int = 45, seed: int = 0) -> Image.Image:
    """A picture of soft noise."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def exported(best, tmp_path_factory) -> Path:
    """A folder with the model as ONNX, in place of int8 too."""
    folder = tmp_path_factory.mktemp("exported")
    formats.write_onnx(cp.read_checkpoint(best), folder / "model.onnx")
    shutil.copy(folder / "model.onnx", folder / "model.int8.onnx")
    return folder


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory) -> Path:
    """The folder of a page."""
    folder = tmp_path_factory.mktemp("space")
    examples = [(name, rgb(seed=seed)) for seed, name in enumerate("abcde")]
    demo.write_program(folder, exported, examples)
    demo.write_read_me(folder, "Digits", f"# Digits\n\nMade of *figures*.\n\n{WIDE_TABLE}")
    return folder


@pytest.fixture(scope="module")
def page(folder, serve) -> Server:
    """The page, served."""
    return serve(folder)


@pytest.fixture(scope="module")
def client(page) -> Client:
    """A program that asks the page."""
    return visitor(page)


def visitor(page: Server) -> Client:
    """Another such program."""
    return Client(page.url, verbose=False, analytics_enabled=False)


def ask(client: Client, path: Path, *options: object) -> tuple[dict[str, float], str | None]:
    """The probabilities of the likeliest classes by name, likeliest first, and the heat map."""
    shares, heat, took = client.predict(handle_file(path), *options, api_name="/predict")
    assert re.match(r"\d+\.\d ms in the model \((fp32|int8)\), \d+\.\d ms to read", took)
    return {each["label"]: each["confidence"] for each in shares["confidences"]}, heat


def turned() -> Image.Exif:
    """EXIF data of a picture that lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def of_values(values: np.ndarray) -> Image.Image:
    """A picture of one channel."""
    return Image.fromarray(values)


RAMP = np.arange(60 * 45).reshape(45, 60)
TRANSPARENT = np.dstack([np.asarray(rgb()), RAMP % 256]).astype(np.uint8)
KINDS = {
    "rgb.png": (rgb(), {}),
    "odd.png": (rgb(61, 97), {}),
    "tiny.png": (rgb(7, 5), {}),
    "wide.jpg": (rgb(400, 31), {"quality": 95}),
    "turned.jpg": (rgb(), {"exif": turned(), "quality": 95}),
    "photo.jpg": (rgb(601, 455), {"quality": 95}),  # larger than it has to be decoded
    "photo-turned.jpg": (rgb(601, 455), {"exif": turned(), "quality": 95}),
    "photo-grey.jpg": (rgb(601, 455).convert("L"), {"quality": 95}),
    "turned.webp": (rgb(), {"exif": turned(), "lossless": True}),
    "turned.png": (rgb(), {"exif": turned()}),
    "palette.png": (rgb().quantize(16), {}),
    "palette-transparent.png": (rgb().quantize(16), {"transparency": 3}),
    "rgba.png": (Image.fromarray(TRANSPARENT), {}),
    "rgba.webp": (Image.fromarray(TRANSPARENT), {}),
    "grey.png": (rgb().convert("L"), {}),
    "grey-alpha.png": (rgb().convert("LA"), {}),
    "bilevel.png": (rgb().convert("1"), {}),
    "grey16.png": (of_values((RAMP * 24).astype(np.uint16)), {}),
    "dark16.tif": (of_values(RAMP.astype(np.uint16)), {}),
    "int32.tif": (of_values((RAMP * 900 - 5000).astype(np.int32)), {}),
    "unit-floats.tif": (of_values((RAMP / 2700).astype(np.float32)), {}),
    "wild-floats.tif": (of_values((RAMP * 3.3 - 99).astype(np.float32)), {}),
    "nan.tif": (of_values(np.where(RAMP % 7, RAMP / 12, np.nan).astype(np.float32)), {}),
    "flat.tif": (of_values(np.full((45, 60), 1e6, np.float32)), {}),
    "cmyk.jpg": (rgb().convert("CMYK"), {"quality": 95}),
    "animated.gif": (rgb(), {"save_all": True, "append_images": [rgb(seed=1)]}),
    "animated.webp": (rgb(), {"save_all": True, "append_images": [rgb(seed=1)]}),
    "animated.png": (rgb(), {"save_all": True, "append_images": [rgb(seed=1)]}),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """A folder with pictures of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, (picture, options) in KINDS.items():
        picture.save(folder / name, **options)
    return folder


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "ready",
    [
        READY,
        READY | {"image_size": 33, "val_resize": 39, "interpolation": "bicubic"},
        READY | {"image_size": 49, "val_resize": 32},  # more than is there
        READY | {"image_size": 32, "val_resize": 45},  # the height that most have: not resized
    ],
    ids=["resized", "odd", "padded", "as-they-are"],
)
@pytest.mark.parametrize("full_decode", [True, False])
def test_the_pixels_are_those_of_validation(kinds, name, ready, full_decode):
    ready = Preprocessing(**ready, mean=(0.4, 0.5, 0.45), std=(0.2, 0.3, 0.25))
    picture = picture_reader(full_decode)(str(kinds / name))
    expected = validation_transform(ready)(picture).numpy()
    known = json.loads(json.dumps(vars(ready) | {"full_decode": full_decode}))
    opened = pictures.open_picture(kinds / name, known)
    assert (opened.picture.width < opened.size[0]) == ("photo" in name and not full_decode)
    got = pictures.to_input(pictures.middle(opened, known), known)
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(got[0], expected)


def test_a_page_answers_as_predict_does(best, kinds, client, tmp_path):
    answers = tmp_path / "answers.json"
    options = ["--resume", str(best), "--precision", "fp32", "--json", str(answers)]
    assert main(["predict", *(str(kinds / name) for name in KINDS), *options]) == 0
    for told in json.loads(answers.read_text())["pictures"]:
        shares, _ = ask(client, Path(told["path"]))
        assert next(iter(shares)) == told["classes"][0], told["path"]
        expected = dict(zip(told["classes"], told["probabilities"], strict=True))
        assert shares == pytest.approx(expected, abs=1e-3), told["path"]


def answer_here(path: Path, session: onnxruntime.InferenceSession, ready: dict) -> np.ndarray:
    """The probabilities of all classes, highest first, without a page."""
    images = pictures.to_input(pictures.middle(pictures.open_picture(path), ready), ready)
    return -np.sort(-softmax(session.run(["logits"], {"images": images})[0][0]))


def test_many_at_once_each_get_their_own_answer(page, folder, tmp_path):
    """Each visitor has a client of its own: one that threads share may give up a question that
    comes while the server closes the stream of those before (gradio_client 2.7, CancelledError).
    """
    files = [tmp_path / f"{number}.png" for number in range(32)]
    for seed, file in enumerate(files):
        rgb(seed=100 + seed).save(file)
    shutil.copy(files[0], files[1])  # two visitors with the same picture
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    ready = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    expected = [answer_here(file, session, ready)[:5] for file in files]
    assert len({str(shares) for shares in expected}) == 31
    with ThreadPoolExecutor(32) as visitors:
        at_once = list(visitors.map(lambda file: ask(visitor(page), file)[0], files))
    got = np.array([list(shares.values()) for shares in at_once])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_heat_maps_are_of_the_class_that_is_asked_for(client, kinds):
    shares, nothing = ask(client, kinds / "rgb.png")
    assert nothing is None
    names = list(shares)
    _, likeliest = ask(client, kinds / "rgb.png", True)
    _, first = ask(client, kinds / "rgb.png", True, names[0])
    _, second = ask(client, kinds / "rgb.png", True, names[1], "int8")
    first, second, likeliest = (np.asarray(Image.open(path)) for path in (first, second, likeliest))
    assert first.shape == (pictures.SHOWN_PX, pictures.SHOWN_PX, 3)
    assert np.array_equal(first, likeliest) and not np.array_equal(first, second)


def test_a_heat_map_glows_where_the_evidence_is():
    evidence = np.zeros((4, 4), np.float32)
    evidence[0, 3], evidence[3, 0] = 5, -9
    coloured = np.asarray(pictures.heat_map(Image.new("RGB", (32, 32)), evidence)).astype(int)
    shown, hottest = pictures.SHOWN_PX, pictures.STRONGEST * pictures.GLOW[-1]
    assert np.abs(coloured[shown // 8, -shown // 8] - hottest).max() < 5
    assert coloured[-shown // 8, shown // 8].max() == coloured[shown // 2 :].max() == 0
    grey = Image.new("RGB", (500, 500), (90, 90, 90))
    against = pictures.heat_map(grey, -np.ones((4, 4), np.float32))
    assert np.array_equal(np.asarray(against), np.asarray(grey))


def test_the_page_and_the_report_have_the_same_colours_of_heat():
    steps = np.linspace(0, 1, len(pictures.SCALE))
    expected = 255 * heat_maps.colormaps[heat_maps.COLOURS](steps)[:, :3]
    assert np.abs(pictures.GLOW - expected).max() < 1
    assert pictures.STRONGEST == heat_maps.STRONGEST
    drawn = re.search(
        r"\.scale \{.*", report_page.read_template(report_page.__package__, "page.html.jinja")
    )[0]
    for place, colour in enumerate(re.findall(r"#[0-9a-f]{6}", drawn)):
        assert np.abs(pictures.GLOW[2 * place] - [*bytes.fromhex(colour[1:])]).max() <= 1


def write_unusable(folder: Path) -> dict[str, str]:
    """Writes files that there is no answer for; returns what is said of each."""
    damaged, large = "damaged, or not a picture", "at most 8,192 pixels"
    rgb().save(folder / "whole.png")
    texts = {
        "cut.png": (folder / "whole.png").read_bytes()[:900],
        "text.png": b"no picture\n",
        "empty.jpg": b"",
        "drawn.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    sizes = {"wide.png": (20_000, 40), "thin.png": (4_000, 3), "bomb.png": (15_000, 13_000)}
    for name, size in sizes.items():
        Image.new("1", size).save(folder / name)
    return dict.fromkeys(texts, damaged) | dict.fromkeys(sizes, large)


def test_what_cannot_be_used_is_told_kindly(client, page, tmp_path):
    for name, message in write_unusable(tmp_path).items():
        with pytest.raises(AppError, match=message):
            client.predict(handle_file(tmp_path / name), api_name="/predict")
    (tmp_path / "heavy.png").write_bytes(bytes(21 * 2**20))
    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        client.predict(handle_file(tmp_path / "heavy.png"), api_name="/predict")
    assert "Traceback" not in page.log.read_text() and "Warning" not in page.log.read_text()
    assert ask(client, tmp_path / "whole.png")[0]


def test_what_is_too_large_is_not_decoded(tmp_path, monkeypatch):
    Image.new("L", (pictures.LARGEST_SIDE_PX + 1, 200)).save(tmp_path / "wide.png")
    monkeypatch.setattr(Image.Image, "load", lambda picture: pytest.fail("decoded"))
    with pytest.raises(pictures.Unusable, match="at most"):
        pictures.open_picture(tmp_path / "wide.png")


@pytest.mark.parametrize("path", ["/etc/hostname", "README.md", "app.py"])
def test_nothing_but_uploads_and_examples_is_served(page, path):
    if not path.startswith("/"):
        path = page.folder / path
    with pytest.raises(urllib.error.HTTPError, match="403|404"):
        urllib.request.urlopen(f"{page.url}/gradio_api/file={path}")


def sent(page: Server, given: object) -> str:
    """What the page answers to a request that names a file in its own way, without a client."""
    body = json.dumps({"data": [given, False, "", "fp32"]}).encode()
    address, kind = f"{page.url}/gradio_api/call/predict", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, body, kind)) as answer:
        event = json.load(answer)["event_id"]
    deadline, told = time.monotonic() + 30, ""
    with urllib.request.urlopen(f"{address}/{event}", timeout=30) as stream:
        while part := stream.readline().decode():
            told += part
            assert time.monotonic() < deadline, f"no answer about {given}"
    return told


META = {"meta": {"_type": "gradio.FileData"}}


def elsewhere(folder: Path, page: Server) -> list[Path]:
    """Places that nobody is to look at: a picture, links to it and to its folder from where uploads
    are, what blocks whoever opens it, and the page's own files.
    """
    rgb().save(folder / "private.png")
    temporary = next(page.uploads.rglob("rgb.png")).parents[1]  # Gradio's folder
    links = [(temporary / "link.png", folder / "private.png"), (temporary / "folder", folder)]
    for link, target in links:
        link.symlink_to(target)
    pipes = [folder / "pipe.png", temporary / "pipe.png"]
    for pipe in pipes:
        os.mkfifo(pipe)
    through = temporary / "folder" / "private.png"
    up = temporary / ".." / ".." / ".." / folder.relative_to("/") / "private.png"
    own = [page.folder / "README.md", page.folder / "model.onnx", temporary, temporary / "none"]
    devices = [Path("/dev/ptmx"), Path("/dev/zero"), Path("/proc/self/environ")]
    return [folder / "private.png", links[0][0], through, up, *pipes, *own, *devices]


def test_nothing_but_uploads_and_examples_is_opened(page, client, kinds, tmp_path):
    """Whatever a request names, with or without the mark of a file that Gradio checks itself."""
    ask(client, kinds / "rgb.png")
    example = sorted((page.folder / "examples").iterdir())[0]
    for mark in ({}, META):
        assert "event: complete" in sent(page, {"path": str(example)} | mark)
    for place in elsewhere(tmp_path, page):
        for mark in ({}, META):
            answer = sent(page, {"path": str(place)} | mark)
            assert "event: error" in answer and "confidence" not in answer, place
    assert "event: error" in sent(page, {"path": "a\0b"})
    assert ask(client, kinds / "rgb.png")[0]


def test_no_address_is_fetched(page):
    address = f"{page.url}/config"
    for mark in ({}, META):
        assert "event: error" in sent(page, {"path": address} | mark)
    for path in (f"file={address}", f"file/{address}", f"file=%68ttp{address[4:]}"):
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            urllib.request.urlopen(f"{page.url}/gradio_api/{path}")
        assert refused.value.read() == b"Nothing is fetched from elsewhere."


def test_no_request_goes_past_the_queue(page):
    body = json.dumps({"data": [None, False, "", "fp32"]}).encode()
    for path in ("run/predict", "api/predict"):
        asked = urllib.request.Request(f"{page.url}/gradio_api/{path}", body)
        asked.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(asked)


@pytest.mark.parametrize("kind", ["outside", "link", "pipe", "folder", "huge", "name", "socket"])
def test_what_is_no_upload_is_refused_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(uploads, "LARGEST_BYTES", 2000)
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    (inside / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(inside / "pipe")
    (inside / "folder").mkdir()
    (inside / "huge").write_bytes(bytes(2001))
    (inside / "upload").write_bytes(bytes(2000))
    monkeypatch.chdir(inside)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    place = {"outside": tmp_path / "outside", "name": inside / ("x" * 400)}.get(kind, inside / kind)
    with pytest.raises(pictures.Unusable, match="uploaded here"):
        uploads.read_upload(str(place), [inside])
    assert uploads.read_upload(str(inside / "upload"), [inside]).read() == bytes(2000)


def slow_jpeg(scans: int) -> bytes:
    """A small file of a large picture, whose last scan comes again and again: hours of work."""
    file = io.BytesIO()
    Image.new("L", (8192, 8192), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scans * last + data[-2:]


def test_a_picture_is_not_read_longer_than_a_while(monkeypatch):
    monkeypatch.setattr(uploads, "READ_S", 0.5)
    begin = time.monotonic()
    with pytest.raises(pictures.Unusable, match="takes too long"):
        pictures.open_picture(uploads.InTime(slow_jpeg(50_000)))
    assert time.monotonic() - begin < 20


def test_one_slow_request_does_not_stop_the_others(folder, serve, kinds, tmp_path):
    server = serve(
        folder, [sys.executable, "-c", "import app; app.uploads.READ_S = 15; app.main()"]
    )
    (tmp_path / "slow.jpg").write_bytes(slow_jpeg(50_000))
    with ThreadPoolExecutor(1) as others:
        slow = others.submit(ask, visitor(server), tmp_path / "slow.jpg")
        time.sleep(1)
        assert ask(visitor(server), kinds / "rgb.png")[0]
        assert not slow.done()
        with pytest.raises(AppError, match="takes too long"):
            slow.result(60)


def test_the_formats_are_the_trainers(tmp_path):
    """None that starts another program, such as Ghostscript for PostScript."""
    assert pictures.PICTURE_FORMATS == PICTURE_FORMATS
    rgb().save(tmp_path / "drawing.jpg", "EPS")
    with pytest.raises(pictures.Unusable, match="damaged, or not a picture"):
        pictures.open_picture(tmp_path / "drawing.jpg")


def test_a_model_without_maps_or_int8_and_uploads_that_go(folder, serve, kinds, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain, ignore=shutil.ignore_patterns("examples"))
    (plain / "model.int8.onnx").unlink()
    model = onnx.load(plain / "model.onnx")
    del model.graph.output[1]
    onnx.save(model, plain / "model.onnx")
    server = serve(plain, [sys.executable, "-c", QUICKLY])
    client = Client(server.url, verbose=False, analytics_enabled=False)
    shares, heat = ask(client, kinds / "rgb.png", True)
    assert shares and heat is None
    shown = {part["type"]: part["props"].get("visible") for part in client.config["components"]}
    assert not shown["checkbox"] and not shown["radio"] and shown["label"]
    deadline = time.monotonic() + 60
    while server.files() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.files() == []
    assert "dataset" not in shown  # the gallery of examples, of which there are none


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, [2]),
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.service\n",
                "sys/fs/cgroup/a.slice/cpu.max": "300000 100000",
                "sys/fs/cgroup/a.slice/b.service/cpu.max": "50000 100000",
            },
            [0, 3],
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
            },
            [4],
        ),
    ],
    ids=["none", "unlimited", "container", "nested", "version 1"],
)
def test_quotas(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quotas(tmp_path) == expected


def test_threads_follow_cpus_and_quotas():
    assert threads.allowed_threads(8, []) == 8
    assert threads.allowed_threads(8, [0, 3]) == 1
    assert threads.allowed_threads(8, [3, 16]) == 3
    assert threads.available_cpus() == len(os.sched_getaffinity(0))


@pytest.fixture
def odd_folder(exported, tmp_path) -> Path:
    """A page whose title and classes are none that a programmer would choose."""
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [CLASS_WITH_HTML, "../../etc/passwd", "café: 'été'", "\n", "x" * 300]
    examples = [(name, rgb(2000 if name == "\n" else 40)) for name in names]
    title = "Cats: \"mine\", 'yours' #1\n---\nand {all}"
    demo.write_program(folder, exported, examples)
    demo.write_read_me(folder, title, "A card.\n\n---\n\nIts end.")
    return folder


def test_a_folder_has_all_that_a_space_needs(odd_folder):
    card = SpaceCard.load(odd_folder / "README.md")
    assert card.data.title == "Cats: \"mine\", 'yours' #1 --- and {all}"
    assert (card.data.sdk, card.data.app_file, card.data.pinned) == ("gradio", "app.py", False)
    assert card.data.license is None and re.fullmatch(r"6\.\d+\.\d+", card.data.sdk_version)
    assert card.text.strip().startswith(f"# {card.data.title}\n\nA card.\n\n---\n\nIts end.")
    assert "hf upload USER/NAME . . --repo-type space" in card.text
    assert "The page's own program (`app.py` and what it imports) has the MIT license" in card.text
    demo.write_read_me(odd_folder, "Cats", "A card.", "other:my-1.0")
    licensed = SpaceCard.load(odd_folder / "README.md").data
    assert (licensed.license, licensed.to_dict()["license_name"]) == ("other", "my-1.0")
    assert "*.onnx filter=lfs" in (odd_folder / ".gitattributes").read_text()
    assert "https://huggingface.co/spaces/" in (odd_folder / "hf_space_link.txt").read_text()
    for name in demo.PROGRAM:
        assert (odd_folder / name).read_bytes() == (demo.SOURCE / name).read_bytes()


def test_examples_have_names_that_every_file_system_takes(odd_folder):
    examples = sorted((odd_folder / "examples").iterdir())
    assert [path.name for path in examples] == [
        "01-img-src-x-onerror-alert-1-co.png",
        "02-etc-passwd.png",
        "03-caf-t.png",
        "04.jpg",
        f"05-{'x' * 40}.png",
    ]
    assert np.array_equal(np.asarray(Image.open(examples[0])), np.asarray(rgb(40)))
    assert max(Image.open(examples[3]).size) == demo.LARGEST_EXAMPLE_PX


def test_the_version_is_no_lower_than_what_is_safe(monkeypatch):
    def is_missing(name):
        raise demo.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo.importlib.metadata, "version", is_missing)
    asked = re.search(r"gradio>=(\S+),<7", (demo.SOURCE / "requirements.txt").read_text())[1]
    assert demo.gradio_version() == asked
    monkeypatch.setattr(demo.importlib.metadata, "version", lambda name: "6.9.0")  # not safe
    assert demo.gradio_version() == asked
    monkeypatch.setattr(demo.importlib.metadata, "version", lambda name: "6.100.0")
    assert demo.gradio_version() == "6.100.0"


def test_classes_are_named_on_the_page_as_text():
    assert "<details>" not in app.known_classes(["x"] * app.MOST_NAMES)
    names = [CLASS_WITH_HTML, "a\u202eb", *(f"class {number}" for number in range(20))]
    html = app.known_classes(names)
    first, more = html.split("<details><summary>and 10 more</summary>")
    assert (first.count("<li>"), more.count("<li>")) == (12, 10)
    assert "22 classes" in first and "&lt;img src=x onerror=alert(1)&gt; &amp; co" in first
    assert "<img" not in html and "\u202e" not in html


def test_the_program_stays_one_that_is_read_at_a_sitting():
    assert len((demo.SOURCE / "app.py").read_text().splitlines()) < 150


@pytest.fixture(scope="module")
def browser():
    """A headless browser."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with sync_playwright() as playwright:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        options = {"executable_path": path, "args": ["--no-sandbox", *camera]}
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture(params=[375, 1280], ids=["phone", "desktop"])
def visit(request, browser, page):
    """The page in a window; in the end, nothing may have gone wrong in it, been asked of another
    machine, or stand beside the window.
    """
    allowed = ["camera", "clipboard-read", "clipboard-write"]
    size = {"width": request.param, "height": 800}
    window = browser.new_page(viewport=size, permissions=allowed)
    wrong, asked = [], set()
    window.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    window.on("pageerror", lambda error: wrong.append(str(error)))
    window.on("request", lambda request: asked.add(request.url))
    window.goto(page.url)
    yield window
    assert window.evaluate("document.documentElement.scrollWidth") <= request.param
    local = (page.url, f"ws{page.url.removeprefix('http')}", "data:", "blob:")
    assert wrong == [] and [url for url in asked if not url.startswith(local)] == []
    window.close()


def choose(window: Page, path: Path) -> None:
    """Choose a file as a visitor does."""
    window.locator("input[type=file]").first.set_input_files(path)


def bars(window: Page) -> dict[str, str]:
    """Classes and per cent as they can be read, likeliest first."""
    rows = window.locator("[data-testid$=confidence-set]").all_inner_texts()
    return {name: share for name, share in (row.split() for row in rows)}


def heat_shown(window: Page) -> str:
    """The address of the heat map, once there is one."""
    picture = window.locator("img[src*='image.webp']")
    expect(picture).to_be_visible()
    assert picture.evaluate("picture => picture.decode().then(() => picture.naturalWidth)")
    return picture.get_attribute("src")


def test_a_visitor_sees_the_answer_and_the_heat_map(visit, client, kinds):
    expected, _ = ask(client, kinds / "rgb.png")
    choose(visit, kinds / "rgb.png")
    expect(visit.get_by_text("ms in the model (fp32)")).to_be_visible()
    answer = visit.locator("[data-testid$=confidence-set]").last.bounding_box()
    assert answer["y"] + answer["height"] <= SMALL_PHONE_PX  # nobody has to scroll to it
    assert bars(visit) == {name: f"{100 * share:.0f}%" for name, share in expected.items()}
    expect(visit.locator("img[src*='image.webp']")).to_have_count(0)
    visit.get_by_label("Heat map").first.check()
    first = heat_shown(visit)
    scale = visit.locator(".scale i").evaluate("scale => getComputedStyle(scale).backgroundImage")
    assert [*map(int, re.findall(r"\d+", scale.replace("90deg", "")))] == [*pictures.GLOW.flat]
    visit.get_by_label("Class of the heat map").click()
    visit.get_by_role("option", name=list(expected)[1], exact=True).click()
    expect(visit.locator("img[src*='image.webp']")).not_to_have_attribute("src", first)
    visit.get_by_label("int8").check()
    expect(visit.get_by_text("ms in the model (int8)")).to_be_visible()
    visit.get_by_label("Heat map").first.uncheck()
    expect(visit.locator("img[src*='image.webp']")).to_have_count(0)


def test_a_visitor_clicks_an_example_and_reads_the_card(visit, page):
    expect(visit.locator(".known li")).to_have_text([*"0123456789"])
    visit.locator(".gallery-item").nth(1).click()
    expect(visit.get_by_text("ms in the model (fp32)")).to_be_visible()
    assert len(bars(visit)) == 5
    visit.get_by_role("tab", name="Model card").click()
    expect(visit.locator("em", has_text="figures")).to_be_visible()
    expect(visit.get_by_text("hf upload")).to_have_count(0)
    expect(visit.locator("footer")).not_to_contain_text("·", use_inner_text=True)
    lines = "cell => [cell.clientHeight, parseFloat(getComputedStyle(cell).lineHeight)]"
    for cell in visit.locator("td").all():  # neither PyTorch nor 148-162 is broken
        height_px, line_px = cell.evaluate(lines)
        assert height_px < 2 * line_px + 20, cell.inner_text()
    visit.get_by_role("tab", name="Try it").click()
    visit.get_by_label("Remove Image").click()
    expect(visit.get_by_text("ms in the model")).to_have_count(0)
    assert len(list((page.folder / "examples").iterdir())) == 5


def test_a_visitor_with_a_broken_file_is_told_once(visit, page, kinds, tmp_path):
    before = len(page.log.read_text())
    choose(visit, kinds / "rgb.png")
    expect(visit.get_by_text("ms in the model")).to_be_visible()
    (tmp_path / "broken.png").write_bytes((kinds / "rgb.png").read_bytes()[:200])
    choose(visit, tmp_path / "broken.png")
    expect(visit.get_by_text("The file is damaged, or not a picture")).to_have_count(1)
    expect(visit.get_by_text("ms in the model")).to_have_count(0)
    choose(visit, kinds / "turned.jpg")
    expect(visit.get_by_text("ms in the model")).to_be_visible()
    assert "Traceback" not in page.log.read_text()[before:]


COPY_A_PICTURE = """async () => {
    const canvas = document.createElement("canvas");
    canvas.getContext("2d").fillRect(10, 10, 80, 40);
    const file = await new Promise(made => canvas.toBlob(made, "image/png"));
    await navigator.clipboard.write([new ClipboardItem({"image/png": file})]);
}"""


def test_a_visitor_uses_camera_and_clipboard(visit):
    visit.get_by_label("Capture from camera").click()
    visit.get_by_text("Click to Access Webcam").click()
    visit.wait_for_function("document.querySelector('video')?.currentTime > 0")
    visit.get_by_label("capture photo").click()
    expect(visit.get_by_text("ms in the model")).to_be_visible()
    visit.get_by_label("Remove Image").click()
    expect(visit.get_by_text("ms in the model")).to_have_count(0)
    visit.evaluate(COPY_A_PICTURE)
    visit.get_by_label("Paste from clipboard").click()
    expect(visit.get_by_text("ms in the model")).to_be_visible()
