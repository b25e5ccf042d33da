"""Fixtures shared by the tests of deploy/.

Run: pip install -r tests/deploy/requirements.txt && python -m pytest tests/deploy
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from split_affinity.data.digits import write_digits
from train_split_affinity import main


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's handwritten digits, as an image folder."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """Trains a model on a part of the digits for some steps and returns its best.pt; each model
    once.
    """
    known: dict[tuple[str, ...], Path] = {}

    def train(model: str, *options: str) -> Path:
        key = (model, *options)
        if key not in known:
            folder = tmp_path_factory.mktemp("out")
            arguments = [
                *("--model", model, "--data-path", str(digits), "--subset", "0.1"),
                *("--epochs", "2", "--image-size", "32", "-b", "16", "-j", "0", "--lr", "0.02"),
                *("--hflip", "0", "--min-scale", "0.7", "--split", "none"),
                *("--output-dir", str(folder), "--log-file", os.devnull),
            ]
            assert main([*arguments, *options]) == 0
            known[key] = folder / "best.pt"
        return known[key]

    return train


@pytest.fixture(scope="session")
def best(trained) -> Path:
    """The checkpoint of a ResNet-20."""
    return trained("resnet20")
