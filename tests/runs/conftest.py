"""Fixtures of the tests of runs."""

import pytest
from small import small_model

from split_affinity.models.registry import OWN_MODELS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """`--model small`."""
    monkeypatch.setitem(OWN_MODELS, "small", small_model)


@pytest.fixture
def epochs(photos_with_val):
    """Settings of two epochs with three steps each, and a validation of twelve images."""
    return {
        "data_path": photos_with_val,
        "num_classes": None,
        "steps": None,
        "epochs": 2,
        "lr": 0.05,
        "split": "none",
        "precision": "fp32",
    }
