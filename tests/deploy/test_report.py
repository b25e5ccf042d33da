"""The report: its figures against scikit-learn and the trainer, its heat maps against closed forms,
its advice case by case, and the page in a browser.

Run: pip install -r tests/deploy/requirements.txt && python -m pytest tests/deploy/test_report.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import advice
import charts
import checkpoint as cp
import feature_maps
import figures
import heat_maps
import next_steps
import numpy as np
import pytest
import report
import run_records
import torch
from PIL import Image
from sklearn import metrics
from torch import nn

from split_affinity.checkpoints.state import best_epoch, read_checkpoint
from split_affinity.data.classes import confused_classes
from split_affinity.data.transforms import validation_transform
from split_affinity.errors import RunError, UserError
from split_affinity.models.pretrained import Preprocessing
from split_affinity.models.registry import build_model
from split_affinity.options.settings import Settings
from split_affinity.reports.confusion import confused_json
from split_affinity.runs.predict import Trained
from split_affinity.training.network import Confusion
from train_split_affinity import main

BAD_NAME = """<script>alert(1)<\u2044script>&"'"""  # a folder's name has no slash
BROWSERS = "chromium", "chromium-browser", "google-chrome"


def made_judged(true, predicted, p_predicted=None, classes=4):
    """Judged images, from their true and predicted classes."""
    true, predicted = torch.tensor(true), torch.tensor(predicted)
    sure = torch.full((len(true),), 0.9) if p_predicted is None else torch.tensor(p_predicted)
    p_true = torch.where(true == predicted, sure, (1 - sure) / (classes - 1))
    numbers = torch.arange(len(true))
    return figures.Judged(numbers, true, predicted, true >= 0, -p_true.log(), sure, p_true)


# Figures


@pytest.fixture(scope="module")
def logits():
    """Logits (200, 6) that are right more often than not, and the true classes; one of the six has
    no images, one is never predicted.
    """
    generator = torch.Generator().manual_seed(3)
    true = torch.randint(0, 5, (200,), generator=generator)
    made = torch.randn(200, 6, generator=generator) + 2 * nn.functional.one_hot(true, 6)
    made[:, 1] -= 20
    return made, true


def test_scores_are_scikit_learns(logits):
    judged = figures.judge(*logits, torch.arange(200))
    scores = figures.scores_of(judged, 6)
    made, true = (each.numpy() for each in logits)
    assert scores.top1.value == metrics.accuracy_score(true, made.argmax(1))
    assert scores.top5.value == metrics.top_k_accuracy_score(true, made, k=5, labels=range(6))
    shares = logits[0].double().softmax(1).numpy()
    assert scores.loss == pytest.approx(metrics.log_loss(true, shares, labels=range(6)), rel=1e-6)
    error = judged.loss.double().std().item() / 200**0.5
    assert scores.loss_ends == pytest.approx(
        (scores.loss - 1.96 * error, scores.loss + 1.96 * error), rel=1e-4
    )


def test_figures_by_class_are_scikit_learns(logits):
    judged = figures.judge(*logits, torch.arange(200))
    found = figures.class_figures(judged, "abcdef")
    precision, recall, f1, images = metrics.precision_recall_fscore_support(
        judged.true, judged.predicted, labels=range(6), zero_division=np.nan
    )
    for each in found:
        values = each.recall, each.precision
        for share, wanted in zip(values, (recall[each.index], precision[each.index]), strict=True):
            assert share.value == pytest.approx(wanted) if share else math.isnan(wanted)
        if each.f1 is not None:
            assert each.f1 == pytest.approx(f1[each.index])
        assert (each.recall.of if each.recall else 0) == images[each.index]
    shares = [each.recall.value for each in found if each.recall]
    assert shares == sorted(shares) and found[-1].name == "f" and not found[-1].recall
    matrix = metrics.confusion_matrix(judged.true, judged.predicted, labels=range(6))
    assert figures.confusion_of(judged) == {
        (i, j): matrix[i, j] for i, j in zip(*matrix.nonzero(), strict=True)
    }


def test_wilsons_interval_is_that_of_the_textbook():
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    assert figures.Share(81, 263).ends == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert figures.Share(10, 10).ends[1] == 1


def test_calibration_error_is_the_mean_gap():
    """Of 100 answers at 0.8 90 are right, of 50 at 0.5 20 are: (100 * 0.1 + 50 * 0.1) / 150."""
    right = [True] * 90 + [False] * 10 + [True] * 20 + [False] * 30
    sure = [0.8] * 100 + [0.5] * 50
    judged = made_judged([0] * 150, [0 if each else 1 for each in right], sure)
    found = figures.calibration_of(judged)
    assert found.error == pytest.approx(0.1, abs=1e-6)
    assert [(each.right.count, each.right.of) for each in found.bins] == [(20, 50), (90, 100)]
    chart, dots = charts.reliability(found)
    assert dots[1].x == chart.x.place(80) and dots[1].y == chart.y.place(90)


