"""deploy/export.py. Run: python -m pytest tests/deploy/test_export.py

A file is right if a process of its own makes the same of real images as the checkpoint's model.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import checkpoint as cp
import export
import feature_maps
import loading
import model_card
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import speed
import torch
import torchvision
import yaml
from formats import FORMATS, Format
from huggingface_hub import ModelCard
from PIL import Image

from split_affinity.checkpoints.state import versions
from split_affinity.data.pictures import load_image
from split_affinity.data.transforms import validation_transform
from split_affinity.errors import RunError, UserError
from split_affinity.models.pretrained import Preprocessing
from split_affinity.models.registry import build_model
from split_affinity.options.settings import Settings
from split_affinity.runs.predict import Trained, load_trained
from split_affinity.runs.starting_weights import read_weights

# TorchScript's; those who ask for it are told.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(scope="module")
def exported(best, tmp_path_factory) -> Path:
    """The files of a ResNet-20, as one command writes them; beside them a demo page, in a folder
    that had one of an earlier model, and what was printed.
    """
    folder = tmp_path_factory.mktemp("exported") / "files"
    page = folder.with_name("page")
    (page / "examples").mkdir(parents=True)
    for old in ("model.int8.onnx", "app.py", "examples/mine.png"):
        (page / old).write_bytes(b"of an earlier time")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert export.main([str(best), "--output-dir", str(folder), "--space", str(page)]) == 0
    folder.with_name("printed").write_text(printed.getvalue())
    return folder


@pytest.fixture(scope="module")
def facts(best) -> dict:
    """What every file says of the model in it."""
    return {name: json.loads(text) for name, text in cp.describe(cp.read_checkpoint(best)).items()}


def as_json(texts: dict[str, str]) -> dict:
    return {name: json.loads(text) for name, text in texts.items()}


def built(model: torch.nn.Module, size: int = 32, name: str = "resnet20") -> cp.Checkpoint:
    """A checkpoint of a model with random weights."""
    ready = Preprocessing(image_size=size)
    trained = Trained(model.eval(), ["a", "b", "c"], ready, Settings(model=name))
    return cp.Checkpoint(Path("some.pt"), {"versions": versions()}, trained)


def small_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=3)
    torch.nn.init.normal_(vit.heads.head.weight)
    return vit


MODELS = {
    "hybrid-light": lambda: build_model("hybrid-light", 3, 64),
    "mobilenet_v3_small": lambda: build_model("mobilenet_v3_small", 3, 32),
    "vision transformer": small_vit,
    "squeezenet1_1": lambda: build_model("squeezenet1_1", 3, 32),
}


@pytest.mark.parametrize("kind", ["onnx", "pt2", "torchscript"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_goes_into_a_graph(kind, name, tmp_path):
    torch.manual_seed(0)
    checkpoint = built(MODELS[name](), 64 if name.startswith("hybrid") else 32)
    path = tmp_path / FORMATS[kind].file
    FORMATS[kind].write(checkpoint, path)
    size = checkpoint.trained.ready.image_size
    images = torch.randn(5, 3, size, size)
    expected = checkpoint.model(images).detach().numpy()
    run = loading.LOADERS[kind](path)
    for count in (1, 2, 5):  # any number at once
        made = run(images[:count].numpy())
        assert made.shape == (count, 3)
        assert np.abs(made - expected[:count]).max() < 1e-4 * np.abs(expected).max()


def test_the_files_are_there_and_say_what_they_hold(exported, facts):
    names = {each.name for each in exported.iterdir()}
    assert names == {"README.md", *(each.file for each in FORMATS.values())}
    assert all(each.stat().st_mode & 0o044 for each in exported.iterdir())  # others may read them
    proto = onnx.load(exported / "model.onnx")
    assert as_json({each.key: each.value for each in proto.metadata_props}) == facts
    with safetensors.safe_open(exported / "model.safetensors", framework="pt") as file:
        assert as_json(file.metadata()) == facts
    extra = dict.fromkeys(facts, "")
    torch.export.load(exported / "model.pt2", extra_files=extra)
    assert as_json(extra) == facts
    extra = dict.fromkeys(facts, "")
    torch.jit.load(exported / "model_cpu.pt", _extra_files=extra)
    assert as_json(extra) == facts


def listed_in(card: Path) -> set[str]:
    """The files that a model card names."""
    return {*re.findall(r"^\| `(.*?)` \|", card.read_text(), re.MULTILINE)}


def test_cards_list_what_is_in_their_folders(exported):
    page = exported.with_name("page")
    assert listed_in(exported / "README.md") == {each.file for each in FORMATS.values()}
    there = {f"{each.name}{'/' * each.is_dir()}" for each in page.iterdir()}
    own = {"README.md", ".gitattributes", ".gitignore"}
    assert listed_in(page / "README.md") == there - own
    assert "examples/" in there and "model.int8.onnx" not in there  # which is of another model
    assert (page / "app.py").read_bytes() != b"of an earlier time"


def test_the_end_says_who_sees_pictures_and_what_comes_next(exported):
    page = exported.with_name("page")
    told = exported.with_name("printed").read_text()
    *_, about, start, _, create, upload = told.splitlines()
    assert about.endswith(
        f"examples: 1 picture, 1 of them from before, in {page}/, where everybody can see them"
    )
    venv = page / ".venv"
    assert start == (
        f"next: python3 -m venv {venv} && {venv}/bin/pip install -r {page}/requirements.txt && "
        f"{venv}/bin/python {page}/app.py"
    )
    assert create.split()[1:4] == ["repos", "create", "USER/NAME"]
    assert f"upload USER/NAME {page} . --repo-type space" in upload and "'.venv/*'" in upload


def test_the_end_without_pictures_or_without_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env/bin/python"))
    first, *_ = export.told_of_page(Path("p"), 0)
    assert first == (
        "demo page in p; examples: none; --examples 5 puts five of your validation pictures into "
        "p/, where everybody can see them"
    )
    script = shlex.quote(str(cp.HERE / "export.py"))
    assert export.proposed_page(["a b.pt", "--output-dir", "x"]) == (
        f"next: 'my env/bin/python' {script} 'a b.pt' --output-dir x --space hf_space"
    )
    (tmp_path / "model.pt2").touch()
    assert [*export.told_of_files(tmp_path, {"model.onnx"})][1:] == [
        "of an earlier export, and not in README.md: model.pt2"
    ]


def test_no_file_tells_where_it_was_made(exported):
    places = {str(cp.HERE), str(cp.HERE.parent), str(Path(torch.__file__).parent), "/deploy/"}
    for file in exported.iterdir():
        contents = [file.read_bytes()]
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                contents = [archive.read(name) for name in archive.namelist()]
        for place in places:
            assert not any(place.encode() in each for each in contents), (file.name, place)


def test_one_command_makes_int8_and_a_demo_page_too(best, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "TURN_S", 0.01)
    folder, page = tmp_path / "files", tmp_path / "page"
    asked = ["--output-dir", str(folder), "--formats", "onnx", "--int8", "--space", str(page)]
    asked += ["--examples", "5", "--license", "cc-by-4.0"]
    assert export.main([str(best), *asked, "--calibrate", "20"]) == 0
    out = capsys.readouterr().out
    card = (folder / "README.md").read_text()
    models = {"model.onnx", "model.int8.onnx"}
    assert {each.name for each in folder.iterdir()} == {*models, "README.md"}
    assert {"app.py", "requirements.txt", *models} <= {each.name for each in page.iterdir()}
    assert all((page / name).read_bytes() == (folder / name).read_bytes() for name in models)
    assert len(list((page / "examples").iterdir())) == 5
    assert f"5 of your validation pictures in {page}/, where everybody can see them" in out
    for each in (folder, page):
        written = ModelCard.load(each / "README.md")
        assert written.data.license == "cc-by-4.0"
        assert "The license of the weights is `cc-by-4.0`, as their owner says" in written.text
    tables = re.findall(r"^\| .*(?:PyTorch|ONNX) .*$", out, re.MULTILINE)
    assert len(tables) == 8  # two tables of four ways
    assert all(line in card for line in tables)
    assert "| `model.int8.onnx` |" in card


def test_weights_are_those_of_the_checkpoint(exported, best):
    model = cp.read_checkpoint(best).model
    saved = read_weights(exported / "model.safetensors").weights  # as --init-from takes them
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_the_second_output_is_class_activation_maps(exported, best):
    checkpoint = cp.read_checkpoint(best)
    images = torch.randn(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    logits, maps = session.run(["logits", "maps"], {"images": images.numpy()})
    features = []
    checkpoint.model.stage3.register_forward_hook(lambda _, __, output: features.append(output))
    with torch.inference_mode():
        checkpoint.model(images)
    weights = checkpoint.model.fc.weight
    expected = torch.einsum("ck,nkhw->nchw", weights, features[0]).detach().numpy()
    assert maps.shape == (3, 10, 8, 8)
    assert np.abs(maps - expected).max() < 1e-4 * np.abs(expected).max()
    bias = checkpoint.model.fc.bias.detach().numpy()
    assert np.allclose(maps.mean((2, 3)) + bias, logits, atol=1e-4 * np.abs(logits).max())


def test_maps_are_those_after_a_relu_that_works_in_place(tmp_path):
    torch.manual_seed(0)
    model = build_model("densenet121", 3, 64)
    FORMATS["onnx"].write(built(model, 64), tmp_path / "model.onnx")
    images = {"images": torch.randn(2, 3, 64, 64).numpy()}
    logits, maps = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, images)
    assert np.allclose(
        maps.mean((2, 3)) + model.classifier.bias.detach().numpy(), logits, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "size", "layer", "has_maps"),
    [
        ("resnet18", 64, "layer4", True),
        ("resnet18", 32, "layer3", False),  # its last map has one place
        ("resnet20", 32, "stage3", True),
        ("densenet121", 64, "features", True),
        ("swin_t", 64, "permute", True),
        ("convnext_tiny", 64, "features", False),
        ("vgg11", 64, "features", False),
        ("squeezenet1_1", 64, "classifier.2", False),
        ("hybrid-light", 64, "attention", False),
        ("vit_b_32", 64, "encoder.layers.encoder_layer_11.ln_1", False),
    ],
)
def test_the_last_feature_map_is_found(name, size, layer, has_maps):
    checkpoint = built(build_model(name, 3, size), size, name)
    assert feature_maps.find_map_layer(checkpoint).name == layer
    assert bool(feature_maps.find_linear_head(checkpoint)) is has_maps


class ChannelsLast(torch.nn.Module):
    """Features (n, h, w, channels) behind a convolution, as in timm's Swin."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = torch.nn.Conv2d(3, 16, 4, stride=4), torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, images):
        """Logits (n, 3)."""
        return self.head(self.norm(self.stem(images).permute(0, 2, 3, 1)).mean((1, 2)))


