"""Recipes, from end to end. Run: python -m pytest tests/runs/test_recipe_runs.py"""

import functools
import itertools

import pytest
from cifar import accept, make_cifar_digits
from small import needs_two_cpus, read_metrics
from small_runs import state_of, with_plan

import train_split_affinity as script
from split_affinity.models.own import Hybrid
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.recipes import FROM_CHECKPOINT, RECIPES
from split_affinity.options.settings import Settings
from split_affinity.training.schedules import SCHEDULES
from train_split_affinity import main

# Recipes, from end to end


RECIPE_OPTIONS = {
    "digits": "--lr-warmup-epochs 1 --subset 0.006",
    "imagenet": "--lr-warmup-epochs 1 --save-freq 1 --image-size 32",
    "imagenet-subset": "--subset 0.7 --image-size 32",
    "imagenet-finetune": "--min-res 32 --max-res 64 --end-ramp 2",
    "imagenet-full": "--lr-warmup-epochs 1 --image-size 32",
    "finetune": "--image-size 32",
    "scratch": "--image-size 32 --lr-warmup-epochs 1",
    "cifar10": "--lr-milestones 1",
    "hybrid": "--image-size 32 --lr-restart-epochs 1",
}


@pytest.fixture(scope="module")
def weights(photos_with_val, tmp_path_factory):
    """A checkpoint to start from, of a model with blocks that can be left out."""
    folder = tmp_path_factory.mktemp("weights")
    settings = Settings(
        model="resnet18",
        data_path=photos_with_val,
        image_size=32,
        batch_size=2,
        workers=0,
        steps=1,
        split="none",
        output_dir=folder,
        log_file=folder / "logs.md",
    )
    with_plan(script.train, settings)
    return folder / "last.pt"


@pytest.fixture
def recipe_data(photos_with_val, tmp_path, monkeypatch, torch_cache):
    """Small data for each recipe, and small models where the recipe's own are large."""
    torch_cache("squeezenet1_1")
    monkeypatch.setitem(
        OWN_MODELS,
        "hybrid",
        functools.partial(Hybrid, channels=(8, 16, 24, 32), width=32, blocks=1),
    )

    def arguments(recipe):
        if recipe == "digits":  # with images of its own, of which a few are enough
            return []
        if recipe == "cifar10":
            return ["--data-path", str(accept(monkeypatch, make_cifar_digits(tmp_path / "c", 15)))]
        name = "resnet18" if recipe in FROM_CHECKPOINT else "squeezenet1_1"
        large = recipe.startswith("imagenet") or recipe in ("finetune", "scratch")
        model = ["--model", name] if large else []
        return [*model, "--data-path", str(photos_with_val)]

    return arguments


# A recipe knows nothing of schedules: each is run by several recipes, and each recipe by one.
IN_TURN = list(zip(RECIPES, itertools.cycle(SCHEDULES), strict=False))


@pytest.mark.slow
@needs_two_cpus
@pytest.mark.parametrize(("recipe", "schedule"), IN_TURN)
def test_a_recipe_runs_from_end_to_end(
    in_tmp, no_pictures, recipe_data, weights, capsys, recipe, schedule
):
    """Two epochs of two steps or more; everything that the options leave open is the recipe's."""
    options = ["--recipe", recipe, "-b", "2", "--accumulate", "2", "--epochs", "2", "-j", "0"]
    options += ["--schedule", schedule, *recipe_data(recipe), *RECIPE_OPTIONS[recipe].split()]
    if recipe in FROM_CHECKPOINT:
        options += ["--init-from", str(weights)]
    assert main(options) == 0, capsys.readouterr().err
    folder = in_tmp / "out" / recipe
    run, *_, summary = read_metrics(folder)
    steps, rows = read_metrics(folder, "step"), read_metrics(folder, "epoch")
    assert summary["outcome"] == f"finished after {len(steps)} of {len(steps)} steps"
    assert summary["stray_s"] == 0
    assert len(steps) == {"imagenet-subset": 4, "digits": 4}.get(recipe, 6)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert all(0 <= row[name] <= 100 for name in ("train_top1", "val_top1", "val_top5"))
        assert row["train_loss"] > 0 and row["val_loss"] > 0
    for name, value in RECIPES[recipe].items():
        if f"--{name.replace('_', '-')}" not in options and name not in ("batch_size", "fit_batch"):
            assert run["settings"][name] == value, name
    state = state_of(folder)
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (2, len(steps))
    assert (state["average"] is not None) == (recipe == "imagenet-full")
    assert (folder / "subset.json").exists() == (recipe in ("imagenet-subset", "digits"))
    assert (folder / "epoch-0001.pt").exists() == (recipe == "imagenet")
    assert (folder / "best.pt").exists()