def test_curves_of_shares_end_at_all_of_them():
    series = {"train": [86.0, 90.0], "validation": [None, 100.0]}
    chart = charts.line_chart("Right answers, %", [1, 2], series, best=2, most=100)
    assert chart.y.high == 100 and chart.y.place(100) == charts.TOP
    assert max(float(text) for _, text in chart.y.marks) <= 100
    assert [len(line.dots) for line in chart.lines] == [2, 1]
    assert charts.line_chart("Loss", [], {"train": []}) is None


def test_the_marks_of_small_rates_have_room():
    chart = charts.line_chart("Learning rate", [1, 2], {"learning rate": [0.00625, 0.00625]})
    assert chart.y.low == 0 and chart.y.high >= 0.00625
    assert max(len(text) for _, text in chart.y.marks) * 7.5 < charts.LEFT  # units a character


def test_certain_answers_are_in_the_last_bin():
    found = figures.calibration_of(made_judged([0, 0], [0, 1], [1.0, 0.99]))
    assert len(found.bins) == 1 and found.bins[0].right == figures.Share(1, 2)


def test_pictures_are_chosen_by_the_probability_of_the_right_class():
    judged = made_judged([0, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0.9, 0.8, 0.6, 0.9, 0.7])
    assert figures.best_and_worst(judged, 0, 1) == ([0], [1])
    assert figures.best_and_worst(judged, 0, 3) == ([0, 4, 2], [1])
    assert figures.best_and_worst(judged, 1, 2) == ([3], [])
    assert figures.confused_rows(judged, 0, 1, 3) == [1]


def test_of_many_classes_the_matrix_has_those_that_are_confused():
    confusion = Confusion({(0, 0): 9, (7, 30): 5, (3, 4): 1, (9, 2): 2})
    assert figures.readable_matrix(confusion, 40, 4) == [2, 7, 9, 30]
    assert figures.readable_matrix(confusion, 4, 4) == [0, 1, 2, 3]


def test_a_model_that_diverged_is_refused():
    part = figures.judge(torch.full((2, 3), math.nan), torch.tensor([0, 1]), torch.arange(2))
    with pytest.raises(RunError, match="no finite numbers"):
        figures.combine_judged([part])


# Advice


def rows(*values):
    """A history of (train_loss, train_top1, val_loss, val_top1) by epoch."""
    names = "train_loss", "train_top1", "val_loss", "val_top1"
    return [
        {"epoch": number, **dict(zip(names, each, strict=True))}
        for number, each in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("history", "options", "title"),
    [
        (rows((1, 50, 1, 50), (0.5, 95, 1.1, 94)), {}, "Overfitting: the validation loss rises"),
        (rows((1, 50, 1, 50), (1.1, 95, 1.1, 94)), {}, "Neither"),  # both losses rose
        (rows((1, 50, 1, 50), (0.5, 95, 1.09, 94)), {}, "Neither"),
        (rows((1, 50, 1, 50), (0.5, 95, 0.9, 85)), {}, "Overfitting: known images"),
        (rows((1, 50, 1, 50), (0.5, 95, 0.9, 85)), {"mixup_alpha": 0.2}, "Neither"),
        (rows((1, 50, 1, 50), (0.9, 80, 0.9, 79)), {}, "Underfitting"),
        (rows((1, 50, 1, 50), (0.9, 80, 0.9, 90)), {}, "Neither"),
        (rows((1, 50, 1, 50), (0.5, 95, 0.9, 94)), {"epochs": 2}, "Perhaps not at its end"),
        (rows((1, 50, 1, 50), (0.5, 95, 0.9, 94)), {"epochs": 3}, "Neither"),
    ],
)
def test_fit_is_judged_by_its_cases(history, options, title):
    found = advice.judge_fit(history, Settings(**options))
    assert found.title.startswith(title)
    assert bool(found.to_do) == (title != "Neither")


STRONG = {"auto_augment": "ta", "mixup_alpha": 0.4, "cutmix_alpha": 0.5, "random_erase": 0.1}
SURE_OF_ALL, UNSURE = (made_judged([0] * 100, [0] * 80 + [1] * 20, [p] * 100) for p in (0.99, 0.6))


def calibrated(judged, settings):
    scores = figures.scores_of(judged, 4)
    return advice.judge_calibration(figures.calibration_of(judged), scores, settings)


