"""Fixtures of the tests of checkpoints."""

import shutil

import pytest
from patching import set_everywhere
from saved_runs import output, tiny_model
from small import small_model

import train_split_affinity as script
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.settings import Settings
from train_split_affinity import main


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """`--model small`, and no pictures: drawing them takes longer than the runs of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OWN_MODELS, "small", small_model)
        patch.setitem(OWN_MODELS, "tiny", tiny_model)
        for name in ("draw_timelines", "draw_curves", "draw_gradients"):
            set_everywhere(patch, name, lambda *args: None)
        yield


@pytest.fixture(scope="module")
def pictures(photos, tmp_path_factory):
    """An image folder with 12 images to train on, and the same ones to validate."""
    root = tmp_path_factory.mktemp("pictures")
    for part in ("train", "val"):
        shutil.copytree(photos / "train", root / part)
    return root


@pytest.fixture
def train(pictures):
    """Runs of two epochs with three steps each, of which the first epoch is the warm-up."""

    def run(folder, **settings):
        chosen = Settings(
            **{
                "model": "small",
                "data_path": pictures,
                "image_size": 32,
                "batch_size": 4,
                "workers": 0,
                "epochs": 2,
                "lr": 0.05,
                "lr_scheduler": "cosine",
                "lr_warmup_epochs": 1,
                "model_ema": True,
                "model_ema_decay": 0.9,
                "mixup_alpha": 0.2,
                "clip_grad_norm": 1.0,
                "output_dir": folder,
                "log_file": folder.parent / "logs.md",
            }
            | settings
        )
        topology = read_topology()
        return script.train(chosen, topology, plan_cores(topology, chosen))

    return run


@pytest.fixture(scope="module")
def arguments(pictures):
    """The same as `train`, for the command line."""
    options = "--model small --image-size 32 -b 4 -j 0 --epochs 2 --lr 0.05 --model-ema"
    return [*options.split(), "--data-path", str(pictures)]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """The output folder of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    assert main([*arguments, *output(folder)]) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(trained, tmp_path / "copied")


@pytest.fixture
def renamed(pictures, tmp_path):
    """The pictures with a class that has another name, and so another place among the classes."""
    folder = shutil.copytree(pictures, tmp_path / "renamed")
    for part in ("train", "val"):
        (folder / part / "flower").rename(folder / part / "zinnia")
    return folder
