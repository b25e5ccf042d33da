"""Forges checkpoints, and goes on from each of them in this one process; a program of its own, so
that the memory which all that takes can be told.

    python tests/checkpoints/forging.py CHECKPOINT FOLDER COUNT

For each a line of JSON is printed: what was forged, the exit code, what was printed as an error,
and which files were touched; in the end the largest memory of the process.
"""

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import torch
from small import small_model

from split_affinity.checkpoints.state import seal
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.saved import LEFT
from train_split_affinity import main

LONG = 10**400  # a whole number that no float can hold
DEEP = [[[[[[[[[[1]]]]]]]]]]


def sealed(state):
    """A file's content, as sound as any."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue() + seal(hashlib.sha256(file.getvalue()))


def odd_tensors(value):
    """Tensors that are none of those that a model could have in its place."""
    yield torch.zeros(1).expand(10**13)
    yield torch.zeros(1, dtype=value.dtype).expand(10**10)
    yield torch.eye(3).to_sparse()
    yield torch.empty(2, device="meta")
    yield torch.zeros(2, dtype=torch.complex64)
    yield torch.zeros(value.shape, dtype=torch.int32)
    yield torch.zeros(3, 5, 7)
    yield torch.zeros(())


def wrong_values(value, where):
    """Values of other kinds, or out of range, none of which makes sense in the place of this one;
    what could have been typed is not among them.
    """
    in_settings = where[0] in ("settings", "asked")
    common = [DEEP, b"bytes", LONG, torch.zeros(2), "x\n# y \x1b[31m"]
    if isinstance(value, torch.Tensor):
        kept_by_optimizer = where[0] == "optimizer"
        yield from (
            7,
            "x",
            [],
            {},
            {"a": 1},
            *odd_tensors(value),
            *([] if kept_by_optimizer else [None]),
        )
        if value.is_floating_point() and not kept_by_optimizer:
            yield torch.full_like(value, math.nan)
        return
    yield from common
    if not isinstance(value, dict):
        yield {"a": 1}
    if isinstance(value, bool):
        yield from ("x", 1, *([] if where[0] in ("scheduler", "optimizer") else [None]))
    elif isinstance(value, int):
        yield from ("x", True, math.nan, [value], 10**30)
        yield from () if where[0] in ("scheduler", "optimizer", "flow") else (-1, 1.5, 2**63)
    elif isinstance(value, float):
        yield from ("x", True, math.nan, math.inf, [])
    elif isinstance(value, str):
        yield from (7, True, [], "x" * 10**6)
    elif isinstance(value, (list, tuple)):
        yield from (None, {}, [[]], [None]) if not in_settings else ({}, [[]], [None])
    elif isinstance(value, dict):
        yield from (None, 7, [])
    else:
        yield from ({}, [[]])


# Where another value, or none, is no fault: what a checkpoint has for information alone, what it
# may lack, and what is not taken from it.
FREE = {"data_path", "augment_confused", "teacher_weights", "class_weights", *LEFT, "json"}
FREE |= {"output_dir"}
FREE |= set(
    "resume weights init_from test_only download machine record quick preload simulate".split()
)
FREE |= {"pictures", "csv", "open", "operators"}


def places(value, where=()):
    """All places in a state, from the top down."""
    if where:
        yield where
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*where, key))
    elif isinstance(value, (list, tuple)) and value and where[0] not in ("settings", "asked"):
        yield from places(value[0], (*where, 0))


def at(state, where):
    """The value at a place."""
    for key in where:
        state = state[key]
    return state


def put(state, where, value):
    """Put another value into a place; tuples on the way become lists."""
    *above, last = where
    for depth in range(1, len(above) + 1):
        owner = at(state, above[:depth])
        if isinstance(owner, tuple):
            at(state, above[: depth - 1])[above[depth - 1]] = list(owner)
    at(state, above)[last] = value


def may_be_anything(where, wrong):
    """Whether a wrong value at a place is no fault of the file."""
    if FREE & set(map(str, where)):
        return True
    if where[0] == "versions" or where[:2] == ("data", "fingerprint"):
        return isinstance(wrong, str)
    if where in (("flow",), ("data",)):
        return wrong is None
    if where == ("ahead",):
        return isinstance(wrong, dict) and not wrong
    if where[-1] == "lr_warmup_epochs":
        return isinstance(wrong, float) and not math.isnan(wrong)
    if where[:2] == ("progress", "history") and len(where) > 3:
        return wrong is None or isinstance(wrong, (str, int, float))  # figures of other versions
    return where[-1] in ("foreach", "fused") and wrong is True


def forgeries(state, count, seed=0):
    """Some forged states, and what was done to each."""
    drawn = []
    for where in places(state):
        value = at(state, where)
        for wrong in wrong_values(value, where):
            if not may_be_anything(where, wrong):
                drawn.append((where, "is", wrong))
        required = len(where) == 1 or where[0] == "progress" and len(where) == 2
        if required and where[0] not in ("data", "asked"):
            drawn.append((where, "is missing", None))
        if isinstance(value, dict) and where[0] in ("progress", "data", "flow") and len(where) == 1:
            drawn.append(((*where, "extra"), "is", 1))
    drawn += [(("model", "0.weight"), "is missing", None), (("model", "new"), "is", torch.zeros(2))]
    drawn += [(("settings", "num_classes"), "is", 10**7), (("settings", "model"), "is", "vit_l_16")]
    drawn += [(("progress", "step"), "is", 2 * 10**9), (("progress", "epoch"), "is", 10**6)]
    random.Random(seed).shuffle(drawn)
    for where, what, wrong in drawn[:count]:
        forged = copy.deepcopy(state)
        if what == "is missing":
            del at(forged, where[:-1])[where[-1]]
        else:
            put(forged, where, wrong)
        shown = f"{type(wrong).__name__} {repr(wrong)[:30]}" if what == "is" else ""
        yield f"{'.'.join(map(str, where))} {what} {shown}", forged


def contents(*folders):
    """Names, sizes and times of all files."""
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def go_on(checkpoint, folder, count):
    """Go on from forgeries of a checkpoint, with this as the working directory."""
    os.chdir(folder)
    OWN_MODELS["small"] = small_model
    state = torch.load(checkpoint, weights_only=True)
    path = folder / "forged/last.pt"
    path.parent.mkdir()
    for forged, content in forgeries(state, count):
        path.write_bytes(sealed(content))
        before = contents(folder)
        said, shown = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            code = main(["--resume", str(path)])
        touched = sorted({each[0] for each in set(contents(folder)) ^ set(before)})
        print(
            json.dumps(
                {"forged": forged, "code": code, "said": said.getvalue(), "touched": touched}
            )
        )
    # Not getrusage's figure, which a process inherits from the one that starts it.
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    print(json.dumps({"peak_bytes": 1024 * int(peak[1])}))


if __name__ == "__main__":
    go_on(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
