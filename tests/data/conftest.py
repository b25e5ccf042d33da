"""Fixtures of the tests of data."""

import shutil

import numpy as np
import pytest
from cifar import accept, make_cifar
from loading import colour


@pytest.fixture
def with_val(photos, tmp_path):
    """The photographs, all of them to train and to validate."""
    shutil.copytree(photos / "train", tmp_path / "both/train")
    shutil.copytree(photos / "train", tmp_path / "both/val")
    return tmp_path / "both"


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Twelve images of noise to train, and to validate one of one colour and one of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
    train = noise[:12], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    test = np.stack([colour(51, 102, 204), noise[12]]), [7, 0]
    return accept(monkeypatch, make_cifar(tmp_path / "cifar", train, test))
