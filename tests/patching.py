"""Stand-ins for names of the program, for as long as a test runs."""

from __future__ import annotations

import sys
from typing import Any

import pytest

PACKAGES = ("split_affinity", "train_split_affinity")


def set_everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Give a module-level name another value in every module of the program that has it: the one
    that defines it, and those that have imported it from there.
    """
    holders = [
        module
        for each, module in list(sys.modules.items())
        if each.partition(".")[0] in PACKAGES and name in vars(module)
    ]
    assert holders, f"no module of the program has {name}"
    for module in holders:
        monkeypatch.setattr(module, name, value)
