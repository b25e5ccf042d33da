"""Asking a trained model what pictures show. Run: python -m pytest tests/runs/test_predict.py"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from patching import set_everywhere
from PIL import Image
from places import SCRIPT
from small import TINY, needs_two_cpus, small_model
from torchvision.datasets import ImageFolder

from split_affinity import ALLOWED_CPUS, process_cpus
from split_affinity.checkpoints.state import read_checkpoint, versions
from split_affinity.data.classes import named_classes
from split_affinity.data.decoding import open_image
from split_affinity.data.loader import Loader, picture_loader
from split_affinity.data.pictures import load_image
from split_affinity.data.transforms import resize_picture, validation_transform
from split_affinity.models.own import Hybrid
from split_affinity.models.pretrained import IMAGENET_MEAN, Preprocessing, Pretrained
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.settings import Settings
from split_affinity.runs import predict as predicting
from split_affinity.runs.predict import class_probabilities, likeliest_classes, load_trained
from split_affinity.runs.unlike import Threshold
from split_affinity.training.update import TrainState
from train_split_affinity import main

NOTE = "note: no picture is called unlike all of these: "
NOTE += "12 validation images are too few, 20 are needed"
TRAINED = "--model small --image-size 32 --val-resize 40 --std 0.2,0.3,0.4 -b 4 -j 0 --epochs 2"


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """`--model small`, and no pictures of runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OWN_MODELS, "small", small_model)
        for name in ("draw_timelines", "draw_curves", "draw_gradients", "draw_confusion"):
            set_everywhere(patch, name, lambda *args: None)
        yield


@pytest.fixture(scope="module")
def checkpoint(photos_with_val, tmp_path_factory):
    """The best checkpoint of a run with a moving average."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    options = ["--data-path", str(photos_with_val), "--output-dir", str(folder), "--model-ema"]
    options += ["--log-file", str(folder.parent / "logs.md")]
    assert main([*TRAINED.split(), *options]) == 0
    return folder / "best.pt"


@pytest.fixture
def ask(checkpoint, in_tmp, capsys):
    """`predict` with that checkpoint: the answers in its file, and what was printed.

    But for the note that its validation gives no threshold for unlike pictures.
    """

    def run(*arguments, code=0):
        capsys.readouterr()
        options = ["--resume", str(checkpoint), "--json", "answers.json", *map(str, arguments)]
        assert main(["predict", *options]) == code
        out, err = capsys.readouterr()
        assert err.count(f"{NOTE}\n") == 1
        captured = SimpleNamespace(out=out, err=err.replace(f"{NOTE}\n", ""))
        return json.loads(Path("answers.json").read_text()), captured

    return run


def of_path(answers):
    """Each picture's classes and probabilities, by its path."""
    return {
        each["path"]: dict(zip(each["classes"], each["probabilities"], strict=True))
        for each in answers["pictures"]
    }


# Answers


def test_the_probabilities_are_those_of_the_validation_to_the_last_bit(
    ask, photos_with_val, checkpoint, monkeypatch, capsys
):
    evaluate, expected = TrainState.evaluate, []

    def evaluated(train_state, batch):
        with torch.inference_mode():
            average, _ = train_state.evaluated()
            assert average is not train_state.average.model, "its norms are folded"
            logits, _ = train_state.network.forward(batch, average)
            expected.append(logits.softmax(1))
        return evaluate(train_state, batch)

    monkeypatch.setattr(TrainState, "evaluate", evaluated)
    assert main(["--test-only", "--resume", str(checkpoint), "--split", "none"]) == 0
    answers, _ = ask(photos_with_val / "val")
    files = [path for path, _ in ImageFolder(photos_with_val / "val").samples]
    assert [each["path"] for each in answers["pictures"]] == files
    got = [[each["flower"], each["temple"]] for each in of_path(answers).values()]
    assert len(expected) == 3
    assert torch.equal(torch.tensor(got), torch.cat(expected))
    assert len({each[0] for each in got}) > 6, "pictures differ"


