"""What torchrun, or another launcher, says in the environment. Knows no PyTorch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of a launcher; by itself it is the only one."""

    rank: int = 0  # of all
    ranks: int = 1
    local_rank: int = 0  # of those on its machine


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """What a launcher says in torchrun's variables; values that make no sense are ignored."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    texts = [environment.get(name, "") for name in names[:2]]
    texts.append(environment.get("LOCAL_RANK") or "0")
    numbers = (re.fullmatch(r"\d{1,9}", text, re.ASCII) for text in texts)
    if not all(name in environment for name in names) or not all(numbers):
        return Launch()
    launch = Launch(*map(int, texts))
    return launch if launch.rank < launch.ranks else Launch()
