"""scikit-learn's digits, as a data set by name. Run: python -m pytest tests/data/test_digits.py"""

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from split_affinity.data import digits
from split_affinity.data.dataset import open_data
from split_affinity.errors import UserError
from split_affinity.options.commands import parse_arguments
from split_affinity.options.settings import Settings, as_options
from train_split_affinity import main


def settings_of(line):
    return parse_arguments(shlex.split(line))[1]


def test_digits_are_written_once(in_tmp, capsys):
    data = open_data(settings_of("--dataset digits"))
    assert (len(data.train), len(data.val)) == (1437, 360)
    assert (data.kind, data.classes) == ("digits", tuple("0123456789"))
    assert (data.native.image_size, data.native.val_resize) == (32, 37)
    assert capsys.readouterr().err == "writing scikit-learn's digits into data/digits\n"
    files = {path: path.stat().st_mtime_ns for path in Path("data").rglob("*")}
    assert sum(path.suffix == ".png" for path in files) == 1797
    assert Path("data/digits").stat().st_mode & 0o777 == 0o755
    again = open_data(settings_of("--dataset digits"))
    assert again.train.samples == data.train.samples
    assert {path: path.stat().st_mtime_ns for path in Path("data").rglob("*")} == files
    assert capsys.readouterr().err == ""


def test_they_are_what_scikit_learn_has(in_tmp):
    sklearn = pytest.importorskip("sklearn.datasets")
    source, data = sklearn.load_digits(), open_data(settings_of("--dataset digits"))
    for number in (1, 4, 1796):
        (index,) = (
            place
            for place, (path, _) in enumerate(data.train.samples)
            if path.endswith(f"{number:04}.png")
        )
        picture, target = data.train[index]
        assert target == source.target[number]
        shades = np.asarray(picture.convert("L").reduce(4)) / 255 * 16
        assert np.corrcoef(shades.ravel(), source.images[number].ravel())[0, 1] > 0.95


def test_as_a_set_by_name_and_as_a_folder_they_are_the_same(in_tmp):
    by_name = open_data(settings_of("--dataset digits --data-path here"))
    folder = open_data(settings_of("--data-path here"))
    assert (by_name.kind, folder.kind) == ("digits", "folder")
    assert by_name.train.targets == folder.train.targets
    assert by_name.chosen == folder.chosen
    for index in (0, 700, 1436):
        one, other = by_name.train[index], folder.train[index]
        assert one[1] == other[1]
        assert np.array_equal(np.asarray(one[0]), np.asarray(other[0]))


def test_a_folder_that_comes_meanwhile_is_taken(in_tmp, monkeypatch):
    """Two ranks of one machine may write at once: the first one's files stay."""
    write = digits.write_digits

    def overtaken(root, *given):
        shutil.copytree(write(root, *given), "data/digits")
        (Path("data/digits") / "first").touch()
        return root

    monkeypatch.setattr(digits, "write_digits", overtaken)
    assert len(open_data(settings_of("--dataset digits")).train) == 1437
    assert Path("data/digits/first").exists()
    assert [path.name for path in Path("data").iterdir()] == ["digits"]


def test_without_scikit_learn_a_line_says_what_to_do(in_tmp, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["--recipe", "digits"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "it takes the package scikit-learn to read it: pip install scikit-learn" in error
    assert not list(in_tmp.iterdir())


def test_a_folder_of_something_else_stays_as_it_is(in_tmp):
    Path("photos").mkdir()
    error = "--data-path photos: no Digits: it has no folder train; give a path that does not exist"
    with pytest.raises(UserError, match=error):
        open_data(settings_of("--dataset digits --data-path photos"))
    assert not list(Path("photos").iterdir())


def test_a_folder_without_all_of_them_is_told(in_tmp):
    open_data(settings_of("--dataset digits"))
    next(Path("data/digits/val/3").iterdir()).unlink()
    with pytest.raises(UserError, match="Digits has 360 images, of which only 359 are there"):
        open_data(settings_of("--dataset digits"))


@pytest.mark.parametrize(
    ("line", "dataset", "path"),
    [
        ("--recipe digits", "digits", "data/digits"),
        ("--recipe digits --data-path photos", None, "photos"),
        ("--recipe digits --data-path photos --dataset digits", "digits", "photos"),
        ("--recipe digits --dataset svhn --data-path svhn", "svhn", "svhn"),
        ("--dataset digits", "digits", "data/digits"),
    ],
)
def test_the_recipe_has_its_data_unless_a_path_is_typed(line, dataset, path):
    settings = settings_of(line)
    assert (settings.dataset, settings.data_path) == (dataset, Path(path))
    assert settings_of(as_options(settings)) == settings


def test_digits_are_not_mirrored():
    settings = settings_of("--dataset digits")
    assert (settings.hflip, settings.min_scale) == (0.0, 0.6)
    assert Settings().hflip == 0.5
