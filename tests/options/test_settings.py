"""Settings in their groups. Run: python -m pytest tests/options/test_settings.py"""

import ast
import dataclasses
from pathlib import Path

import pytest

import split_affinity
from split_affinity.data.transforms import image_size_in
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import Core, Topology
from split_affinity.models.freezing import mostly_frozen
from split_affinity.models.pretrained import largest_size
from split_affinity.options.settings import CoreSettings, DataSettings, Settings, TrainingSettings
from split_affinity.text import readable

# Groups of settings


def test_the_order_of_settings_in_help_and_in_files():
    names = """
    model data_path dataset download val_share num_classes image_size val_resize interpolation mean
    std full_decode min_res max_res end_ramp subset max_bad_images workers min_scale hflip
    color_jitter auto_augment ra_magnitude random_erase mixup_alpha cutmix_alpha augment_confused
    recipe batch_size fit_batch accumulate steps epochs opt lr lr_body_factor momentum weight_decay
    norm_weight_decay bias_weight_decay skip_decay_1d lr_scheduler
    lr_warmup_epochs lr_step_epochs lr_milestones lr_gamma lr_restart_epochs min_lr label_smoothing
    class_weights clip_grad_norm freeze freeze_epochs stochastic_depth teacher teacher_weights
    teacher_share model_ema model_ema_decay early_stopping target_top1 seed deterministic resume
    weights init_from test_only save_steps save_freq keep_best mirror split schedule forward_cores
    backward_cores loader_cores forward_threads backward_threads machine record ranks timeout
    precision fused_norm channels_last fold_norm fused tuned_malloc flush_denormals grads_to_none
    quick preload simulate pictures log_file output_dir print_freq tensorboard phases
    counters operators open json csv
    """
    assert [setting.name for setting in dataclasses.fields(Settings)] == names.split()


def test_a_function_that_needs_one_group_takes_it_alone():
    cores = tuple(Core(0, 0, 0, cpu, (cpu,)) for cpu in range(3))
    machine = Topology("test", cores, frozenset(), frozenset(range(3)), None, True)
    plan = plan_cores(machine, CoreSettings(split="1:2"))
    assert (plan.forward.cpus, plan.backward.cpus) == ((0,), (1, 2))
    ramp = DataSettings(min_res=64, image_size=128, end_ramp=3)
    assert [image_size_in(ramp, epoch) for epoch in (1, 2, 3)] == [64, 96, 128]
    assert largest_size(DataSettings(), 32) == 32
    assert mostly_frozen(TrainingSettings(freeze="body")) == "body"


def test_a_function_that_takes_one_group_uses_no_other():
    """It reads settings of that group, and passes it on only to functions that take it too."""
    names_of = {
        group.__name__: {setting.name for setting in dataclasses.fields(group)}
        for group in Settings.__bases__
    }
    takers = {
        (function.name, ast.unparse(argument.annotation)): (function, argument.arg)
        for file in Path(split_affinity.__file__).parent.rglob("*.py")
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        for argument in function.args.args
        if argument.annotation and ast.unparse(argument.annotation) in names_of
    }
    assert {group for _, group in takers} >= {"DataSettings", "TrainingSettings", "CoreSettings"}
    for (name, group), (function, parameter) in takers.items():
        for node in ast.walk(function):
            for child in ast.iter_child_nodes(node):
                if not isinstance(child, ast.Name) or child.id != parameter:
                    continue
                if isinstance(node, ast.Call):
                    assert (ast.unparse(node.func), group) in takers, name
                else:
                    assert node.attr in names_of[group], name


# Text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain \\x41", r"plain \x41"),
        ("Blüte 中 😀".encode(), "Blüte 中 😀"),
        (b"caf\xe9", r"caf\xe9"),
        (b"\xc3\xbc \xc3", r"ü \xc3"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_in_any_locale_becomes_the_same_text(name, text, encoding):
    once = readable(name.decode(encoding, "surrogateescape"))
    assert once == readable(once) == text
