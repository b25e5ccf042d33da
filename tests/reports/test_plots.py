"""Pictures, and tables of confused classes. Run: python -m pytest tests/reports/test_plots.py"""

import dataclasses
import json
import math

import machines
import pytest
import torch
from made_up import NO_VALIDATION, RAW, epoch_row, report_on
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from patching import set_everywhere
from PIL import Image
from records import PLAN, step
from rendered import page_of

from split_affinity.errors import RunError
from split_affinity.machine.topology import read_topology
from split_affinity.reports.confusion import (
    class_lines,
    confused_json,
    confusion_matrix,
    confusion_tables,
    draw_confusion,
    write_confusion,
)
from split_affinity.reports.log import picture_footer
from split_affinity.reports.plots import RangeTest, draw_curves, draw_gradients, draw_range_test
from split_affinity.reports.timeline import Panel, draw_timelines, save_figure
from split_affinity.training.network import Confusion
from split_affinity.training.update import gradient_warnings

# Gradients


@pytest.mark.parametrize(
    ("norm", "warnings"),
    [
        (1e-7, []),
        (0.5, []),
        (1e3, []),
        (9e-8, ["gradients vanish in stem: norm 9.0e-08, below 1e-07"]),
        (0.0, ["gradients vanish in stem: norm 0.0e+00, below 1e-07"]),
        (1001.0, ["gradients explode in stem: norm 1.0e+03, above 1000"]),
        (math.inf, ["gradients explode in stem: norm inf, above 1000"]),
        (math.nan, ["gradients explode in stem: norm nan, above 1000"]),
    ],
)
def test_gradients_that_vanish_or_explode(norm, warnings):
    assert list(gradient_warnings({"stem": norm, "fc": 1.0})) == warnings


def test_gradients_are_warned_of_once_for_each_part_of_the_model(settings, capsys):
    report = report_on(settings)
    history = []
    for epoch, norms in enumerate(
        ({"stem": 1.0, "fc": 1.0}, {"stem": 0.0, "fc": 1.0}, {"stem": 0.0, "fc": 2000.0}), start=1
    ):
        history.append(epoch_row(epoch, gradient_norms=norms))
        report.epoch(history[-1], history)
    report.finish("finished")
    warnings = [
        "epoch 2: gradients vanish in stem: norm 0.0e+00, below 1e-07",
        "epoch 3: gradients explode in fc: norm 2.0e+03, above 1000",
    ]
    assert capsys.readouterr().err == "".join(f"warning: {text}\n" for text in warnings)
    log = settings.log_file.read_text()
    assert all(f"- warning: {text}\n" in log for text in warnings)


# Pictures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, as well as the files."""
    saved, save = [], save_figure
    set_everywhere(
        monkeypatch, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path))
    )
    return saved


def assert_picture(path):
    """A picture that is not blank."""
    picture = Image.open(path)
    assert picture.width > 300
    assert len(picture.convert("RGB").getcolors(2**24)) > 10


def lines_of(ax):
    """(label, y values) of the curves of some axes, marks of an epoch or a rate left out."""
    curves = (line for line in ax.lines if line.get_linestyle() != "--")
    return {line.get_label(): list(line.get_ydata()) for line in curves}


def test_the_curves(tmp_path, figures):
    second = epoch_row(2, train_loss=3.0, val_loss=3.5, train_top1=9.0, val_top5=20.0, lr=0.01)
    draw_curves(tmp_path / "curves.png", "resnet18, 32 px", [epoch_row(), second])
    assert_picture(tmp_path / "curves.png")
    losses, accuracies, rates = figures[0].axes
    assert lines_of(losses) == {"train loss": [4.512, 3.0], "validation loss": [4.389, 3.5]}
    assert lines_of(accuracies) == {
        "train top-1": [1.2, 9.0],
        "train top-5": [5.8, 5.8],
        "validation top-1": [1.5, 1.5],
        "validation top-5": [6.2, 20.0],
    }
    assert list(rates.lines[0].get_ydata()) == [0.1, 0.01]
    assert list(rates.lines[0].get_xdata()) == [1, 2]
    assert figures[0].get_suptitle() == "resnet18, 32 px"


