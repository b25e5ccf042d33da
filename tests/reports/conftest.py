"""Fixtures of the tests of reports."""

import dataclasses

import pytest

from split_affinity.options.settings import Settings


@pytest.fixture
def settings(tmp_path):
    """Those of a run over epochs that writes all it can."""
    return Settings(
        epochs=3,
        accumulate=2,
        image_size=32,
        print_freq=1,
        log_file=tmp_path / "logs.md",
        output_dir=tmp_path / "out",
    )


@pytest.fixture
def shown(settings):
    """Settings of a run for TensorBoard, and where it writes for that."""
    pytest.importorskip("tensorboard")
    return dataclasses.replace(settings, tensorboard=True), settings.output_dir / "tensorboard"
