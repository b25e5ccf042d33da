"""What `--recipe` takes: sets of defaults, which every other option overrides."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from split_affinity.options.values import RESIZING_STEP, Values
from split_affinity.text import as_option

# fmt: off
# Each recipe is a set of defaults. Its steps have 256 images where the rates are those of papers
# that use 256, and 128 where it is made for small machines; to fine-tune, 32.
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
FROM_CHECKPOINT = ("imagenet-finetune", "imagenet-full")  # these start with trained weights
GIVE_WEIGHTS = "give --init-from PATH or --weights NAME"


def recipe_defaults(name: str) -> Values:
    """What a recipe sets, its output folder included: nobody wants to lose a run of weeks."""
    return {"output_dir": Path("out") / name, **RECIPES[name]}


def adapted_recipe(recipe: Values, typed: Values) -> Values:
    """What a recipe sets, where that does not contradict the options typed: what nobody has typed
    gives way. Of a name that is missing then, the usual default holds.
    """
    for bend in (bend_course, bend_sizes):
        recipe = bend(recipe, recipe | typed, {name for name in recipe if name not in typed})
    model = typed.get("model", "")
    if "stochastic_depth" not in typed and model and not any(map(model.__contains__, WITH_BLOCKS)):
        recipe = recipe | {"stochastic_depth": 0.0}
    return recipe


# What is in the names of models of which --stochastic-depth can leave blocks out.
WITH_BLOCKS = ("resne", "efficientnet", "convnext", "swin", "maxvit", "timm/")


def bend_course(recipe: Values, wanted: Values, free: set[str]) -> Values:
    """A recipe whose warm-up ends before the training, or its first milestone, does, and whose
    lowest rate is none above the highest; only those of its settings that are `free` change.
    """
    bends: Values = {}
    warmup, milestones = wanted.get("lr_warmup_epochs", 0), wanted.get("lr_milestones", ())
    if later := tuple(epoch for epoch in milestones if epoch > warmup and "lr_milestones" in free):
        bends["lr_milestones"] = later
    if "lr_warmup_epochs" in free:
        ends = milestones[:1] if wanted["lr_scheduler"] == "multistep" else ()
        longest = 0 if wanted["lr_scheduler"] == "onecycle" else min([wanted["epochs"], *ends]) - 1
        bends["lr_warmup_epochs"] = min(warmup, longest)
    if "min_lr" in free and wanted.get("lr") is not None:
        bends["min_lr"] = min(wanted["min_lr"], wanted["lr"])
    return recipe | bends


def bend_sizes(recipe: Values, wanted: Values, free: set[str]) -> Values:
    """A recipe without sizes of images that do not go with others which are asked for; only those
    of its settings that are `free` change.
    """
    low, high, size = (wanted.get(name) for name in ("min_res", "max_res", "image_size"))
    dropped: set[str] = set()
    bends: Values = {}
    if "image_size" in free and (high or (low or 0) > size):
        dropped.add("image_size")
    if "max_res" in free and size and "image_size" not in free:
        dropped.add("max_res")
        high = size
    if "min_res" in free and size and (high < low or high % RESIZING_STEP):
        dropped |= {"min_res", "max_res", "end_ramp"} & free
    elif "min_res" in free and not high % RESIZING_STEP:
        bends["min_res"] = min(low, high)
    elif "max_res" in free - dropped:
        bends["max_res"] = max(low, high)
    return {name: value for name, value in (recipe | bends).items() if name not in dropped}


def list_recipes() -> str:
    """The recipes and what they set, as options."""
    lines = []
    for name, defaults in RECIPES.items():
        options = (as_option(key, value).replace(" ", "\xa0") for key, value in defaults.items())
        listed = textwrap.fill(" ".join(options), 74, break_on_hyphens=False)
        lines.append(f"  {name}:\n{textwrap.indent(listed, '    ')}".replace("\xa0", " "))
    return "\n".join(lines)