@pytest.mark.parametrize(("lowest", "scale"), [(0.2, "linear"), (0.1, "log")])
def test_losses_over_decades_are_drawn_over_a_logarithmic_axis(tmp_path, figures, lowest, scale):
    """From a ratio of 30 on, as in the report; without a value for what was not measured."""
    rows = [epoch_row(val_loss=None), epoch_row(2, train_loss=lowest)]
    draw_curves(tmp_path / "curves.png", "title", rows)
    losses, *others = figures[0].axes
    assert losses.get_yscale() == scale
    assert losses.get_ylabel() == ("loss" if scale == "linear" else "loss (logarithmic)")
    assert {ax.get_yscale() for ax in others} == {"linear"}
    if scale == "log":
        marks = [text.get_text() for text in losses.get_yticklabels()]
        assert {"0.1", "1"} <= {*marks}, "no powers of ten"


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_of_few_classes_is_not_drawn(settings, figures, classes):
    report = report_on(dataclasses.replace(settings, num_classes=classes))
    report.epoch(epoch_row(), [epoch_row()])
    assert any("top-5" in name for name in lines_of(figures[0].axes[1])) == (classes == 6)
    assert "val_top5: 6.2%" in settings.log_file.read_text(), "a line's format stays"
    report.finish("finished")