def test_what_made_the_answers_stands_beside_them(ask, photos_with_val, checkpoint):
    answers, _ = ask(photos_with_val / "val/flower", "--precision", "fp32")
    made_by = {key: value for key, value in answers.items() if key != "pictures"}
    assert made_by == {
        "checkpoint": str(checkpoint),
        "weights": None,
        "model": "small",
        "preprocessing": {
            "image_size": 32,
            "val_resize": 40,
            "interpolation": "bilinear",
            "mean": list(IMAGENET_MEAN),
            "std": [0.2, 0.3, 0.4],
        },
        "precision": "fp32",
        "versions": versions(),
        "threshold": None,
        "broken": [],
    }


def test_answers_are_all_that_is_printed(ask, photos_with_val):
    folder = photos_with_val / "val/temple"
    answers, captured = ask(folder)
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert len(lines) == 3 * len(list(folder.iterdir()))
    first = answers["pictures"][0]
    assert first["probabilities"] == sorted(first["probabilities"], reverse=True)
    figures = zip(first["probabilities"], first["classes"], strict=True)
    texts = [f"{100 * share:10.2f} %  {name}" for share, name in figures]
    assert lines[:3] == [first["path"], *texts]


def test_the_five_likeliest_of_many_classes():
    shares = torch.tensor([0.05, 0.2, 0.05, 0.3, 0.15, 0.05, 0.2])
    answer = likeliest_classes(shares, "abcdefg", "some/cat.jpg")
    assert answer.classes == ["d", "b", "g", "e", "a"], "of equals the first one comes first"
    assert answer.probabilities == [shares[i].item() for i in (3, 1, 6, 4, 0)]
    lines = ["some/cat.jpg", "     30.00 %  d", "     20.00 %  b", "     20.00 %  g"]
    assert str(answer).splitlines()[:4] == lines


@pytest.mark.parametrize("options", ["-j 2", "-b 5", "-b 1 -j 1", "--split none", "-b 99"])
def test_batches_loaders_and_cores_change_no_answer(ask, photos_with_val, options):
    options = [*options.split(), "--precision", "fp32"]
    first, _ = ask(photos_with_val / "val", "--precision", "fp32")
    other, _ = ask(photos_with_val / "val", *options)
    assert [each["path"] for each in other["pictures"]] == [
        each["path"] for each in first["pictures"]
    ]
    for path, shares in of_path(first).items():
        assert of_path(other)[path] == pytest.approx(shares, rel=1e-4)


@needs_two_cpus
def test_the_forward_group_computes_and_the_main_thread_stays_on_the_loaders_cores(
    ask, photos_with_val, monkeypatch
):
    real, places, (first, second) = class_probabilities, [], sorted(ALLOWED_CPUS)[:2]

    def seen(*args):
        places.append((process_cpus(), torch.get_num_threads()))
        return real(*args)

    set_everywhere(monkeypatch, "class_probabilities", seen)
    cores = ["--forward-cores", str(second), "--backward-cores", str(first)]
    ask(photos_with_val / "val", *cores, "--forward-threads", "2")
    assert places == 3 * [({second}, 2)]


def test_no_more_loaders_are_started_than_there_are_batches(in_tmp, monkeypatch):
    monkeypatch.setattr(Loader, "_start", lambda loader: None)
    for pictures, workers in ((1, 0), (4, 0), (5, 2), (12, 3), (99, 3)):
        settings = Settings(batch_size=4, workers=3)
        loader = picture_loader(pictures * ["x"], Preprocessing(), settings, (0,))
        assert loader._loader.num_workers == workers


