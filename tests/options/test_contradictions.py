"""Options that contradict each other. Run: python -m pytest tests/options/test_contradictions.py"""

from pathlib import Path

import pytest
from option_texts import OUT

from split_affinity.errors import UserError
from split_affinity.options.commands import parse_arguments
from split_affinity.options.contradictions import contradictions
from split_affinity.options.recipes import FROM_CHECKPOINT, GIVE_WEIGHTS
from split_affinity.options.settings import Settings

# Options that contradict each other


def message_for(**settings):
    """What is said first against some settings; nothing if they contradict nothing."""
    return next(contradictions("train", Settings(**settings)), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_res": 128}, "--min-res and --end-ramp belong together: give both"),
        ({"end_ramp": 5}, "--min-res and --end-ramp belong together: give both"),
        ({"max_res": 224}, "--max-res 224 needs --min-res, where the ramp begins"),
        (
            {"min_res": 100, "end_ramp": 5},
            "--min-res 100 --max-res 224: multiples of 32 are allowed, the smaller one first",
        ),
        (
            {"min_res": 128, "max_res": 200, "end_ramp": 5},
            "--min-res 128 --max-res 200: multiples of 32 are allowed, the smaller one first",
        ),
        (
            {"min_res": 224, "max_res": 128, "end_ramp": 5},
            "--min-res 224 --max-res 128: multiples of 32 are allowed, the smaller one first",
        ),
        (
            {"min_res": 128, "image_size": 96, "end_ramp": 5},
            "--min-res 128 --max-res 96: multiples of 32 are allowed, the smaller one first",
        ),
        (
            {"min_res": 128, "max_res": 192, "image_size": 224, "end_ramp": 5},
            "--image-size 224 --max-res 192: give one of them",
        ),
        ({"min_res": 128, "end_ramp": 5}, None),
        ({"min_res": 128, "max_res": 192, "end_ramp": 5}, None),
        ({"min_res": 224, "max_res": 224, "end_ramp": 1}, None),
        ({"min_res": 128, "max_res": 192, "image_size": 192, "end_ramp": 5}, None),
        ({"image_size": 100}, None),
        (
            {"val_resize": 95, "image_size": 96},
            "--val-resize 95: at least the image size, 96, is allowed",
        ),
        (
            {"val_resize": 160, "min_res": 128, "max_res": 192, "end_ramp": 5},
            "--val-resize 160: at least the image size, 192, is allowed",
        ),
        ({"val_resize": 96, "image_size": 96}, None),
        ({"val_resize": 40}, None),  # whether it is enough, the data say
    ],
)
def test_progressive_resizing_has_to_be_a_ramp(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_warmup_epochs": 5}, "--lr-warmup-epochs 5 needs --epochs"),
        (
            {"lr_warmup_epochs": 5, "epochs": 9, "lr_scheduler": "onecycle"},
            "--lr-warmup-epochs 5: onecycle has a warm-up of its own",
        ),
        (
            {"lr_warmup_epochs": 5, "epochs": 5},
            "--lr-warmup-epochs 5: fewer than --epochs 5 are allowed",
        ),
        (
            {
                "lr_warmup_epochs": 4,
                "epochs": 9,
                "lr_scheduler": "multistep",
                "lr_milestones": (4, 6),
            },
            "--lr-milestones 4,...: the first is within the warm-up of 4",
        ),
        (
            {"lr_scheduler": "cosine", "lr": 0.01, "min_lr": 0.5},
            "--min-lr 0.5 is above the learning rate, 0.01: lower it, or raise --lr",
        ),
        (
            {"lr_scheduler": "warm-restarts", "min_lr": 0.0126},
            "--min-lr 0.0126 is above the learning rate, 0.0125: lower it, or raise --lr",
        ),
        (
            {"lr_scheduler": "cosine", "opt": "adam", "min_lr": 0.002},
            "--min-lr 0.002 is above the learning rate, 0.001: lower it, or raise --lr",
        ),
        ({"lr_scheduler": "cosine", "accumulate": 2, "min_lr": 0.0126}, None),
        ({"lr_scheduler": "cosine", "lr": 0.5, "min_lr": 0.5}, None),
        ({"lr_scheduler": "step", "lr": 0.01, "min_lr": 0.5}, None),
        ({"lr_warmup_epochs": 5, "epochs": 6}, None),
        ({"epochs": 9, "lr_scheduler": "onecycle"}, None),
        ({"lr_warmup_epochs": 4, "epochs": 9, "lr_milestones": (4, 6)}, None),
        (
            {
                "lr_warmup_epochs": 3,
                "epochs": 9,
                "lr_scheduler": "multistep",
                "lr_milestones": (4, 6),
            },
            None,
        ),
    ],
)
def test_a_course_of_the_learning_rate_has_to_be_possible(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 2, "accumulate": 1_000_000},
            "--batch-size 2 --accumulate 1000000: a step of 2000000 images; at most 131072 "
            "synthetic ones are allowed",
        ),
        (
            {"batch_size": 131_073},
            "--batch-size 131073 --accumulate 1: a step of 131073 images; at most 131072 "
            "synthetic ones are allowed",
        ),
        ({"batch_size": 32, "accumulate": 4096}, None),
        ({"batch_size": 2, "accumulate": 1_000_000, "data_path": Path("data")}, None),
    ],
)
def test_steps_of_synthetic_images_have_an_end(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pictures": ()},
            "predict needs pictures: files, folders, or patterns such as 'new/*.jpg'",
        ),
        ({}, "predict needs a trained model: give --resume PATH, or --weights NAME and --model"),
        ({"resume": Path("a.pt"), "weights": "W"}, "--resume a.pt and --weights W: give one"),
        (
            {"init_from": Path("a.pt")},
            "--init-from a.pt: predict takes --resume PATH or --weights NAME",
        ),
        ({"resume": Path("auto")}, "--resume auto needs --output-dir, where checkpoints are"),
        (
            {"weights": "W", "split": "auto"},
            "--split auto is for training, not for predict: give even, a ratio or none",
        ),
        ({"weights": "W", "split": "none"}, None),
        ({"resume": Path("a.pt")}, None),
        ({"resume": Path("auto"), "output_dir": Path("out")}, None),
        ({"weights": "W", "json": Path("a.json")}, None),
    ],
)
def test_predict_needs_pictures_and_one_trained_model(settings, message):
    settings = Settings(**{"pictures": ("a.jpg",)} | settings)
    assert next(contradictions("predict", settings), None) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_steps": 5}, "--save-steps 5 needs --output-dir, where checkpoints are"),
        ({"mirror": "memory://x"}, "--mirror memory://x needs --output-dir, where checkpoints are"),
        ({"resume": Path("auto")}, "--resume auto needs --output-dir, where checkpoints are"),
        (
            {"resume": Path("a.pt"), "init_from": Path("b.pt")},
            "--resume a.pt and --init-from b.pt: give one",
        ),
        (
            {"resume": Path("a.pt"), "weights": "DEFAULT"},
            "--resume a.pt and --weights DEFAULT: give one",
        ),
        (
            {"init_from": Path("b.pt"), "weights": "DEFAULT"},
            "--init-from b.pt and --weights DEFAULT: give one",
        ),
        (
            {"resume": Path("auto"), "output_dir": OUT, "init_from": Path("b"), "weights": "V1"},
            "--init-from b and --weights V1: give one",
        ),
        (
            {"test_only": True, "resume": Path("auto"), "output_dir": OUT, "weights": "V1"},
            "--resume auto and --weights V1: give one",
        ),
        (
            {"test_only": True},
            "--test-only needs --resume, the checkpoint to evaluate, or --weights NAME",
        ),
        ({"resume": Path("auto"), "output_dir": OUT, "weights": "DEFAULT"}, None),
        (
            {"test_only": True, "weights": "DEFAULT", "operators": True},
            "--operators profiles steps of a training, --test-only makes none: give one",
        ),
        ({"test_only": True, "weights": "DEFAULT"}, None),
        ({"weights": "DEFAULT"}, None),
        ({"save_steps": 5, "output_dir": OUT}, None),
        ({"mirror": "memory://x", "output_dir": OUT}, None),
        ({"resume": Path("auto"), "output_dir": OUT}, None),
        ({"resume": Path("a.pt")}, None),
        ({"resume": Path("auto"), "output_dir": OUT, "init_from": Path("b.pt")}, None),
        ({"test_only": True, "resume": Path("a.pt")}, None),
    ],
)
def test_checkpoint_options_need_each_other(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher": "resnet50"},
            "--teacher resnet50 needs --teacher-weights, a name such as DEFAULT or a file",
        ),
        (
            {"teacher_weights": "IMAGENET1K_V2"},
            "--teacher-weights IMAGENET1K_V2 needs --teacher, the model that they are of",
        ),
        (
            {"teacher_share": 0.7},
            "--teacher-share 0.7 needs --teacher and --teacher-weights",
        ),
        ({"teacher": "resnet50", "teacher_weights": "DEFAULT", "teacher_share": 0.7}, None),
        ({"teacher": "resnet50", "teacher_weights": "t.pth"}, None),
        ({"teacher_weights": "out/best.pt", "teacher_share": 1.0}, None),
        ({"teacher_weights": "./weights"}, None),
    ],
)
def test_the_options_of_a_teacher_need_each_other(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize("recipe", FROM_CHECKPOINT)
def test_some_recipes_start_from_trained_weights(recipe):
    message = f"--recipe {recipe} starts from trained weights: give --init-from PATH"
    with pytest.raises(UserError, match=message):
        parse_arguments(["--recipe", recipe])
    assert GIVE_WEIGHTS == "give --init-from PATH or --weights NAME"
    for option in ("--init-from", "--resume", "--weights"):
        parse_arguments(["--recipe", recipe, option, "a.pt"])
    assert parse_arguments(["plan", "--recipe", recipe])[0] == "plan", "which trains nothing"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"download": True}, "--download needs --data-path, the folder to put CIFAR-10 into"),
        ({"subset": 0.2}, "--subset 0.2 needs --data-path: synthetic images are made"),
        ({"early_stopping": 3}, "--early-stopping 3 needs --epochs"),
        (
            {"skip_decay_1d": True, "norm_weight_decay": 0.0},
            "--norm-weight-decay 0.0 and --skip-decay-1d: give one",
        ),
        (
            {"skip_decay_1d": True, "bias_weight_decay": 0.1},
            "--bias-weight-decay 0.1 and --skip-decay-1d: give one",
        ),
        ({"skip_decay_1d": True, "weight_decay": 0.1}, None),
        ({"norm_weight_decay": 0.0, "bias_weight_decay": 0.0}, None),
        ({"target_top1": 97.5}, "--target-top1 97.5 needs --epochs"),
        (
            {"augment_confused": Path("c.json")},
            "--augment-confused c.json needs --data-path: synthetic images are not augmented",
        ),
        ({"augment_confused": Path("c.json"), "data_path": Path("data")}, None),
        (
            {"class_weights": "balanced"},
            "--class-weights balanced needs --data-path: synthetic images are drawn from all "
            "classes alike",
        ),
        ({"class_weights": "balanced", "data_path": Path("data")}, None),
        (
            {"tensorboard": True},
            "--tensorboard needs --output-dir, the folder for all that is written",
        ),
        ({"tensorboard": True, "output_dir": Path("out")}, None),
        ({"download": True, "data_path": Path("data")}, None),
        ({"subset": 0.2, "data_path": Path("data")}, None),
        ({"early_stopping": 3, "target_top1": 97.5, "epochs": 9}, None),
        ({"epochs": 9, "steps": 7}, None),
    ],
)
def test_options_that_need_data_or_epochs_or_exclude_each_other(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize("command", ["train", "find-lr", "compare"])
@pytest.mark.parametrize("name", ["machine", "record"])
def test_another_machine_is_planned_for_and_no_more(command, name):
    settings = Settings(**{name: Path("m.json")})
    message = f"--{name} m.json is for plan, not for {command}"
    assert list(contradictions(command, settings)) == [message]
    assert not list(contradictions("plan", settings))


def test_another_machine_cannot_be_measured():
    settings = Settings(machine=Path("m.json"), split="auto")
    assert list(contradictions("plan", settings)) == [
        "--split auto measures the machine that it runs on, not that of --machine m.json: give a "
        "ratio such as 1:2"
    ]