@pytest.mark.parametrize(
    ("case", "options", "advised", "unsaid"),
    [
        ("over", {}, "(--auto-augment ra or --mixup-alpha 0.2) or more --weight-de", ""),
        ("over", {"auto_augment": "aa"}, "n (--mixup-alpha 0.2 or --random", "auto-aug"),
        ("over", STRONG | {"weight_decay": 0.0}, "s or --weight-decay 0.0001", "stron"),
        ("under", {}, "or take a larger model.", "augment less"),
        ("under", {"auto_augment": "ta"}, "augment less than by --auto-augment ta.", "mixup"),
        ("under", {"freeze": "body"}, "train all weights (without --freeze body)", "(--weights)"),
        ("sure", {}, "Train with --label-smoothing 0.1 or --mixup-alpha 0.2, or", "cutmix"),
        ("sure", {"label_smoothing": 0.2}, "--mixup-alpha 0.2 or --cutmix-alpha 1.0", "smooth"),
        ("sure", STRONG | {"label_smoothing": 0.1}, "with more than --label-smoothing 0.1 or", ""),
        ("unsure", {}, "Train longer (--epochs).", "less"),
        ("unsure", {"mixup_alpha": 0.4}, "less than --mixup-alpha 0.4, or longer", "smoothing"),
    ],
)
def test_advice_changes_only_what_is_in_force(case, options, advised, unsaid):
    settings = Settings(**options)
    if case == "over":
        risen = rows((1, 50, 1, 50), (0.5, 95, 1.1, 94))  # which images that are mixed tell, too
        found = advice.judge_fit(risen, settings)
    elif case == "under":
        found = advice.judge_accuracies(80, 79, "", settings)
    else:
        found = calibrated(SURE_OF_ALL if case == "sure" else UNSURE, settings)
    assert advised in found.to_do
    assert not unsaid or unsaid not in found.to_do


def test_pairs_that_were_augmented_already_are_not_to_be_augmented():
    confusion = Confusion({(0, 0): 90, (0, 1): 10})
    settings = Settings(augment_confused=Path("confused.json"))
    found = advice.pairs_to_augment(confusion, "ab", None, settings)
    assert found.title == "1 pair of classes that are confused" and "already" in found.to_do


def test_where_nothing_stands_out_it_is_said_first_with_figures():
    judged = made_judged([0, 1] * 12, [0, 1] * 11 + [0, 0], [0.95] * 24)
    scores, by_class = figures.scores_of(judged, 2), figures.class_figures(judged, ["a", "b"])
    well = advice.Finding("well", "0")
    found = advice.in_order(scores, by_class, [None, well])
    assert [each.title for each in found] == ["Nothing stands out", "Few validation images", "well"]
    assert "23 of 24 images are right (95.8\u00a0%; " in found[0].figures
    assert "lowest accuracy, b, 11 of 12 images" in found[0].figures
    todo = advice.Finding("todo", "0", "do it")
    titles = [each.title for each in advice.in_order(scores, by_class, [well, None, todo])]
    assert titles == ["todo", "Few validation images", "well"]


def test_one_epoch_tells_nothing_of_the_fit():
    assert advice.judge_fit(rows((1, 50, 1, 50))) is None
    assert advice.judge_fit(rows((1, 50, None, None), (1, 50, 1, 50))) is None


def test_a_class_is_weak_only_beyond_chance():
    """Of 30 images, 20 right is below 95 %; of 3, 2 right can be chance."""
    true = [0] * 300 + [1] * 30 + [2] * 3
    taken = [0] * 300 + [1] * 20 + [0] * 10 + [2] * 2 + [0]
    judged = made_judged(true, taken)
    by_class = figures.class_figures(judged, ["many", "weak", "few"])
    found = advice.weak_classes(by_class, figures.scores_of(judged, 3))
    assert found.title.startswith("1 class below the average of 96.7")
    assert "weak: 66.7\u00a0% of 30 images" in found.figures and "few:" not in found.figures
    even = made_judged([0, 1] * 9, [0, 1] * 9)
    by_class = figures.class_figures(even, "ab")
    assert advice.weak_classes(by_class, figures.scores_of(even, 2)) is None


def test_pairs_to_augment_are_those_that_training_takes(tmp_path):
    confusion = Confusion({(0, 0): 90, (0, 1): 10, (1, 2): 5, (2, 0): 4, (2, 2): 96})
    found = advice.pairs_to_augment(confusion, ["a", "b", "c"], "here.json")
    assert found.title.startswith("2 pairs") and "--augment-confused here.json" in found.to_do
    assert "a taken for b in 10 of 100 images" in found.figures and "c taken" not in found.figures
    file = tmp_path / "confused.json"
    file.write_text(confused_json(confusion, ["a", "b", "c"], "best.pt"))
    taken = confused_classes(Settings(augment_confused=file), ["a", "b", "c"])
    assert taken == [0, 1, 2]
    assert "--confused confused.json" in advice.pairs_to_augment(confusion, "abc").to_do
    assert advice.pairs_to_augment(Confusion({(0, 1): 2, (0, 0): 9}), "ab") is None


