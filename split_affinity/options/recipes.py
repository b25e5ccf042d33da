"""What `--recipe` takes: sets of defaults, which every other option overrides."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from split_affinity.options.values import Values
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


def list_recipes() -> str:
    """The recipes and what they set, as options."""
    lines = []
    for name, defaults in RECIPES.items():
        options = (as_option(key, value).replace(" ", "\xa0") for key, value in defaults.items())
        listed = textwrap.fill(" ".join(options), 74, break_on_hyphens=False)
        lines.append(f"  {name}:\n{textwrap.indent(listed, '    ')}".replace("\xa0", " "))
    return "\n".join(lines)
