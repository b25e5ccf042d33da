"""What `--recipe` takes: sets of defaults that every other option overrides."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from split_affinity.options.data_sets import VAL_SHARE
from split_affinity.options.values import RESIZING_STEP, Values
from split_affinity.text import as_option

# fmt: off
# What recipes for pictures of one's own have in common: few pictures, in a folder for each class.
OWN_PICTURES: dict[str, Any] = {"val_share": VAL_SHARE, "fit_batch": True}
# Steps have 256 images if the rates come from papers with 256, else 128 (recipes for small
# machines), 32 to fine-tune, and 16 to learn anew from few pictures.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "dataset": "digits", "model": "resnet56", "image_size": 32, "hflip": 0.0, "min_scale": 0.6,
        "epochs": 12, "lr": 0.05, "lr_warmup_epochs": 2, "lr_scheduler": "cosine",
    },
    "imagenet": {
        "epochs": 90, "batch_size": 32, "accumulate": 8, "lr_scheduler": "cosine",
        "lr_warmup_epochs": 5, "auto_augment": "ra", "mixup_alpha": 0.2, "cutmix_alpha": 1.0,
        "label_smoothing": 0.1, "save_freq": 5,
    },
    "imagenet-subset": {
        "epochs": 30, "batch_size": 32, "accumulate": 4, "subset": 0.2, "image_size": 128,
        "opt": "adam", "lr": 1e-3, "lr_scheduler": "onecycle", "color_jitter": 0.4,
    },
    "imagenet-finetune": {
        "epochs": 30, "batch_size": 32, "accumulate": 4, "min_res": 128, "max_res": 224,
        "end_ramp": 20, "lr": 0.01, "lr_scheduler": "cosine", "auto_augment": "ra",
        "mixup_alpha": 0.2, "cutmix_alpha": 1.0,
    },
    "imagenet-full": {
        "epochs": 60, "batch_size": 32, "accumulate": 4, "lr": 0.02, "lr_scheduler": "cosine",
        "lr_warmup_epochs": 2, "label_smoothing": 0.1, "clip_grad_norm": 1.0,
        "stochastic_depth": 0.1, "model_ema": True,
    },
    "finetune": {
        "weights": "DEFAULT", "epochs": 10, "freeze": "body", "freeze_epochs": 1, "batch_size": 32,
        "lr": 0.005, "lr_scheduler": "cosine", "auto_augment": "ra", "label_smoothing": 0.1,
        **OWN_PICTURES,
    },
    "scratch": {
        "model": "resnet18", "image_size": 64, "epochs": 60, "batch_size": 16, "lr": 0.05,
        "lr_warmup_epochs": 5, "lr_scheduler": "cosine", "auto_augment": "ta",
        "label_smoothing": 0.1, **OWN_PICTURES,
    },
    "cifar10": {
        "model": "resnet56", "epochs": 205, "batch_size": 128, "lr": 0.1,
        "lr_scheduler": "multistep", "lr_milestones": (102, 154),
    },
    "hybrid": {
        "model": "hybrid", "epochs": 70, "opt": "adamw", "lr": 1e-4, "weight_decay": 0.01,
        "lr_scheduler": "warm-restarts", "min_lr": 1e-6, "label_smoothing": 0.1,
    },
}
# fmt: on
OF_DATA_SETS = {"digits": "digits", "cifar10": "cifar10", "cifar100": "cifar10"}
FROM_CHECKPOINT = ("imagenet-finetune", "imagenet-full")  # these start with trained weights
GIVE_WEIGHTS = "give --init-from PATH or --weights NAME"
# Parts of the names of models in which --stochastic-depth can leave blocks out.
WITH_BLOCKS = ("resne", "efficientnet", "convnext", "swin", "maxvit", "timm/")


def recipe_defaults(name: str) -> Values:
    """What a recipe sets, its output folder included: nobody wants to lose a run of weeks."""
    return {"output_dir": Path("out") / name, **RECIPES[name]}


def usual_recipe(data_set: str | None) -> str:
    """The recipe for a data set by name, or for pictures of your own."""
    return OF_DATA_SETS.get(data_set or "", "finetune")


def survey_folder(place: Path) -> Path:
    """Where the command `data` writes what it saw of the data in a place."""
    return Path("out") / "data" / (place.name or place.resolve().name)


def adapt_recipe(recipe: Values, typed: Values) -> Values:
    """A recipe without what contradicts the typed options; usual defaults take its place."""
    for adapt in (adapt_batch, adapt_weights, adapt_rate, adapt_sizes):
        recipe = adapt(recipe, recipe | typed, {name for name in recipe if name not in typed})
    model = typed.get("model", "")
    if "stochastic_depth" not in typed and model and not any(part in model for part in WITH_BLOCKS):
        return recipe | {"stochastic_depth": 0.0}
    return recipe


def adapt_batch(recipe: Values, wanted: Values, changeable: set[str]) -> Values:
    """A recipe that leaves a batch size that you give as it is."""
    is_typed = "batch_size" in wanted and "batch_size" not in changeable
    return recipe | {"fit_batch": False} if is_typed and "fit_batch" in changeable else recipe


def adapt_weights(recipe: Values, wanted: Values, changeable: set[str]) -> Values:
    """A recipe that trains all weights if none of them have been trained (`--weights none`)."""
    starts_anew = wanted.get("weights", "") is None and not wanted.get("init_from")
    dropped = {"freeze", "freeze_epochs"} & changeable if starts_anew else set()
    return {name: value for name, value in recipe.items() if name not in dropped}


def adapt_rate(recipe: Values, wanted: Values, changeable: set[str]) -> Values:
    """A recipe whose warm-up ends in time, and whose lowest rate is not above the highest.

    In time means before the training ends, and before the first milestone.
    """
    changes: Values = {}
    warmup, milestones = wanted.get("lr_warmup_epochs", 0), wanted.get("lr_milestones", ())
    later = tuple(epoch for epoch in milestones if epoch > warmup)
    if later and "lr_milestones" in changeable:
        changes["lr_milestones"] = later
    if "lr_warmup_epochs" in changeable:
        ends = milestones[:1] if wanted["lr_scheduler"] == "multistep" else ()
        longest = 0 if wanted["lr_scheduler"] == "onecycle" else min([wanted["epochs"], *ends]) - 1
        changes["lr_warmup_epochs"] = min(warmup, longest)
    if "min_lr" in changeable and wanted.get("lr") is not None:
        changes["min_lr"] = min(wanted["min_lr"], wanted["lr"])
    return recipe | changes


def adapt_sizes(recipe: Values, wanted: Values, changeable: set[str]) -> Values:
    """A recipe without image sizes that contradict those that you ask for."""
    low, high, size = (wanted.get(name) for name in ("min_res", "max_res", "image_size"))
    dropped: set[str] = set()
    changes: Values = {}
    if "image_size" in changeable and (high or (low or 0) > size):
        dropped.add("image_size")
    if "max_res" in changeable and size and "image_size" not in changeable:
        dropped.add("max_res")
        high = size
    if "min_res" in changeable and size and (high < low or high % RESIZING_STEP):
        dropped |= {"min_res", "max_res", "end_ramp"} & changeable
    elif "min_res" in changeable and not high % RESIZING_STEP:
        changes["min_res"] = min(low, high)
    elif "max_res" in changeable - dropped:
        changes["max_res"] = max(low, high)
    return {name: value for name, value in (recipe | changes).items() if name not in dropped}


def list_recipes() -> str:
    """The recipes and the options that they set."""
    lines = []
    for name, defaults in RECIPES.items():
        options = (as_option(key, value).replace(" ", "\xa0") for key, value in defaults.items())
        listed = textwrap.fill(" ".join(options), 74, break_on_hyphens=False)
        lines.append(f"  {name}:\n{textwrap.indent(listed, '    ')}".replace("\xa0", " "))
    return "\n".join(lines)
