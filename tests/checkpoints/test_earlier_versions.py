"""Checkpoints of an earlier version go on.

Run: python -m pytest tests/checkpoints/test_earlier_versions.py
"""

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from patching import set_everywhere
from saved_runs import EARLIER, EarlierImages, differences
from small import needs_two_cpus

from split_affinity.checkpoints.state import make_state, read_checkpoint, restore_state
from split_affinity.files import read_text
from split_affinity.training.schedules import SCHEDULES
from train_split_affinity import main

EARLIER_OPTIONS = (
    "--model small --image-size 32 --num-classes 3 -b 64 --accumulate 2 -j 0 --epochs 2 --lr 0.1 "
    "--lr-scheduler cosine --mixup-alpha 0.4 --model-ema --clip-grad-norm 1 --seed 3 "
    "--precision fp32 --forward-threads 1 --backward-threads 1 --no-fused --schedule"
).split()
EARLIER_CPU = "199a5eaa6c75fd7b"


def kind_of_cpu():
    """A digest of what kernels may be chosen by: kind of CPU, cache, instructions."""
    first = read_text(Path("/proc/cpuinfo")).split("\n\n")[0]
    names = "cpu family", "model\t", "stepping", "cache size", "flags"
    lines = [line for line in first.splitlines() if line.startswith(names)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.fixture
def go_on_from_earlier(monkeypatch):
    """Runs of today's program on the images of then."""
    set_everywhere(monkeypatch, "SyntheticImages", EarlierImages)
    return resume_earlier


def resume_earlier(schedule):
    options = ["--resume", str(EARLIER / f"{schedule}.pt"), "--output-dir", "out"]
    assert main([*EARLIER_OPTIONS, schedule, *options]) == 0
    return read_checkpoint(Path("out/last.pt"))


@pytest.mark.slow
@needs_two_cpus
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_checkpoint_of_an_earlier_version_goes_on(schedule, in_tmp, go_on_from_earlier):
    """To the same numbers: to the bit with the kind of CPU and the versions that computed them."""
    ours, theirs = go_on_from_earlier(schedule), read_checkpoint(EARLIER / f"{schedule}-end.pt")
    assert ours["progress"]["step"] == theirs["progress"]["step"] == 20
    for part in ("model", "average"):
        for name, value in theirs[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-3, atol=1e-5)
    assert torch.equal(ours["random_state"], theirs["random_state"])
    same = all(
        ours["versions"][name] == theirs["versions"][name] for name in ("torch", "torchvision")
    )
    if same and kind_of_cpu() == EARLIER_CPU:
        assert differences(ours, theirs) == []


@pytest.mark.slow
@needs_two_cpus
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_checkpoint_of_an_earlier_version_is_restored_to_the_bit(
    schedule, in_tmp, monkeypatch, go_on_from_earlier
):
    states, restore = [], restore_state

    def restored(state, train_state, settings):
        progress = restore(state, train_state, settings)
        made = make_state(settings, train_state, progress, state["data"])
        states.append(copy.deepcopy([state, made]))
        return progress

    set_everywhere(monkeypatch, "restore_state", restored)
    go_on_from_earlier(schedule)
    ((saved, made),) = states
    assert saved["progress"]["step"] == 7
    assert (saved["ahead"] is None) == (schedule != "delayed")
    assert differences(saved, made) == []