def test_another_size_is_made_ready_in_proportion(ask, photos_with_val):
    picture = [photos_with_val / "val/temple/0000.jpg", "--precision", "fp32"]
    answers, _ = ask(*picture, "--image-size", "64")
    assert (answers["preprocessing"]["image_size"], answers["preprocessing"]["val_resize"]) == (
        64,
        80,
    )
    own, _ = ask(*picture)
    assert of_path(own) != of_path(answers)


def test_pictures_that_are_unlike_all_classes(
    checkpoint, in_tmp, photos_with_val, monkeypatch, capsys
):
    """The same from the screen, the JSON and the table, and for another preprocessing nothing."""
    row = read_checkpoint(checkpoint)["progress"]["history"][-1]
    assert (row["unlike_score"], row["unlike_threshold"], row["unlike_images"]) == ("msp", None, 12)
    command = ["predict", str(photos_with_val / "val"), "--resume", str(checkpoint)]
    command += ["--json", "a.json", "--csv", "a.csv", "--precision", "fp32"]
    assert main(command) == 0
    shares = [
        each["probabilities"][0] for each in json.loads(Path("a.json").read_text())["pictures"]
    ]
    middle = Threshold(sorted(shares)[5], 30)
    monkeypatch.setattr(predicting, "find_threshold", lambda saved: (middle, ""))
    capsys.readouterr()
    assert main(command) == 0
    out, err = capsys.readouterr()
    answers, table = (
        json.loads(Path("a.json").read_text()),
        [*csv.reader(Path("a.csv").read_text().splitlines())],
    )
    expected = [share < middle.probability for share in shares]
    assert sum(expected) == 5
    assert [each["unlike"] for each in answers["pictures"]] == expected
    assert answers["threshold"] == vars(middle) | {"score": "msp"}
    named = [line.endswith(": unlike all of these") for line in out.splitlines() if ".jpg" in line]
    assert named == expected
    assert table[0] == "picture,class,probability,unlike,class 2,probability 2,error".split(",")
    assert [row[3] for row in table[1:]] == [str(each).lower() for each in expected]
    assert err.startswith("note: 5 of 12 pictures called unlike all of these: ")
    assert err.count("\n") == 1
    assert main([*command, "--image-size", "64"]) == 0
    assert "note: no picture is called unlike all of these: pictures are made ready" in (
        capsys.readouterr().err
    )
    assert json.loads(Path("a.json").read_text())["pictures"][0]["unlike"] is None


