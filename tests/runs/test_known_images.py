"""Whether a checkpoint was trained on what it is tested on.

Run: python -m pytest tests/runs/test_known_images.py
"""

import dataclasses
import os
import shutil

import pytest
from loading import folder_of

from split_affinity.data.dataset import describe_images, open_data
from split_affinity.options.settings import Settings, plain_settings
from split_affinity.runs import known_images as tested
from split_affinity.runs.known_images import known_images, warn_of_known_images

NAMES = [f"{name}/{number}.png" for name in "ab" for number in range(10)]


@pytest.fixture
def plain(tmp_path):
    """A folder of two classes without images to validate with, all of different sizes."""
    root = folder_of(tmp_path / "plain", *NAMES)
    for number, name in enumerate(NAMES):
        with (root / name).open("ab") as file:
            file.write(bytes(number))
    return root


def settings_for(path, **others):
    return Settings(data_path=path, batch_size=2, **others)


def trained_on(settings):
    """What a checkpoint says that was trained with these settings."""
    return {"data": describe_images(open_data(settings)), "settings": plain_settings(settings)}


def divided(plain, place, move=shutil.move):
    """The folder's first two pictures of each class as validation part, the others to train on."""
    for name in NAMES:
        part = "val" if name[2:] in ("0.png", "1.png") else "train"
        (place / part / name).parent.mkdir(parents=True, exist_ok=True)
        move(plain / name, place / part / name)
    return place


def test_images_kept_apart_are_not_known(plain):
    settings = settings_for(plain, val_share=0.2)
    assert known_images(trained_on(settings), open_data(settings)) == 0
    half = dataclasses.replace(settings, subset=0.5)
    assert known_images(trained_on(half), open_data(settings)) == 0


@pytest.mark.parametrize("recipe", [None, "finetune"])
def test_a_folder_without_a_part_to_validate_is_known(plain, recipe):
    saved = trained_on(settings_for(plain, recipe=recipe))
    assert known_images(saved, open_data(settings_for(plain, val_share=0.2))) == 4


def test_another_division_is_known_image_by_image(plain):
    saved = trained_on(settings_for(plain, val_share=0.2))
    for other in ({"val_share": 0.2, "seed": 1}, {"val_share": 0.5}):
        data = open_data(settings_for(plain, **other))
        first = set(open_data(settings_for(plain, val_share=0.2)).val.indices)
        assert known_images(saved, data) == len(set(data.val.indices) - first) > 0


def test_a_folder_that_was_divided_afterwards_is_known(plain, tmp_path):
    saved = trained_on(settings_for(plain))
    data = open_data(settings_for(divided(plain, tmp_path / "parts")))
    assert known_images(saved, data) == len(data.val) == 4


def test_copies_and_links_in_both_parts_are_known(plain, tmp_path):
    root = divided(plain, tmp_path / "parts")
    settings = settings_for(root)
    saved = trained_on(settings)
    assert known_images(saved, open_data(settings)) == 0
    shutil.copy(root / "train/a/5.png", root / "val/a/new.png")
    (root / "val/b/new.png").symlink_to(root / "train/b/5.png")
    shutil.copy(root / "train/b/6.png", root / "val/b/other.png")
    with (root / "val/b/other.png").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")  # as large, and not the same
    assert known_images(saved, open_data(settings)) == 2


def test_too_many_files_are_not_read(plain, tmp_path, monkeypatch):
    root = divided(plain, tmp_path / "parts")
    shutil.copy(root / "train/a/5.png", root / "val/a/new.png")
    monkeypatch.setattr(tested, "MOST_COMPARED", 1)
    settings = settings_for(root)
    assert known_images(trained_on(settings), open_data(settings)) == 0


def test_other_images_are_not_known_for_sure(plain, capsys, tmp_path):
    settings = settings_for(plain, val_share=0.2)
    saved = trained_on(settings)
    (plain / "a/0.png").unlink()
    data = open_data(settings)
    assert known_images(saved, data) is None
    assert warn_of_known_images(tmp_path, saved, data) == 0
    assert "it may know some of these" in capsys.readouterr().err


def test_the_warning_is_strong(plain, capsys, tmp_path):
    saved = trained_on(settings_for(plain))
    data = open_data(settings_for(plain, val_share=0.2))
    assert warn_of_known_images(tmp_path / "best.pt", saved, data) == 4
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/best.pt was trained on all of these 4 images: the figures do not say "
        "how good it is; test it on images that it has never seen\n"
    )