def best_of(history, tmp_path, figures, best=()):
    """Where the best epoch is marked in both upper axes, and its entry in the legend."""
    draw_curves(tmp_path / "curves.png", "title", history, best=best)
    losses, accuracies, rates = figures[-1].axes
    marks = [
        [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
        for ax in (losses, accuracies, rates)
    ]
    assert marks[0] == marks[1]
    assert not marks[2]
    entries = [text.get_text() for text in accuracies.get_legend().get_texts()]
    return marks[0], [entry for entry in entries if entry.startswith("best")]


@pytest.mark.parametrize(
    ("top1", "marks", "entries"),
    [
        ([1.5], [1], ["best: 1.50 % in epoch 1"]),
        ([1.5, 93.75, 20.0, 93.75], [2], ["best: 93.75 % in epoch 2"]),  # the first, as in best.pt
        ([None, 0.0, None], [2], ["best: 0.00 % in epoch 2"]),
        ([None, None], [], []),
    ],
)
def test_the_best_epoch_is_marked(tmp_path, figures, top1, marks, entries):
    history = [epoch_row(number, val_top1=value) for number, value in enumerate(top1, start=1)]
    assert best_of(history, tmp_path, figures) == (marks, entries)


def test_the_best_of_epochs_with_equal_accuracy_is_that_of_the_best_file(tmp_path, figures):
    """The one with the lowest loss, but for a checkpoint that says otherwise."""
    history = [epoch_row(number, val_loss=loss) for number, loss in ((1, 0.4), (2, 0.3), (3, 0.5))]
    assert best_of(history, tmp_path, figures) == ([2], ["best: 1.50 % in epoch 2"])
    earlier = [(1.5, 1), (1.5, 2)]
    assert best_of(history, tmp_path, figures, earlier) == ([1], ["best: 1.50 % in epoch 1"])


def test_the_moving_average_s_epoch_is_the_best(tmp_path, figures):
    """As it is for best.pt: raw weights do not count."""
    history = [epoch_row(1, val_top1=80.0, **RAW), epoch_row(2, val_top1=70.0, **RAW)]
    history[1]["val_raw_top1"] = 90.0
    assert best_of(history, tmp_path, figures) == ([1], ["best: 80.00 % in epoch 1"])


@pytest.mark.parametrize("epochs", [1, 2, 200])
def test_legends_lie_beside_the_curves(tmp_path, figures, epochs):
    history = [epoch_row(number, **RAW) for number in range(1, epochs + 1)]
    draw_curves(tmp_path / "curves.png", "title", history)
    for ax in figures[0].axes[:2]:
        assert ax.get_legend().get_window_extent().x0 >= ax.bbox.x1
    ticks = figures[0].axes[-1].get_xticks()
    assert all(tick == round(tick) for tick in ticks), "there are no halves of epochs"


def test_the_footer_names_machine_and_versions(tmp_path):
    topology = read_topology(machines.write_machine(tmp_path, machines.SMT_FAR))
    footer = picture_footer(topology)
    assert footer.startswith("Example CPU @ 3.0GHz, 4 cores, 8 hardware threads; python ")
    assert f"torch {torch.__version__}, torchvision " in footer
    assert "\n" not in footer


MATRIX = torch.eye(2, dtype=torch.long)


PICTURES = {
    "timeline": lambda *args: draw_timelines(*args, [Panel("", PLAN, [step(1)])], FOOTER),
    "curves": lambda *args: draw_curves(*args, [epoch_row()], FOOTER),
    "gradients": lambda *args: draw_gradients(*args, [epoch_row()], FOOTER),
    "lr": lambda *args: draw_range_test(*args, RangeTest((0.1,), (1.0,), None), FOOTER),
    "confusion": lambda *args: draw_confusion(*args, MATRIX, ["a", "b"], FOOTER),
}


FOOTER = "Example CPU @ 3.0GHz, 64 cores, 128 hardware threads; " + 12 * "a package 1.2.3, "


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_has_its_footer_below_all_else(tmp_path, figures, name):
    PICTURES[name](tmp_path / f"{name}.png", "title")
    upper, lower = figures[0].figure.subfigs
    (text,) = lower.texts
    assert text.get_text().replace("\n", " ") == FOOTER.strip()
    box = text.get_window_extent()
    assert box.x1 <= lower.bbox.x1
    assert 0 <= box.y0 < box.y1 <= upper.bbox.y0 + 1
    assert upper.get_tightbbox().y0 * figures[0].figure.dpi >= upper.bbox.y0 - 1


LONG = (
    "convnextv2_huge.fcmae_ft_in22k_in1k_512, 512 px, 4 ranks with 16 batches of 128 images a step"
)
TITLES = {"short": "title", "of words": f"{LONG}, bf16: loss 0.5948", "one word": 150 * "W"}


def assert_title_fits(figure, title):
    """It is there as a whole, inside the picture, above all axes."""
    renderer = FigureCanvasAgg(figure.figure).get_renderer()
    box, whole = figure._suptitle.get_window_extent(renderer), figure.figure.bbox
    assert 0 <= box.x0 < box.x1 <= whole.x1 and box.y1 <= whole.y1
    assert box.y0 >= max(ax.get_tightbbox(renderer).y1 for ax in figure.axes)
    drawn = figure.get_suptitle()
    assert title in (drawn.replace("\n", " "), drawn.replace("\n", ""))


@pytest.mark.parametrize("classes", [2, 4, 10])
@pytest.mark.parametrize("title", TITLES)
def test_titles_fit_the_width_of_a_matrix(tmp_path, figures, classes, title):
    names = [f"class {number}" for number in range(classes)]
    draw_confusion(tmp_path / "c.png", TITLES[title], torch.eye(classes).long(), names)
    assert_title_fits(figures[0], TITLES[title])


@pytest.mark.parametrize("name", ["curves", "gradients", "lr", "timeline"])
def test_long_titles_fit_all_pictures(tmp_path, figures, name):
    title = f"{LONG}, bf16, taught by {LONG}: {LONG}"
    PICTURES[name](tmp_path / f"{name}.png", title)
    assert_title_fits(figures[0], title)
    assert "\n" in figures[0].get_suptitle()


def test_a_long_title_of_a_panel_fits(tmp_path, figures):
    panel = Panel(f"rank 0 on {200 * 'h'}: delayed", PLAN, [step(1)])
    draw_timelines(tmp_path / "timeline.png", "title", [panel])
    renderer = FigureCanvasAgg(figures[0].figure).get_renderer()
    box = figures[0].axes[0].get_tightbbox(renderer)
    assert box.x1 <= figures[0].figure.bbox.x1


def test_the_curves_of_one_epoch_without_validation(tmp_path, figures):
    draw_curves(tmp_path / "curves.png", "title", [epoch_row(**NO_VALIDATION)])
    assert_picture(tmp_path / "curves.png")
    losses, accuracies, _ = figures[0].axes
    assert lines_of(losses) == {"train loss": [4.512]}
    assert set(lines_of(accuracies)) == {"train top-1", "train top-5"}


def test_the_curves_of_raw_weights_from_the_epoch_on_that_has_them(tmp_path, figures):
    rows = [epoch_row(), epoch_row(2, **RAW), epoch_row(3, **RAW | {"val_raw_loss": 4.0})]
    draw_curves(tmp_path / "curves.png", "title", rows)
    losses, accuracies, _ = figures[0].axes
    assert lines_of(losses) == {
        "train loss": [4.512] * 3,
        "validation loss": [4.389] * 3,
        "raw validation loss": [None, 4.1, 4.0],
    }
    shown = lines_of(accuracies)
    assert shown["raw validation top-1"] == [None, 2.5, 2.5]
    assert "raw validation top-5" not in shown, "never measured"


def test_the_gradients(tmp_path, figures):
    history = [
        epoch_row(1, gradient_norms={}),
        epoch_row(2, gradient_norms={"stem": 0.0, "fc": 1.0}),
        epoch_row(3, gradient_norms={"stem": 0.5, "fc": 1e200}),
    ]
    draw_gradients(tmp_path / "gradients.png", "title", history)
    assert_picture(tmp_path / "gradients.png")
    (ax,) = figures[0].axes
    assert ax.get_yscale() == "log"
    shown = lines_of(ax)
    assert list(shown) == ["stem", "fc"]
    assert shown["stem"] == pytest.approx([math.nan, math.nan, 0.5], nan_ok=True)
    assert shown["fc"] == pytest.approx([math.nan, 1.0, 1e200], nan_ok=True)


PAIRS = Confusion({(0, 0): 3, (0, 1): 1, (2, 0): 2, (2, 2): 2})
CONFUSION = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
CLASSES = ("bee", "cat", "dog, wet")


def test_a_confusion_matrix_of_counted_pairs():
    assert torch.equal(confusion_matrix(PAIRS, 3), CONFUSION)
    assert confusion_matrix(Confusion(), 2).tolist() == [[0, 0], [0, 0]]


def test_a_confusion_matrix_drawn(tmp_path, figures):
    draw_confusion(tmp_path / "confusion.png", "title", CONFUSION, CLASSES)
    assert_picture(tmp_path / "confusion.png")
    ax = figures[0].axes[0]
    assert ax.images[0].get_array().tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [0.5, 0, 0.5]]
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers == {(0, 0): "3", (1, 0): "1", (0, 2): "2", (2, 2): "2"}
    assert [label.get_text() for label in ax.get_yticklabels()] == list(CLASSES)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")


