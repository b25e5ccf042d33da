"""What torchrun, or another launcher, says in the environment. Knows no PyTorch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Which of the processes this one is that a launcher has started together, counted from 0: of
    all `ranks`, and of those on its machine. A process by itself is the first and only one.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun says in the environment, or another launcher that sets the same variables. What
    makes no sense, something else has set.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    texts = [environment.get(name, "") for name in names[:2]]
    texts.append(environment.get("LOCAL_RANK") or "0")
    whole = (re.fullmatch(r"\d{1,9}", text, re.ASCII) for text in texts)
    if not all(name in environment for name in names) or not all(whole):
        return Launch()
    launch = Launch(*map(int, texts))
    return launch if launch.rank < launch.ranks else Launch()