@pytest.mark.parametrize(
    ("sure", "title"),
    [(0.99, "Over-confident"), (0.6, "Under-confident"), (0.82, "Its probabilities can")],
)
def test_confidence_is_judged_by_the_interval_of_top1(sure, title):
    judged = made_judged([0] * 100, [0] * 80 + [1] * 20, [sure] * 100)
    found = advice.judge_calibration(figures.calibration_of(judged), figures.scores_of(judged, 4))
    assert found.title.startswith(title) and "80.0\u00a0%" in found.figures


def test_sure_mistakes_and_few_images_are_told_with_figures():
    judged = made_judged([0, 0, 0, 0], [0, 1, 1, 1], [0.9, 0.995, 0.991, 0.5])
    assert advice.sure_mistakes(judged).figures.startswith("2 of 3 wrong answers")
    assert advice.sure_mistakes(made_judged([0, 0], [0, 1], [0.995, 0.9])) is None
    assert "4 images" in advice.few_images(figures.scores_of(judged, 4)).figures
    many = made_judged([0] * 1000, [0] * 999 + [1])
    assert advice.few_images(figures.scores_of(many, 4)) is None


# What comes next


@pytest.mark.parametrize(
    ("typed", "started"),
    [
        (["python", "deploy/report.py", "a b.pt"], "python deploy/export.py"),
        ([".venv/bin/python", "-X", "dev", "report.py"], ".venv/bin/python -X dev export.py"),
        (["/usr/bin/python3", "-m", "pytest", "x.py"], "python deploy/export.py"),
        (["python", "-c", "import report"], "python deploy/export.py"),
    ],
)
def test_the_next_command_starts_as_this_one_did(monkeypatch, typed, started):
    is_script = typed[-1].endswith((".pt", "report.py"))
    script = next((place for place, each in enumerate(typed) if "report.py" in each), 2)
    argv = typed[script:] if is_script else ["-c", *typed[3:]]
    monkeypatch.setattr("sys.orig_argv", typed)
    monkeypatch.setattr("sys.argv", argv)
    command = next_steps.sibling_command("export.py", Path("a b.pt"), "--output-dir", "exported")
    assert command == f"{started} 'a b.pt' --output-dir exported"


@pytest.mark.parametrize(("variable", "opens"), [("DISPLAY", True), ("DISPLAY", False), ("", True)])
def test_a_page_is_opened_where_a_browser_can_be_seen(monkeypatch, capsys, variable, opens):
    asked = []
    for name in next_steps.SHOWS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("webbrowser.open", lambda address: asked.append(address) or opens)
    if variable:
        monkeypatch.setenv(variable, ":0")
    next_steps.open_page(Path("/a b/report.html"))
    assert asked == ["file:///a%20b/report.html"] * bool(variable)
    said = "no browser can be shown here: open /a b/report.html in one\n"
    assert capsys.readouterr().out == ("" if variable and opens else said)


# Heat maps


def built(name, size, classes=5):
    """A checkpoint of an untrained model."""
    torch.manual_seed(0)
    model = build_model(name, classes, size).eval()
    ready = Preprocessing(size, size)
    trained = Trained(model, [*map(str, range(classes))], ready, Settings(model=name))
    return cp.Checkpoint(Path("x.pt"), {}, trained)