def test_names_of_classes_and_titles_are_no_formulas(tmp_path):
    draw_confusion(tmp_path / "c.png", "$x_$", torch.eye(2, dtype=torch.long), ["$x_$", "$^2$"])
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
def test_names_that_are_long_are_short_in_a_picture(tmp_path, figures):
    """Beginning and end of them; those that are the same then are numbers. The matrix keeps its
    place, and everything is in the picture.
    """
    names = [
        220 * "a",
        "b" * 100 + "1",
        f"c{99 * '_'}1{99 * '_'}",
        f"c{99 * '_'}2{99 * '_'}",
        "short",
    ]
    draw_confusion(tmp_path / "c.png", "title", torch.eye(5).long(), names)
    assert_picture(tmp_path / "c.png")
    ax = figures[0].axes[0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [
        f"{20 * 'a'}...{9 * 'a'}",
        f"{20 * 'b'}...{8 * 'b'}1",
        "no. 3",
        "no. 4",
        "short",
    ]
    whole = figures[0].figure.bbox
    assert ax.get_window_extent().height > 0.3 * whole.height
    box = ax.get_tightbbox()
    assert 0 <= box.x0 < box.x1 <= whole.x1 and 0 <= box.y0 < box.y1 <= whole.y1


def characters_of_fonts():
    """The characters of matplotlib's own font, and those that another of its fonts has beside."""
    files = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    own, other = (
        {*map(chr, font_manager.get_font(files[name]).get_charmap())}
        for name in ("DejaVu Sans", "STIXGeneral")
    )
    return own, sorted(each for each in other - own if each.isalpha())


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_by_a_font_that_has_their_characters(tmp_path, figures, capsys):
    own, others = characters_of_fonts()
    assert others
    draw_confusion(tmp_path / "c.png", "", torch.eye(2).long(), ["bee", others[0]])
    labels = figures[0].axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["bee", others[0]]
    assert labels[0].get_fontfamily()[0] == "sans-serif"
    assert not capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_names_that_no_font_can_draw_are_numbers_which_are_told_once(tmp_path, figures, capsys):
    """Without a page of warnings."""
    nowhere = "\U0001f9ff\u4e00\U00013000"
    set_of_fonts = characters_of_fonts()[0]
    assert not {*nowhere} <= set_of_fonts
    draw_confusion(tmp_path / "c.png", "", torch.eye(3).long(), ["bee", nowhere, "b\x1be"])
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert labels == ["bee", "no. 2", r"b\x1be"]
    printed = capsys.readouterr()
    assert printed.out == (
        f"note: {tmp_path / 'c.png'} has numbers for some classes: the fonts here lack characters "
        f"of these names, or they are alike in short: no. 2 {nowhere}\n"
    )
    assert not printed.err


def test_a_confusion_matrix_of_many_classes_has_no_room_for_numbers(tmp_path, figures):
    names = [f"class {number}" for number in range(100)]
    draw_confusion(tmp_path / "confusion.png", "title", torch.eye(100).long(), names)
    assert_picture(tmp_path / "confusion.png")
    assert not figures[0].axes[0].texts


def test_the_accuracy_of_each_class_with_the_worst_first():
    assert class_lines(PAIRS, CLASSES) == [
        "| class    | right | images right | images |\n"
        "| :------- | ----: | -----------: | -----: |\n"
        "| dog, wet | 50.0% |            2 |      4 |\n"
        "| bee      | 75.0% |            3 |      4 |"
    ]


def test_the_accuracy_of_classes_with_long_names_fits_80_columns():
    names = ["n" * 40, "m" * 41, "short"]
    confusion = Confusion({(index, index): 1_281_167 for index in range(3)})
    (table,) = class_lines(confusion, names)
    assert {len(line) for line in table.splitlines()} == {78}
    shown = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert shown == ["m" * 37 + "...", "n" * 40, "short"]


def test_of_many_classes_the_worst_are_shown():
    confusion = Confusion()
    for right in range(40):  # of 40 images each
        confusion.update({(right, right): right, (right, 0): 40 - right})
    table, note = class_lines(confusion, [f"class {number}" for number in range(40)])
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == [f"class {number}" for number in range(1, 31)]
    assert note == "(the worst 30 of 40 classes)"
    names = [f"<b>class {number}" for number in range(40)]
    pairs, more = confusion_tables(confusion, names)
    assert [cell.strip() for cell in pairs.splitlines()[2].split("|")[1:-1]] == [
        "\\<b>class 1",
        "\\<b>class 0",
        "39",
        "97.5%",
    ]
    assert len(pairs.splitlines()) == 2 + 10, "as many as are read at a glance"
    page = page_of(f"{pairs}\n\n{more}")
    assert page.tags.count("table") == 2
    assert "b" not in page.tags
    assert "\n\n(the worst 30 of 40 classes)\n\n" in more, "no row of the table"
    right, _ = confusion_tables(Confusion({(n, n): 2 for n in range(11)}), names)
    assert right == "No image was taken for one of another class."
    assert confusion_tables(PAIRS, CLASSES) == class_lines(PAIRS, CLASSES)


def test_the_pairs_of_classes_that_are_confused_most(tmp_path, monkeypatch):
    """Of equal ones those of the first classes."""
    set_everywhere(monkeypatch, "LARGEST_MATRIX", 2)
    confusion = PAIRS + Confusion({(1, 0): 1, (2, 1): 1, (1, 1): 9})
    write_confusion(tmp_path, "title", confusion, CLASSES, "a.pt")
    assert (tmp_path / "confusion-pairs.csv").read_text() == (
        "true class,predicted class,images\n"
        '"dog, wet",bee,2\nbee,cat,1\ncat,bee,1\n"dog, wet",cat,1\n'
    )


def test_the_confused_pairs_in_a_file_for_programs_and_people():
    """The direction is kept, and each pair has a line of its own."""
    confusion = PAIRS + Confusion({(1, 0): 1, (1, 1): 5})
    text = confused_json(confusion, ("bee", "château", "dog"), "a.pt")
    assert json.loads(text) == {
        "checkpoint": "a.pt",
        "images": 14,
        "top1": 71.4286,
        "pairs": [
            {"true": "dog", "taken_for": "bee", "images": 2, "share": 0.5},
            {"true": "bee", "taken_for": "château", "images": 1, "share": 0.25},
            {"true": "château", "taken_for": "bee", "images": 1, "share": 0.1667},
        ],
    }
    first, *pairs, last = text.splitlines()
    assert (first, last) == (
        '{"checkpoint": "a.pt", "images": 14, "top1": 71.4286, "pairs": [',
        "]}",
    )
    assert pairs[1] == '{"true": "bee", "taken_for": "château", "images": 1, "share": 0.25},'


def test_what_is_not_seen_is_escaped_in_the_file_of_confused_pairs():
    """In JSON's own way: a program gets the names as they are."""
    names = ["Bl\u00fcte", "a\u202eb\x9b\x7f\n", "\ud800"]
    text = confused_json(PAIRS, names, "x.pt")
    assert '"Bl\u00fcte"' in text
    assert not any(each in text for each in "\u202e\x9b\x7f\ud800")
    pairs = json.loads(text)["pairs"]
    assert {pair[key] for pair in pairs for key in ("true", "taken_for")} == {*names}


def test_without_a_mistake_no_pair_is_confused():
    text = confused_json(Confusion({(0, 0): 3, (2, 2): 1}), CLASSES, "a.pt")
    found = {"checkpoint": "a.pt", "images": 4, "top1": 100.0, "pairs": []}
    assert json.loads(text) == found


def test_of_many_pairs_the_worst_are_written(tmp_path, monkeypatch):
    set_everywhere(monkeypatch, "LARGEST_MATRIX", 2000)
    pairs = {(true, true + 1): images for true, images in enumerate(range(2000, 0, -1))}
    write_confusion(tmp_path, "title", Confusion(pairs), range(2001), "a.pt")
    lines = (tmp_path / "confusion-pairs.csv").read_text().splitlines()
    assert (len(lines), lines[1], lines[-1]) == (1001, "0,1,2000", "999,1000,1001")
    found = json.loads(confused_json(Confusion(pairs), range(2001), ""))["pairs"]
    assert len(found) == 1000
    assert found[-1] == {"true": 999, "taken_for": 1000, "images": 1001, "share": 1.0}


MATRIX_TEXT = 'true class,bee,cat,"dog, wet"\nbee,3,1,0\ncat,0,0,0\n"dog, wet",2,0,2\n'
PAIRS_TEXT = 'true class,predicted class,images\n"dog, wet",bee,2\nbee,cat,1\n'


@pytest.mark.parametrize(
    ("largest", "written", "text"),
    [
        (3, ["confusion.csv", "confusion.png"], MATRIX_TEXT),
        (2, ["confusion-pairs.csv"], PAIRS_TEXT),
    ],
)
def test_of_too_many_classes_for_a_matrix_the_worst_pairs(
    tmp_path, monkeypatch, capsys, largest, written, text
):
    set_everywhere(monkeypatch, "LARGEST_MATRIX", largest)
    folder = tmp_path / "out"
    write_confusion(folder, "title", PAIRS, CLASSES, "a.pt")
    assert sorted(path.name for path in folder.iterdir()) == ["confused.json", *written]
    assert (folder / "confused.json").read_text() == (confused_json(PAIRS, CLASSES, "a.pt"))
    assert (folder / written[0]).read_text() == text
    line = (
        f"{folder}/confusion-pairs.csv: the worst confusions; 3 classes are too many for a matrix\n"
    )
    assert capsys.readouterr().out == ("" if largest == 3 else line)


def test_a_range_test_drawn(tmp_path, figures):
    result = RangeTest((1e-6, 1e-3, 1.0), (2.0, 1.0, 5.0), 1e-4)
    draw_range_test(tmp_path / "lr.png", "title", result)
    assert_picture(tmp_path / "lr.png")
    (ax,) = figures[0].axes
    assert ax.get_xscale() == "log"
    assert lines_of(ax)["loss, smoothed"] == [2.0, 1.0, 5.0]
    assert list(ax.lines[1].get_xdata()) == [1e-4, 1e-4]
    assert ax.lines[1].get_label() == "suggestion: 0.0001"
    assert ax.get_ylim() == pytest.approx((0.9, 4.0)), "cut off where the loss explodes"


def test_a_run_s_pictures_name_its_machine(settings, tmp_path, monkeypatch):
    calls = {}
    for name in ("draw_timelines", "draw_curves", "draw_gradients"):
        set_everywhere(monkeypatch, name, lambda *args, name=name: calls.update({name: args}))
    report = report_on(dataclasses.replace(settings, output_dir=tmp_path / "out"))
    report.step(step(1))
    report.epoch(epoch_row(), [epoch_row()])
    report.finish("finished")
    footer = picture_footer(read_topology())
    assert [calls[name][3] for name in sorted(calls)] == [footer] * 3
    (panel,) = calls["draw_timelines"][2]
    assert panel.cores == read_topology().cores


def test_a_range_test_without_an_explosion_is_drawn_whole(tmp_path, figures):
    result = RangeTest((1e-6, 1e-3, 1.0), (2.0, 1.0, 3.5), 1e-4)
    draw_range_test(tmp_path / "lr.png", "title", result)
    low, high = figures[0].axes[0].get_ylim()
    assert low < 1.0
    assert high > 3.5


def test_a_range_test_without_a_suggestion_is_drawn_without_its_line(tmp_path, figures):
    result = RangeTest((1e-6, 1e-3, 1.0), (2.0, 1.9, 3.5), None)
    draw_range_test(tmp_path / "lr.png", "title", result)
    assert_picture(tmp_path / "lr.png")
    (line,) = figures[0].axes[0].lines
    assert line.get_label() == "loss, smoothed"


def test_a_curve_that_cannot_be_written(tmp_path):
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(RunError, match="curves.png: cannot be written: Is a directory"):
        draw_curves(tmp_path / "curves.png", "title", [epoch_row()])