def test_answers_as_a_table(ask, photos_with_val):
    """A row for each picture in order, broken ones too; no name is a formula."""
    names = ["=1+1.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    for name in names:
        shutil.copy(photos_with_val / "val/flower/0001.jpg", name)
    Path("b.jpg").write_text("no picture")
    answers, _ = ask(*names, "-b", "2", "--csv", "a.csv", code=1)
    header, *rows = csv.reader(Path("a.csv").read_text().splitlines())
    assert [row[0] for row in rows] == ["'=1+1.jpg", *names[1:]]
    assert header[-1] == "error"
    assert rows[1][1:6] == 5 * [""]
    assert rows[1][6].startswith("broken image b.jpg: ")
    for row, each in zip([rows[0], *rows[2:]], answers["pictures"], strict=True):
        assert [row[1], row[4]] == each["classes"]
        assert [float(row[2]), float(row[5])] == pytest.approx(each["probabilities"], abs=1e-6)
        assert (row[3], row[6]) == ("", "")


# Pictures


def test_heic_with_pillow_heif_and_without(ask, photos_with_val, monkeypatch, capsys, checkpoint):
    pytest.importorskip("pillow_heif").register_heif_opener()
    jpeg = photos_with_val / "val/flower/0001.jpg"
    for name in ("new/1.HEIC", "new/2.heic"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.open(jpeg).save(name, "HEIF", quality=95)
    shutil.copy(jpeg, "new/3.jpg")
    answers, _ = ask("new", "--precision", "fp32")
    first, second, third = of_path(answers).values()
    assert first == second == pytest.approx(third, abs=0.05)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    answers, captured = ask("new", "new/1.HEIC", code=1)
    assert list(of_path(answers)) == ["new/3.jpg"]
    error = "error: 2 HEIC pictures (pip install pillow-heif) cannot be read\n"
    assert captured.err == f"train_split_affinity.py: {error}"
    assert answers["broken"][0] == "new/1.HEIC: HEIC picture (pip install pillow-heif)"
    assert main(["predict", "new/1.HEIC", "--resume", str(checkpoint)]) == 2
    error = "new/1.HEIC: HEIC picture (pip install pillow-heif)\n"
    assert capsys.readouterr().err == f"train_split_affinity.py: error: {error}"


def test_files_folders_and_patterns(ask, photos_with_val):
    source = photos_with_val / "val/flower/0001.jpg"
    for name in (
        "b/2.JPG",
        "b/deep/er/1.jpg",
        "b/.hidden.jpg",
        "b/.cache/3.jpg",
        "odd.data",
        "a1.jpg",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, name)
    Path("b/readme.txt").write_text("no picture")
    Path("b/folder.jpg").mkdir()
    answers, _ = ask("odd.data", "b", "a[0-9].jpg", "a1.jpg", "**/1.jpg")
    paths = [each["path"] for each in answers["pictures"]]
    assert paths == [
        "odd.data",
        "b/2.JPG",
        "b/deep/er/1.jpg",
        "a1.jpg",
        "a1.jpg",
        "b/deep/er/1.jpg",
    ]
    assert len({tuple(each["probabilities"]) for each in answers["pictures"]}) == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg: no such file or folder"),
        ("no*.jpg", "no*.jpg: no such file or folder"),
        ("empty", "empty: no picture there (.jpg, .jpeg, .png, "),
        ("emp*", "emp*: no picture there (.jpg, .jpeg, .png, "),
    ],
)
def test_no_pictures_are_an_error(checkpoint, in_tmp, capsys, photos, argument, message):
    Path("empty").mkdir()
    Path("empty/readme.txt").touch()
    options = ["--resume", str(checkpoint), "--json", "a.json"]
    assert main(["predict", str(photos), argument, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"train_split_affinity.py: error: {message}")
    assert captured.err.count("\n") == 1
    assert not Path("a.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_and_the_rest_is_done(ask, photos_with_val, workers):
    whole = photos_with_val / "val/flower/0001.jpg"
    for number in range(5):
        shutil.copy(whole, f"{number}.jpg")
    Path("3.jpg").write_bytes(whole.read_bytes()[:300])
    Path("1.jpg").write_text("no picture")
    Path("nothing.txt").touch()
    answers, captured = ask("[0-4].jpg", "nothing.txt", "-b", "3", "-j", workers, code=1)
    assert list(of_path(answers)) == ["0.jpg", "2.jpg", "4.jpg"]
    *named, error = captured.err.splitlines()
    assert [text.partition(": ")[2].partition(": ")[0] for text in named] == [
        "broken image 1.jpg",
        "broken image 3.jpg",
        "broken image nothing.txt",
    ]
    assert [f"warning: {text}" for text in answers["broken"]] == named
    assert error == "train_split_affinity.py: error: 3 of 6 pictures cannot be read"
    answers, _ = ask("1.jpg", code=1)
    assert answers["pictures"] == []


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("place", ["load_image", "open_image", "resize_picture"])
def test_a_picture_too_large_for_the_memory_costs_no_other_its_answer(
    ask, photos_with_val, monkeypatch, place, workers
):
    folder = Path("pictures")
    shutil.copytree(photos_with_val / "val/temple", folder)
    Image.new("RGB", (77, 99)).save(folder / "huge.png")
    functions = load_image, open_image, resize_picture
    real = {each.__name__: each for each in functions}[place]
    full = ["--full-decode"] if place == "load_image" else []

    def fail(*args):
        if "huge" in str(args) or (77, 99) in [getattr(each, "size", None) for each in args]:
            raise MemoryError
        return real(*args)

    set_everywhere(monkeypatch, place, fail)
    answers, captured = ask("-j", workers, "-b", "3", folder, *full, code=1)
    assert len(answers["pictures"]) == 6
    assert answers["broken"][0].startswith("broken image pictures/huge.png")
    assert captured.err.count("huge.png") == 1
    assert "there is not enough memory for it" in captured.err


def test_folders_that_links_lead_to(ask, photos_with_val):
    """As in training: those elsewhere too, each once, and no loop."""
    Path("new/deep").mkdir(parents=True)
    shutil.copy(photos_with_val / "val/flower/0001.jpg", "new/deep/1.jpg")
    Path("new/linked").symlink_to(photos_with_val / "val/temple")
    Path("new/linked too").symlink_to("linked")
    Path("new/loop").symlink_to("..")
    Path("new/nowhere").symlink_to("nothing")
    answers, captured = ask("new")
    assert [*of_path(answers)] == [
        "new/deep/1.jpg",
        *(f"new/linked/{number:04}.jpg" for number in range(6)),
    ]
    assert captured.err == ""


def test_a_folder_that_cannot_be_read_is_named(ask, photos_with_val, monkeypatch):
    """The system lets the superuser read anything, so the refusal is a stand-in."""
    shutil.copytree(photos_with_val / "val/temple", "new/temple")
    shutil.copytree(photos_with_val / "val/temple", "new/secret")
    real = os.scandir

    def scan(place):
        if "secret" in str(place):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scan)
    told = "new/secret: folder cannot be read: Permission denied"
    for arguments in (["new"], ["new", "new/temple/0001.jpg", "n*"]):
        answers, captured = ask(*arguments, code=1)
        assert len(of_path(answers)) == 6
        assert answers["broken"] == [told]
        ending = "train_split_affinity.py: error: 1 folder cannot be read"
        assert captured.err.splitlines() == [f"warning: {told}", ending]
    Path("new/temple/1.jpg").write_text("no picture")
    _, captured = ask("new", code=1)
    assert "error: 1 of 7 pictures and 1 folder cannot be read\n" in captured.err
    assert main(["predict", "--weights", "DEFAULT", "new/secret"]) == 2


def test_lines_of_pixels_are_answered(ask, photos_with_val):
    for number, size in enumerate([(1, 30_000), (30_000, 1), (1, 1)]):
        Image.new("RGB", size).save(f"{number}.png")
    answers, _ = ask("0.png", "1.png", "2.png", photos_with_val / "val/flower")
    assert len(answers["pictures"]) == 9


def test_pictures_are_read_as_in_training(ask, photos_with_val):
    """Turned by EXIF data, of 16 bits, of a palette, with an alpha channel."""
    picture = Image.open(photos_with_val / "val/flower/0001.jpg")
    turned, exif = picture.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    picture.save("upright.png")
    turned.save("turned.png", exif=exif)
    picture.convert("L").save("grey.png")
    grey = picture.convert("L").convert("I").point(lambda value: value * 257)
    grey.convert("I;16").save("deep.png")
    picture.convert("RGBA").save("alpha.png")
    shares = of_path(
        ask("-b", "1", *(f"{name}.png" for name in ("upright", "turned", "grey", "deep", "alpha")))[
            0
        ]
    )
    assert shares["turned.png"] == shares["upright.png"] == shares["alpha.png"]
    assert shares["deep.png"] == shares["grey.png"] != shares["upright.png"]


def test_a_name_that_is_not_utf_8(ask, photos_with_val, checkpoint):
    name = os.fsdecode(b"caf\xe9.jpg")
    shutil.copy(photos_with_val / "val/flower/0001.jpg", name)
    answers, captured = ask(".")
    assert [each["path"] for each in answers["pictures"]] == [r"caf\xe9.jpg"]
    assert captured.out.startswith(r"caf\xe9.jpg")


# Trained models


def test_a_trained_model_as_a_value(checkpoint, photos_with_val):
    threads = torch.get_num_threads()
    trained = load_trained(checkpoint)
    average = read_checkpoint(checkpoint)["average"]
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, average[name]), name
    assert not any(module.training for module in trained.model.modules())
    assert trained.classes == ["flower", "temple"]
    assert trained.ready == Preprocessing(32, 40, std=(0.2, 0.3, 0.4))
    assert (trained.settings.model, trained.settings.num_classes) == ("small", 2)
    assert trained.settings.data_path == photos_with_val
    other = load_trained(checkpoint, Settings(image_size=64, mean=(0.1, 0.1, 0.1)))
    assert other.ready == Preprocessing(64, 80, "bilinear", (0.1, 0.1, 0.1), (0.2, 0.3, 0.4))
    assert other.settings.image_size == 64
    assert torch.get_num_threads() == threads