def noise(size, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_grad_cam_is_cam_behind_average_pooling():
    """By Selvaraju et al. (2017), section 3.1: equal up to 1 / places."""
    checkpoint = built("resnet20", 32)
    images, classes = noise(32), [4, 0, 2]
    head = feature_maps.find_linear_head(checkpoint)
    with torch.no_grad():
        _, cam = feature_maps.WithMaps(checkpoint.model, head)(images)
    layer = feature_maps.find_map_layer(checkpoint)
    maps = heat_maps.grad_cam(checkpoint.model, layer, images, classes)
    assert maps.shape == (3, 8, 8)
    torch.testing.assert_close(64 * maps, cam[range(3), classes], rtol=1e-4, atol=1e-5)


def rest_of(model, name):
    """What each model computes after its last map, written out without changing anything in place:
    features, or tokens, to logits.
    """
    relu, pooled = nn.functional.relu, (lambda x: x.mean((2, 3)))

    def vit(normed):
        block = model.encoder.layers[-1]
        tokens = HELD["input"] + block.self_attention(normed, normed, normed)[0]
        tokens = tokens + block.mlp(block.ln_2(tokens))
        return model.heads(model.encoder.ln(tokens)[:, 0])

    def hybrid(features):
        return model.head(model.encoder(features, model.embedding(features)).mean(1))

    return {
        "densenet121": lambda x: model.classifier(pooled(relu(x))),
        "mobilenet_v3_small": lambda x: model.classifier(pooled(x)),
        "squeezenet1_1": pooled,
        "hybrid-light": hybrid,
        "vit_b_16": vit,
        "swin_t": lambda x: model.head(pooled(x)),
    }[name]


HELD: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize(
    "name",
    ["densenet121", "mobilenet_v3_small", "squeezenet1_1", "hybrid-light", "vit_b_16", "swin_t"],
)
def test_grad_cam_is_its_formula_whatever_comes_after(name):
    """Places' weights are means of gradients, even where a ReLU writes over the layer's output."""
    size = 64
    checkpoint, images, classes = built(name, size), noise(size, 2), [1, 3]
    model, layer = checkpoint.model, feature_maps.find_map_layer(checkpoint)
    hooks = [
        model.get_submodule(layer.name).register_forward_hook(
            lambda _, inputs, output: HELD.update(
                map=output.detach().clone(), input=inputs[0].detach()
            )
        )
    ]
    with torch.no_grad():
        logits = model(images)
    hooks.pop().remove()
    held = HELD["map"].requires_grad_()
    made = rest_of(model, name)(held)
    torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(made[[0, 1], classes].sum(), held)
    if layer.is_tokens:
        assert held.shape[1] == layer.grid**2 + 1
        wanted = (gradient[:, 1:].mean(1, keepdim=True) * held[:, 1:]).sum(2).unflatten(1, (4, 4))
    else:
        wanted = (gradient.mean((2, 3), keepdim=True) * held).sum(1)
    maps = heat_maps.grad_cam(model, layer, images, classes)
    torch.testing.assert_close(
        maps, wanted.detach(), rtol=1e-3, atol=1e-5 * wanted.abs().max().item()
    )
    assert all(weight.requires_grad for weight in model.parameters())


def test_heat_is_what_speaks_for_a_class_alone():
    maps = torch.tensor([[[2.0, -9.0], [-9.0, 1.0]], [[-1.0, -1.0], [-1.0, 0.0]]])
    warm = heat_maps.heat(maps, 8)
    assert warm.shape == (2, 8, 8) and warm.min() == 0 and warm[0].max() == 1
    assert warm[0, 0, 0] == 1 and warm[0, 0, -1] == 0 and warm[0, -1, -1] == 0.5
    assert not warm[1].any()
    picture = Image.new("RGB", (8, 8), "white")
    cold = heat_maps.overlay(picture, warm[1])
    assert np.array_equal(cold, picture)  # nothing is coloured


def test_pictures_are_shown_as_the_model_saw_them():
    ready = Preprocessing(24, 32, std=(0.2, 0.3, 0.4))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    image = validation_transform(ready)(Image.fromarray(pixels))
    seen = report.as_picture(image, ready)
    again = validation_transform(dataclasses.replace(ready, val_resize=24))(seen)
    assert seen.size == (24, 24)
    torch.testing.assert_close(again, image, rtol=0, atol=0.6 / 255 / 0.2)


# The page


class Page(HTMLParser):
    """What a page is made of: its tags with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def reported(tmp_path, capsys):
    """Runs the program: what it wrote, and what it printed."""

    def run(best, *options, code=0):
        output = tmp_path / "report.html"
        capsys.readouterr()
        output.unlink(missing_ok=True)
        assert report.main([str(best), "--output", str(output), *map(str, options)]) == code
        printed = capsys.readouterr()
        if code:
            assert not output.exists() and not list(tmp_path.glob("*.tmp"))
            assert len(printed.err.splitlines()) == 1 and "Traceback" not in printed.err
            return None, printed
        return output.read_text("utf-8"), printed

    return run


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory):
    """The digits with few images to validate with."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "train").symlink_to(digits / "train")
    for name in digits.joinpath("val").iterdir():
        (folder / "val" / name.name).mkdir(parents=True)
        for file in sorted(name.iterdir())[:3]:
            shutil.copy(file, folder / "val" / name.name)
    return folder


def test_figures_are_those_of_the_training(trained, reported):
    """Those that the trainer found itself, in the same precision, of the moving average."""
    best = trained("resnet20", "--precision", "fp32", "--model-ema", "--model-ema-decay", "0.5")
    page, printed = reported(best, "--per-class", "0")
    row = best_epoch(read_checkpoint(best)["progress"]["history"])
    figures_told = r"360 images: loss (\S+), top-1 (\S+) %, top-5 (\S+) %, computed in fp32\n"
    found = re.match(figures_told, printed.out)
    wanted = row["val_loss"], row["val_top1"], row["val_top5"]
    assert [*map(float, found.groups())] == pytest.approx(wanted, rel=1e-3, abs=6e-3)
    assert row["val_loss"] != row["val_raw_loss"]
    assert f"{row['val_top1']:.1f}\u00a0%" in page
    assert "the moving average" in page and "raw validation" in page
    assert "top-1 (fp32)" in page and "top-5 (fp32)" in page and "All computed in fp32" in page
    exported = f"python deploy/export.py {best} --output-dir exported"
    assert printed.out.splitlines()[-1] == f"next: {exported}"


def test_everything_is_in_one_file(best, few, reported, tmp_path):
    confused = tmp_path / "confused.json"
    html = reported(best, "--data-path", few, "--confused", confused)[0]
    page = Page(html)
    for secret in (few.parent, best.parent, Path.home(), tmp_path):
        assert str(secret) not in html and str(secret) not in confused.read_text()
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object")
        for name in {"src", "href", "action"} & attributes.keys():
            assert attributes[name].startswith("data:image/")
    for words in ("What to do next", "Grad-CAM", "stage3", "core plan", "forward", "--lr 0.02"):
        assert words in page.text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) >= 2 * 2 * 10 and all(each["alt"] for each in pictures)
    assert json.loads(confused.read_text())["images"] == 30


