"""Stand-ins for names of the program, for as long as a test runs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

PACKAGES = ("split_affinity", "train_split_affinity")


def holders(name: str) -> list[ModuleType]:
    """The modules of the program that have a module-level name: the one that defines it, and those
    that have imported it from there.
    """
    found = [
        module
        for each, module in list(sys.modules.items())
        if each.partition(".")[0] in PACKAGES and name in vars(module)
    ]
    assert found, f"no module of the program has {name}"
    return found


def set_everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Give a module-level name another value in every module that has it, until a test ends."""
    for module in holders(name):
        monkeypatch.setattr(module, name, value)