def test_classes_beyond_those_of_the_data_have_numbers():
    assert named_classes(["cat", "dog"], 4) == ["cat", "dog", "class 2", "class 3"]
    assert named_classes((), 2) == ["class 0", "class 1"]


@pytest.fixture
def by_name(checkpoint, monkeypatch):
    """Trained weights that have a name: those of the checkpoint, for three other classes."""
    torch.manual_seed(1)
    weights = small_model(3, 48).state_dict()
    known = Pretrained(("ant", "bee", "cat"), Preprocessing(48, 64), lambda: weights)
    asked = []

    def find(model, name, *args, **options):
        asked.append((model, name))
        return known

    set_everywhere(monkeypatch, "find_weights", find)
    return weights, asked


def test_weights_by_name_instead_of_a_checkpoint(by_name, in_tmp, photos_with_val):
    weights, asked = by_name
    picture = photos_with_val / "val/flower/0001.jpg"
    options = ["--weights", "W", "--model", "small", "--precision", "fp32", "--json", "a.json"]
    assert main(["predict", str(picture), *options, "--split", "none"]) == 0
    assert set(asked) == {("small", "W")}
    answers = json.loads(Path("a.json").read_text())
    assert (answers["checkpoint"], answers["weights"], answers["model"]) == (None, "W", "small")
    assert answers["preprocessing"]["val_resize"] == 64
    model = small_model(3, 48).eval()
    model.load_state_dict(weights)
    image = validation_transform(Preprocessing(48, 64))(load_image(str(picture)))
    with torch.inference_mode():
        logits = model.to(memory_format=torch.channels_last)(image[None])
    order = logits[0].argsort(descending=True).tolist()
    (shares,) = of_path(answers).values()
    assert list(shares) == [("ant", "bee", "cat")[i] for i in order]
    expected = logits[0].softmax(0)[order].tolist()
    assert list(shares.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "predict needs a trained model: give --resume PATH, or --weights NAME and --model"),
        (["--resume", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--resume", str(SCRIPT)], f"{SCRIPT}: damaged, or no checkpoint of this program"),
        (["--resume", "GOOD", "--model", "resnet18"], "--model resnet18: GOOD has small"),
        (["--resume", "GOOD", "--weights", "W"], "--resume GOOD and --weights W: give one"),
        (["--init-from", "GOOD"], "--init-from GOOD: predict takes --resume PATH or --weights"),
        (["--resume", "auto"], "--resume auto needs --output-dir, where checkpoints are"),
        (["--resume", "auto", "--output-dir", "."], "--resume auto: no checkpoint in ."),
        (["--resume", "GOOD", "--forward-cores", "9999"], "--forward-cores 9999: CPU 9999 is not"),
        (
            ["--resume", "GOOD", "--json", "no/a.json"],
            "--json no/a.json: cannot be written: No such",
        ),
        (["--resume", "GOOD", "--csv", "no/a"], "--csv no/a: cannot be written: No such"),
        (["--weights", "W", "--model", "resnet5"], "--model resnet5: unknown; did you mean"),
        (["--weights", "W", "--model", "small"], "--weights W: small has "),
    ],
)
def test_bad_input_is_one_line(checkpoint, in_tmp, capsys, photos, options, message):
    options = [text.replace("GOOD", str(checkpoint)) for text in options]
    assert main(["predict", str(photos), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        f"train_split_affinity.py: error: {message.replace('GOOD', str(checkpoint))}"
    )
    assert captured.err.count("\n") == 1
    assert not list(in_tmp.iterdir())


def test_the_newest_checkpoint_of_a_folder(checkpoint, in_tmp, photos_with_val, capsys):
    options = ["--resume", "auto", "--output-dir", str(checkpoint.parent), "--json", "a.json"]
    assert main(["predict", str(photos_with_val / "val"), *options]) == 0
    answers = json.loads(Path("a.json").read_text())
    assert answers["checkpoint"] == str(checkpoint.parent / "last.pt")


def test_another_size_that_the_model_cannot_have(in_tmp, photos_with_val, capsys, monkeypatch):
    """Positions of a transformer are made for one size."""
    monkeypatch.setitem(
        OWN_MODELS,
        "small",
        lambda classes, size: Hybrid(classes, size, (8, 16, 24, 32), width=32, blocks=1),
    )
    options = [*TRAINED.split(), "--data-path", str(photos_with_val), "--output-dir", "out"]
    assert main(options) == 0
    picture = str(photos_with_val / "val/flower/0001.jpg")
    assert main(["predict", picture, "--resume", "out/last.pt"]) == 0
    capsys.readouterr()
    assert main(["predict", picture, "--resume", "out/last.pt", "--image-size", "64"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "train_split_affinity.py: error: out/last.pt does not fit --model small"
    )
    assert error.count("\n") == 1


def test_a_signal_ends_it_between_two_batches(
    ask, photos_with_val, monkeypatch, capsys, checkpoint
):
    real = class_probabilities

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    set_everywhere(monkeypatch, "class_probabilities", interrupted)
    options = ["--resume", str(checkpoint), "--json", "a.json"]
    assert main(["predict", str(photos_with_val / "val"), *options]) == 130
    captured = capsys.readouterr()
    assert captured.err == "train_split_affinity.py: stopped by SIGINT\n"
    assert captured.out.count(".jpg\n") == 4, "one batch"
    assert not Path("a.json").exists()


def test_progress_is_shown_on_a_terminal_if_there_are_many(ask, photos_with_val, monkeypatch):
    """And nowhere else."""
    _, captured = ask(*9 * [photos_with_val / "val"])
    assert captured.err == "", "no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, captured = ask(photos_with_val / "val")
    assert captured.err == ""
    _, captured = ask(*9 * [photos_with_val / "val"])
    assert "| 0/108 [" in captured.err


@pytest.mark.slow
def test_as_a_process(in_tmp, photos_with_val):
    """From another folder than the one that the model was trained in, and without its images."""
    shutil.copytree(photos_with_val, "data")
    script = [sys.executable, SCRIPT]
    options = [*TINY, "--steps", "1", "--data-path", "data", "--output-dir", "out"]
    subprocess.run([*script, *options], check=True, capture_output=True, timeout=120)
    shutil.move("data/val/flower/0001.jpg", "new.jpg")
    shutil.rmtree("data")
    Path("elsewhere").mkdir()
    done = subprocess.run(
        [*script, "predict", "../new.jpg", "--resume", "../out/last.pt"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="elsewhere",
    )
    (note,) = done.stderr.splitlines()
    assert (done.returncode, note.startswith("note: no picture is called unlike ")) == (0, True)
    assert done.stdout.startswith("../new.jpg\n")
    assert len(done.stdout.splitlines()) == 4
    assert not list(Path("elsewhere").iterdir())