def test_weights_of_classes_in_the_loss_have_a_column(best, few, reported, monkeypatch):
    without = reported(best, "--data-path", few, "--per-class", "0")[0]
    assert "<th>weight</th>" not in without
    read = cp.read_checkpoint

    def weighted(path):
        checkpoint = read(path)
        checkpoint.state["data"]["class_weights"] = [0.526, *[1.0] * 8, 5.674]
        return checkpoint

    monkeypatch.setattr(cp, "read_checkpoint", weighted)
    page = reported(best, "--data-path", few, "--per-class", "0")[0]
    assert page.count("<th>weight</th>") == 1
    assert (
        '<td data-value="0.526">0.526</td>' in page and '<td data-value="5.674">5.67</td>' in page
    )


def test_all_settings_in_force_are_there_without_the_folders_of_the_machine():
    """Those that are added to the trainer, too."""
    given = {"data_path": "/home/alice/photos", "augment_confused": "../alice/confused.json"}
    given |= {"freeze": "body", "teacher_weights": "weights/teacher.pt"}
    shown = report.settings_in_force({"settings": given})
    assert {name for name, value in vars(Settings()).items() if value is not None} <= shown.keys()
    wanted = {"data_path": "photos", "augment_confused": "confused.json"}
    assert shown.items() >= (given | wanted).items()


def test_with_nothing_to_show_there_are_no_pictures(best, few, reported, monkeypatch):
    monkeypatch.setattr(report, "SHOWN_PAIRS", 0)
    page = Page(reported(best, "--data-path", few, "--per-class", "0")[0])
    assert not any(tag == "img" for tag, _ in page.tags)


def test_layers_can_be_named(best, few, reported):
    page = reported(best, "--data-path", few, "--layer", "stage2")[0]
    assert "16 × 16 places" in page and len(page) < 2**20
    for layer in ("nowhere", "fc"):
        assert f"--layer {layer}" in reported(best, "--layer", layer, code=2)[1].err


def test_without_a_map_there_is_a_report_all_the_same(best, few, reported, monkeypatch):
    def none(*_):
        raise UserError("no feature map of several places at 32 px")

    monkeypatch.setattr(feature_maps, "find_map_layer", none)
    page = Page(reported(best, "--data-path", few)[0])
    assert "There are no heat maps: no feature map of several places at 32 px." in page.text
    assert not any("heat map" in attributes.get("alt", "") for _, attributes in page.tags)


@pytest.mark.parametrize(
    ("change", "expected"),
    [("gone", False), ("cut", True), ("other", False), ("disturbed", True)],
)
def test_records_beside_the_checkpoint_may_be_missing(
    best, few, reported, tmp_path, change, expected
):
    copy = shutil.copytree(best.parent, tmp_path / "out")
    file = copy / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    if change == "gone":
        file.unlink()
    elif change == "cut":  # a machine that went down left no summary, and half a line
        file.write_text("".join([*lines[:5], lines[5][:50]]))
    elif change == "other":
        file.write_text(lines[0].replace("resnet20", "resnet56"))
    else:
        with_entry(file, "summary", "contention", LOOK.format(9, 0, "0.64"))
    options = "--data-path", few, "--per-class", "0"
    text = Page(reported(copy / "best.pt", *options)[0]).text
    assert ("core plan" in text, "are not known" in text) == (expected, not expected)
    if change == "disturbed":
        assert "images/s, disturbed: other processes took 64 % of all cores: these" in text