def test_an_early_map_is_not_taken_for_the_last():
    checkpoint = built(ChannelsLast(), 32, "some net")
    with pytest.raises(UserError, match="some net has no feature map of several places at 32"):
        feature_maps.find_map_layer(checkpoint)
    assert feature_maps.find_map_layer(checkpoint, "stem").grid == 8


def test_a_head_of_two_layers_has_no_maps(tmp_path):
    checkpoint = built(build_model("mobilenet_v3_small", 3, 64), 64)
    assert feature_maps.find_linear_head(checkpoint) is None
    FORMATS["onnx"].write(checkpoint, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [each.name for each in session.get_outputs()] == ["logits"]


def sample_of(logits: torch.Tensor) -> export.Sample:
    return export.Sample(torch.zeros(len(logits), 3, 8, 8), logits)


def test_files_that_are_not_the_model_are_refused():
    logits = torch.tensor([[10.0, 0.0, -5.0], [1.0, 2.0, 0.0]])
    text = export.compare_logits("x", logits + 1e-4, sample_of(logits))
    assert text == ("top-1 of 2 of 2 images equal, largest difference 1.0e-05 of the largest logit")
    for wrong in (logits + 0.02, logits.flip(1), logits * torch.nan):
        with pytest.raises(RunError, match="x: top-1 of .*nothing is kept"):
            export.compare_logits("x", wrong, sample_of(logits))
    near = torch.tensor([[10.0, 0.0, -5.0], [2.0, 2.0 - 2e-3, 0.0]])
    other = torch.tensor([[10.0, 0.0, -5.0], [2.0 - 4e-3, 2.0 - 2e-3, 0.0]])  # a little, but top-1
    with pytest.raises(RunError, match="top-1 of 1 of 2 images equal"):
        export.compare_logits("x", other, sample_of(near))
    tie = torch.tensor([[1.0, 1.0 + 5e-7, 0.0]])  # of two that are equal, either may come first
    assert "0 of 1 image" in export.compare_logits("x", tie[:, [1, 0, 2]], sample_of(tie))


def test_nothing_is_kept_of_a_model_that_does_not_come_through(best, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "model.onnx").write_bytes(b"of an earlier time")
    (kept / "notes.txt").write_text("mine")

    def wrong(checkpoint, path):
        write(cp.Checkpoint(checkpoint.path, checkpoint.state, spoilt), path)

    checkpoint = cp.read_checkpoint(best)
    with torch.no_grad():
        checkpoint.model.fc.weight.mul_(1.1)
    spoilt, write = checkpoint.trained, FORMATS["pt2"].write
    monkeypatch.setitem(FORMATS, "pt2", Format("model.pt2", wrong, ""))
    for folder in (kept, tmp_path / "new/folder"):
        assert export.main([str(best), "--output-dir", str(folder), "--formats", "onnx,pt2"]) == 1
        err = capsys.readouterr().err
        assert "model.pt2: top-1" in err
        assert "nothing is kept" in err
        assert err.count("\n") == 1
    assert {each.name: each.read_bytes() for each in kept.iterdir()} == {
        "model.onnx": b"of an earlier time",
        "notes.txt": b"mine",
    }
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", ["write", "load"])
def test_what_a_format_cannot_hold_is_said_in_a_line(best, tmp_path, monkeypatch, capsys, step):
    def broken(checkpoint, path):
        if step == "write":
            raise ValueError("no such operator\nand more")
        path.write_bytes(b"no model")

    monkeypatch.setitem(FORMATS, "pt2", Format("model.pt2", broken, ""))
    arguments = [str(best), "--output-dir", str(tmp_path / "out"), "--formats", "pt2"]
    assert export.main(arguments) == 1
    err = capsys.readouterr().err
    said = "resnet20 cannot be written as pt2: no such operator;"
    assert (said if step == "write" else "model.pt2: cannot be loaded again: ") in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_are_filled_at_once_or_not_at_all(tmp_path):
    target = tmp_path / "a/b"
    with export.filled(target, "--output-dir") as staged:
        (staged / "sub").mkdir()
        (staged / "sub/one").write_text("1")
        assert [each.name for each in target.iterdir()] == [staged.name]
    assert [str(each.relative_to(target)) for each in target.rglob("*")] == ["sub", "sub/one"]
    with contextlib.suppress(KeyError), export.filled(tmp_path / "c/d", "--output-dir") as staged:
        (staged / "one").write_text("1")
        raise KeyError
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["missing.pt", "--output-dir", "out"], "missing.pt: no such checkpoint"),
        (["damaged.pt", "--output-dir", "out"], "damaged.pt: damaged: its SHA-256"),
        (["foreign.pt", "--output-dir", "out"], "foreign.pt: damaged, or no checkpoint"),
        (["best.pt", "--output-dir", "file"], "--output-dir file: cannot be written: "),
        (["best.pt", "--output-dir", "file/out"], "--output-dir file/out: cannot be written: "),
        (["best.pt", "--output-dir", "/proc/out"], "--output-dir /proc/out: cannot be written: "),
        (["best.pt", "--output-dir", "out", "--space", "file"], "--space file: cannot be written"),
        (["best.pt", "--output-dir", "out", "--space", "./out"], "has to be another folder"),
        (
            ["best.pt", "--output-dir", "out", "--data-path", "none"],
            "--data-path none does not exist",
        ),
        (["best.pt", "--output-dir", "out", "--formats", "pt2", "--int8"], "needs onnx among them"),
        (["best.pt", "--output-dir", "out", "--formats", "pt2", "--space", "s"], "needs onnx"),
        (["best.pt", "--output-dir", "out", "--compiled"], "--compiled: "),
        (["best.pt", "--output-dir", "out", "--examples", "5"], "--examples 5: needs --space"),
        (
            ["best.pt", "--output-dir", "out", "--examples", "none"],
            "--examples none: needs --space",
        ),
    ],
)
def test_what_a_user_can_get_wrong(best, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    shutil.copy(best, "best.pt")
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 1
    Path("damaged.pt").write_bytes(data)
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    Path("file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert export.main(options) == 2
    err = capsys.readouterr().err
    assert err.startswith("export.py: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("formats", ["onnx,tflite", "", "onnx,,pt2"])
def test_unknown_formats(formats, capsys):
    with pytest.raises(SystemExit, match="2"):
        export.main(["best.pt", "--output-dir", "out", "--formats", formats])
    assert "(choose from onnx, pt2, torchscript, weights)" in capsys.readouterr().err


def test_licenses_are_those_that_hugging_face_knows_or_others(capsys):
    assert model_card.parse_license("apache-2.0") == "apache-2.0"
    keys = model_card.license_keys(model_card.parse_license("other:my-1.0"))
    assert keys == {"license": "other", "license_name": "my-1.0"}
    assert model_card.license_keys(None) == {}
    for wrong in ("other:", "other:Two Words", "other", "", "MIT\nx: y", "other:" + "x" * 61):
        with pytest.raises(argparse.ArgumentTypeError, match="no license .* is known"):
            model_card.parse_license(wrong)
    with pytest.raises(SystemExit, match="2"):
        export.main(["best.pt", "--output-dir", "out", "--license", "apache2.0"])
    assert "did you mean apache-2.0" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "101", "-1", "some", "1.5"])
def test_the_number_of_examples(count, capsys):
    with pytest.raises(SystemExit, match="2"):
        export.main(["best.pt", "--output-dir", "out", "--space", "s", f"--examples={count}"])
    assert f"'{count}' is not a whole number from 1 to 100" in capsys.readouterr().err


def test_the_order_of_formats_does_not_matter():
    assert export.parse_formats("weights, onnx") == ("onnx", "weights")


def test_the_cards_ten_lines_give_the_answer_of_predict(
    exported, best, digits, tmp_path, monkeypatch, capsys
):
    card = (exported / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    monkeypatch.chdir(exported)
    trained = load_trained(best)
    transform = validation_transform(trained.ready)
    for number, size in enumerate([(32, 32), (57, 40), (33, 90)]):
        file = sorted((digits / "val/7").iterdir())[number]
        picture = Image.open(file).resize(size).save(tmp_path / "picture.png")
        exec(code.replace('"picture.png"', repr(str(tmp_path / "picture.png"))), {})
        picture = transform(load_image(str(tmp_path / "picture.png")))
        with torch.inference_mode():
            answer = trained.classes[int(trained.model(picture[None]).argmax())]
        assert capsys.readouterr().out.strip() == answer


def test_the_card_has_a_header_that_hugging_face_reads(exported, best):
    card = ModelCard.load(exported / "README.md")
    row = cp.read_checkpoint(best).state["progress"]["history"][-1]
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "onnx"
    assert card.data.license is None and "The license of the weights is open" in card.text
    assert {each.metric_name: each.metric_value for each in card.data.eval_results} == {
        "top-1": pytest.approx(row["val_top1"] / 100, abs=1e-6),
        "top-5": pytest.approx(row["val_top5"] / 100, abs=1e-6),
    }
    assert f"**Top-1 {row['val_top1']:.2f} %**" in card.text
    assert re.search(r"top-5 [\d.]+ %,\s", card.text)
    precision = cp.read_checkpoint(best).trained.settings.precision
    assert f"on 360 validation images, computed in {precision}." in card.text
    for line in ("## Limits", "`model.safetensors`", "--epochs 2"):
        assert line in card.text
    assert str(best.parent) not in card.content  # nobody else's business
    assert str(Path.home()) not in card.content


def test_a_recipe_names_no_folder_of_the_machine():
    places = {"data_path": "data", "output_dir": "out", "log_file": "log.md", "init_from": "r.pth"}
    given = {name: Path("/home/somebody", file) for name, file in places.items()}
    given |= {"teacher_weights": "/home/somebody/t.pt", "freeze": "/home/somebody/f"}
    settings = Settings(model="resnet20", **given)  # whatever will be a file, one day
    recipe = model_card.recipe(dataclasses.replace(settings, class_weights="/home/somebody/w.json"))
    assert "/home" not in recipe
    balanced = model_card.recipe(dataclasses.replace(settings, class_weights="balanced"))
    assert "--class-weights balanced" in balanced
    assert "--model resnet20" in recipe and "--init-from r.pth" in recipe


def test_names_of_classes_are_text(best):
    checkpoint = cp.read_checkpoint(best)
    names = ["<script>alert(1)</script>", "a | b", "[x](http://y)", "`code`", "# head\n---\nx: 1"]
    checkpoint.trained.classes[:5] = names
    data = cp.open_images(cp.read_checkpoint(best))
    header, body = model_card.build_card(checkpoint, data, [], "")
    assert yaml.safe_load(header.strip("-\n"))["library_name"] == "onnx"
    for raw in ("<script", "[x](", "`code`", "\n---\n"):
        assert raw not in body
    assert r"&lt;script&gt;alert\(1\)&lt;/script&gt;" in body


def test_a_checkpoint_that_was_not_validated_has_a_card_that_says_so(best):
    checkpoint = cp.read_checkpoint(best)
    checkpoint.state["progress"]["batches"] = 3  # of the next epoch
    data = cp.open_images(checkpoint)
    header, body = model_card.build_card(checkpoint, data, [], "")
    assert "How good it is was not measured" in body
    assert "model-index" not in header
    assert "```python" not in body  # there is no model.onnx that it could open


def test_the_best_five_of_five_classes_are_no_figure():
    row = {"val_top1": 80.0, "val_top5": 100.0}
    assert model_card.figures_of(row, 5) == {"top-1": 80.0}
    assert model_card.figures_of(row, 6) == {"top-1": 80.0, "top-5": 100.0}


def test_calibration_takes_training_images_spread_over_all_classes(best):
    checkpoint = cp.read_checkpoint(best)
    data = cp.open_images(checkpoint)
    batches = list(export.calibration_images(checkpoint, data, 20, 8))
    assert [each.shape for each in batches] == [(8, 3, 32, 32), (8, 3, 32, 32), (2, 3, 32, 32)]
    targets = [data.train.targets[data.chosen[i]] for i in export.spread(len(data.chosen), 20)]
    assert set(targets) == set(range(10))


@pytest.mark.parametrize(("count", "most"), [(10, 5), (11, 5), (3, 5), (1, 1), (64, 64), (65, 64)])
def test_spread(count, most):
    found = export.spread(count, most)
    assert 0 < len(found) <= most
    assert found[-1] < count
    assert len(found) == min(count, most) or len(found) > most / 2


def test_examples_are_of_different_classes_where_there_are_some(best, digits, tmp_path):
    checkpoint = cp.read_checkpoint(best)
    names = [name for name, _ in export.example_pictures(cp.open_images(checkpoint), 5)]
    assert names == ["0", "2", "4", "6", "8"]
    shutil.copytree(digits, tmp_path / "data")
    sorted((tmp_path / "data/val/4").iterdir())[0].write_bytes(b"no picture")
    data = cp.open_images(checkpoint, tmp_path / "data")
    pictures = export.example_pictures(data, 12)
    assert len(pictures) == 12
    assert [name for name, _ in pictures[:5]] == ["0", "1", "2", "3", "5"]
    assert all(picture.mode == "RGB" for _, picture in pictures)