DEEP = "[" * 200_000 + "]" * 200_000
LOOK = '{{"start_s": 1, "end_s": {}, "stolen": {}, "others": {{"all": {}}}}}'
HOSTILE = {  # what of a run's records is changed, and what is said of it
    "nested": (("run", "plan", DEEP), "nested too deeply"),
    "nested summary": (("summary", "phases", DEEP), "nested too deeply"),
    "nested step": (("step", "forward_s", DEEP), "nested too deeply"),
    "400 digits": (("summary", "images_per_s", "9" * 400), "images_per_s is not a number"),
    "5000 digits": (("summary", "images_per_s", "9" * 5000), "4300 digits"),
    "400 digits of a step": (("step", "forward_s", "9" * 400), "forward_s is not a number"),
    "infinite": (("summary", "images_per_s", "1e400"), "images_per_s is not a number"),
    "no number": (("summary", "images_per_s", "NaN"), "images_per_s is not a number"),
    "text for a number": (("summary", "images_per_s", '"9"'), "images_per_s is not a number"),
    "a list of settings": (("run", "settings", "[1]"), "settings is not an object"),
    "text for a plan": (("run", "plan", '"p"'), "plan is not an object"),
    "a name that is none": (("run", "host_kind", '{"a": 1}'), "host_kind is not a text"),
    "CPUs that are none": (("run", "plan", '{"split": "", "loader_cpus": ["a"]}'), "not a count"),
    "a CPU far away": (("run", "plan", '{"split": "", "loader_cpus": [9e9]}'), "not a count"),
    "phases of nothing": (("summary", "phases", "[[]]"), "a record is not an object"),
    "no JSON": (("run", "plan", "{plan}"), "Expecting property name"),
    "text for contention": (("summary", "contention", '"c"'), "contention is not an object"),
    "a look at no time": (("summary", "contention", LOOK.format(0, 1, "0.1")), "before it begins"),
    "shares that are none": (("summary", "contention", LOOK.format(9, 0, "[]")), "others took is"),
}


def with_entry(file: Path, kind: str, name: str, value: str) -> None:
    """Change a value, JSON text, in all records of a kind; steps count where no summary is."""
    lines = file.read_text().splitlines(keepends=True)
    if kind == "step":
        lines = [line for line in lines if not line.startswith('{"type": "summary"')]
    for place, line in enumerate(lines):
        if line.startswith(f'{{"type": "{kind}"'):
            before, found, after = line.partition(f'"{name}": ')
            _, length = json.JSONDecoder().raw_decode(after)
            lines[place] = before + found + value + after[length:]
    file.write_text("".join(lines))


@pytest.mark.parametrize("name", HOSTILE)
def test_records_of_a_stranger_are_refused_in_a_line(best, tmp_path, name):
    change, said = HOSTILE[name]
    file = Path(shutil.copy(best.parent / "metrics.jsonl", tmp_path))
    assert run_records.recorded_run(file, "resnet20").phases
    with_entry(file, *change)
    with pytest.raises(UserError, match=said) as caught:
        run_records.recorded_run(file, "resnet20")
    assert str(caught.value).startswith(f"{file}: not what a run records: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "nested", "400 digits"])
def test_what_is_no_record_of_a_run_ends_in_one_line(best, reported, tmp_path, what):
    copy = shutil.copytree(best.parent, tmp_path / "out")
    file = copy / "metrics.jsonl"
    if what in HOSTILE:
        with_entry(file, *HOSTILE[what][0])
    else:
        file.unlink()
        make = {"pipe": os.mkfifo, "folder": Path.mkdir}
        make.get(what, lambda path: path.symlink_to("/dev/zero"))(file)
    printed = reported(copy / "best.pt", code=2)[1].err
    assert f"{file}: not what a run records: " in printed


@pytest.mark.parametrize(("share", "is_disturbed"), [("0.64", True), ("0.09", False)])
def test_speeds_that_others_disturbed_do_not_count(best, tmp_path, share, is_disturbed):
    file = Path(shutil.copy(best.parent / "metrics.jsonl", tmp_path))
    with_entry(file, "summary", "contention", LOOK.format(9, 0, share))
    told = "other processes took 64 % of all cores: these speeds and times do not count"
    assert run_records.recorded_run(file, "resnet20").disturbed == told * is_disturbed
    run, *others = map(json.loads, file.read_text().splitlines())
    step = next(each for each in others if each["type"] == "step")
    step.pop("contention", None)
    looked = step | {"contention": json.loads(LOOK.format(9, 0, share))}
    found = run_records.told_of(run, None, [step, looked, step])  # of a run that was cut off
    assert found.phases and found.disturbed == told * is_disturbed


@pytest.mark.parametrize("name", ["host_kind", "plan"])
def test_what_earlier_versions_did_not_write_is_not_known(best, tmp_path, name):
    file = Path(shutil.copy(best.parent / "metrics.jsonl", tmp_path))
    with_entry(file, "run", name, "null")
    assert run_records.recorded_run(file, "resnet20") is None
    (tmp_path / "empty").touch()
    assert run_records.recorded_run(tmp_path / "empty", "resnet20") is None


def test_a_checkpoint_is_a_regular_file(reported, tmp_path):
    os.mkfifo(tmp_path / "best.pt")
    told = reported(tmp_path / "best.pt", code=2)[1].err
    assert "best.pt: cannot be read: no regular file" in told


def test_wrong_use_ends_in_one_line(best, reported, tmp_path, digits):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    bad = tmp_path / "flipped.pt"
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    for path in (tmp_path / "none.pt", tmp_path / "text.pt", bad):
        assert path.name in reported(path, code=2)[1].err
    empty = shutil.copytree(digits, tmp_path / "empty")
    for file in (empty / "val" / "3").iterdir():
        file.unlink()
    assert "class 3" in reported(best, "--data-path", empty, code=2)[1].err
    assert "does not exist" in reported(best, "--data-path", tmp_path / "moved", code=2)[1].err


def test_a_report_that_cannot_be_written_is_refused_at_once(best, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cp, "read_checkpoint", lambda path: pytest.fail("too late"))
    copy = Path(shutil.copy(best, tmp_path))
    options = [
        ("--output", tmp_path / "no" / "report.html"),
        ("--output", tmp_path),
        ("--output", "/proc/report.html"),
        ("--output", copy),
        ("--confused", tmp_path),
    ]
    for flag, path in options:
        assert report.main([str(copy), "--output", str(tmp_path / "a.html"), flag, str(path)]) == 2
        printed = capsys.readouterr().err
        assert f"{flag} {path}: " in printed and len(printed.splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["best.pt"]


@pytest.fixture(scope="module")
def hostile(digits, few, tmp_path_factory):
    """A report on a checkpoint whose classes have HTML in their names, or long ones; one picture is
    broken.
    """
    folder = tmp_path_factory.mktemp("hostile")
    names = {"0": BAD_NAME, "1": "x' onerror='alert(2)", "2": "{{ 7 * 7 }}", "3": "</style>"}
    names["3"] = names["3"].replace("/", "\u2044")
    names |= {"4": 60 * "W", "5": "a name that has several words"}
    for digit in names:
        shutil.copytree(digits / "train" / digit, folder / "data" / "train" / names[digit])
        shutil.copytree(few / "val" / digit, folder / "data" / "val" / names[digit])
    first = next((folder / "data" / "val" / names["1"]).iterdir())
    first.write_text("no picture")
    options = f"""--model resnet20 --image-size 32 --epochs 1 -b 16 -j 0 --subset 0.1 --split none
        --max-bad-images 9 --log-file {folder}/logs.md --output-dir {folder}/out"""
    assert main([*options.split(), "--data-path", str(folder / "data")]) == 0
    output = folder / "report.html"
    assert report.main([f"{folder}/out/best.pt", "--output", str(output)]) == 0
    return output


def test_html_in_names_stays_text(hostile):
    html = hostile.read_text("utf-8")
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert escape(BAD_NAME, quote=False)[:20] in html and BAD_NAME in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "1 image could not be read, and was left out" in " ".join(page.text.split())


@pytest.fixture(scope="module")
def browser():
    """Chromium, if it is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_in_a_browser(hostile, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(hostile.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = page.evaluate("""[...document.querySelectorAll(".scroll")].map(box => [
        box.scrollWidth > box.clientWidth, getComputedStyle(box).backgroundAttachment
    ])""")
    shaded = "local, local, scroll, scroll"  # where a box goes on
    assert len(boxes) == 3 and {attachment for _, attachment in boxes} == {shaded}
    assert [is_wider for is_wider, _ in boxes] == [width == 375, False, width == 375]
    images = page.get_by_role("columnheader", name="images")
    for order in ("ascending", "descending"):
        images.get_by_role("button").click()
        assert images.get_attribute("aria-sort") == order
        cells = page.locator("table.sortable tbody tr td:nth-child(2)").all_inner_texts()
        assert [*map(int, cells)] == sorted(map(int, cells), reverse=order == "descending")
    assert not troubles and [url for url in requests if not url.startswith("data:")] == [
        hostile.as_uri()
    ]
    page.close()
