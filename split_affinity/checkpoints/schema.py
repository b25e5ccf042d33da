"""What a checkpoint may hold: types, ranges, shapes and sizes, checked before any of it is used.

The seal at the end of a checkpoint proves that the file is whole, not that its maker is honest.
"""

from __future__ import annotations

import argparse
import inspect
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from split_affinity.models.registry import build_model
from split_affinity.models.weights import Weights
from split_affinity.options.saved import settings_brought
from split_affinity.options.values import LARGEST_NUMBER

CHECKPOINT_FORMAT = "train_split_affinity 1"
MOST_ENTRIES = 10**6  # of a list or a table
LONGEST_TEXT = 10**5
SHARING = 4  # the state of several ranks has tensors that share memory


class Fault(ValueError):
    """What is wrong with a checkpoint's content, and where."""


def describe_value(value: Any) -> str:
    """A value from a file, in a few characters."""
    if isinstance(value, int) and abs(value) > 2**64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float, str, type(None))):
        text = repr(value[:40] if isinstance(value, str) else value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def place_in(where: str, key: Any) -> str:
    """The place of a table's entry."""
    name = key[:60] if isinstance(key, str) else describe_value(key)
    return f"{where}.{name}" if where else name


def require(is_right: bool, value: Any, where: str, allowed: str) -> None:
    """Raise Fault unless a value is right."""
    if not is_right:
        raise Fault(f"{where} is {describe_value(value)}, not {allowed}")


Check = Callable[[Any, str], None]  # of a value, and its place in the checkpoint; raises Fault


def value_that(is_right: Callable[[Any], bool], allowed: str) -> Check:
    """A check of a single value."""
    return lambda value, where: require(is_right(value), value, where, allowed)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; Python compares a long int exactly."""
    return type(value) in (int, float) and abs(value) <= 1e300


def is_share(value: Any) -> bool:
    """Whether a value is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


check_number = value_that(is_number, "a finite number")
check_count = value_that(
    lambda value: type(value) is int and 0 <= value <= LARGEST_NUMBER,
    f"a whole number from 0 to {LARGEST_NUMBER}",
)
check_text = value_that(
    lambda value: type(value) is str and len(value) <= LONGEST_TEXT,
    f"a text of at most {LONGEST_TEXT} characters",
)
check_plain = value_that(
    lambda value: type(value) in (bool, str, type(None)) or is_number(value),
    "a finite number, a text, True, False or None",
)


check_class_weight = value_that(lambda value: is_number(value) and value > 0, "above 0")


def check_entries(values: Any, where: str, *kinds: type) -> None:
    """Raise Fault unless a value is a collection of one of these types, and not too long."""
    require(isinstance(values, kinds), values, where, "a table" if kinds == (dict,) else "a list")
    if len(values) > MOST_ENTRIES:
        raise Fault(f"{where} has {len(values)} entries; {MOST_ENTRIES} are allowed")


def check_form(value: Any, form: Any, where: str = "") -> None:
    """Raise Fault unless a value has a form.

    A form is a check; or [form], a list; or (form, None), a value that may be None; or {key: form},
    a table. The key is a name that the table must have, or the type of all other keys.
    """
    if callable(form):
        form(value, where)
    elif isinstance(form, tuple):
        if value is not None:
            check_form(value, form[0], where)
    elif isinstance(form, list):
        check_entries(value, where, list, tuple)
        for number, each in enumerate(value):
            check_form(each, form[0], f"{where}[{number}]")
    else:
        check_entries(value, where or "the content", dict)
        if missing := form.keys() - value.keys() - MAY_BE_MISSING - {str, int}:
            raise Fault(f"{place_in(where, min(missing))} is missing")
        for key, each in value.items():
            known = form.get(type(key))
            if type(key) is str:
                known = form.get(key, known)
            if known is None:
                raise Fault(f"{place_in(where, key)} is unknown to this version")
            check_form(each, known, place_in(where, key))


def check_tensor(value: Any, where: str) -> None:
    """A plain tensor, with memory for all the elements that it claims."""
    right = isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter)
    right = right and value.layout == torch.strided and value.device.type == "cpu"
    right = right and not (value.is_quantized or value.is_complex())
    require(right, value, where, "a plain tensor")
    claimed, there = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if claimed > there:
        raise Fault(f"{where} claims {claimed} bytes, of which the file has {there}")


def check_weight(value: Any, where: str) -> None:
    """A tensor of finite numbers."""
    check_tensor(value, where)
    if value.is_floating_point() and not value.isfinite().all():
        raise Fault(f"{where} holds values that are infinite or no numbers: the run had diverged")


def check_random_state(value: Any, where: str) -> None:
    """What torch.set_rng_state takes."""
    check_tensor(value, where)
    own = torch.get_rng_state()
    right = (value.dtype, value.shape) == (own.dtype, own.shape)
    require(right, value, where, f"a state of torch's generator, of {len(own)} bytes")


def check_nested(value: Any, where: str, depth: int = 6) -> None:
    """Plain values and tensors, in lists and tables of at most that depth."""
    if isinstance(value, torch.Tensor):
        check_tensor(value, where)
    elif not isinstance(value, (dict, list, tuple)):
        check_plain(value, where)
    else:
        require(depth > 0, value, where, "nested so deeply")
        check_entries(value, where, dict, list, tuple)
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            require(type(key) in (int, str), key, f"a key of {where}", "a number or a text")
            check_nested(each, place_in(where, key), depth - 1)


def check_settings(values: Any, where: str) -> None:
    """Settings by name; those that a run takes are checked as if you had typed them."""
    check_entries(values, where, dict)
    try:
        settings_brought(values)
    except argparse.ArgumentTypeError as error:
        raise Fault(f"{where}.{error}") from None
    check_form(values, {str: check_nested}, where)  # the others, too, are plain and not too deep


def check_best(pair: Any, where: str) -> None:
    """The top-1 of an epoch, and its number."""
    check_form(pair, [check_number], where)
    right = len(pair) == 2 and 0 <= pair[0] <= 100
    require(right, pair, where, "a top-1 from 0 to 100 and an epoch")
    check_count(pair[1], f"{where}[1]")


WEIGHTS = {str: check_weight}
OPTIMIZER = {
    "state": {int: {str: check_nested}},
    "param_groups": [{"params": [check_count], str: check_nested}],
}
GRADIENT_NORMS = {"sums": {str: check_number}, "measured": check_count, "steps": check_count}
EPOCH = {
    "epoch": check_count,
    "val_top1": (check_number, None),
    "val_loss": (check_number, None),
    "unlike_score": check_text,  # of these four, runs/unlike.py makes a threshold
    "unlike_threshold": (value_that(is_share, "a number from 0 to 1"), None),
    "unlike_false_alarms": value_that(is_share, "a number from 0 to 1"),
    "unlike_images": check_count,
    "gradient_norms": {str: check_number},
    str: check_plain,
}
COUNTS = "step epoch batches images top1 top5 epoch_batches".split()
PROGRESS = dict.fromkeys(COUNTS, check_count) | {
    "loss_sum": check_number,
    "lr": check_number,
    "best": [check_best],
    "history": [EPOCH],
    "bad_images": [check_text],
}
DATA = {
    "classes": [check_text],
    "images": check_count,
    "fingerprint": check_text,
    "confused": [check_text],
    "class_weights": [check_class_weight],
}
RANK = {"buffers": WEIGHTS, "average": WEIGHTS, "random_state": check_random_state}
CHECKPOINT = {
    "format": check_text,
    "model": WEIGHTS,
    "average": (WEIGHTS, None),
    "optimizer": OPTIMIZER,
    "scheduler": ({str: check_nested}, None),
    "flow": (GRADIENT_NORMS, None),  # since the last validation
    "ahead": (WEIGHTS, None),  # those with which `delayed` has begun the next step
    "random_state": check_random_state,
    "progress": PROGRESS,
    "settings": check_settings,
    "versions": {str: check_text},
    "data": (DATA, None),
    "asked": (check_settings, None),
    "ranks": ([RANK], None),
}
# From earlier versions, from one rank, without an option, or an epoch without validation.
MAY_BE_MISSING = {"data", "confused", "class_weights", "asked", "ranks", "val_loss"}
MAY_BE_MISSING |= {f"unlike_{name}" for name in ("score", "threshold", "false_alarms", "images")}


def check_content(saved: Any) -> None:
    """Raise Fault if the content of a checkpoint contradicts the schema, or itself."""
    made_by = saved.get("format") if isinstance(saved, dict) else None
    if made_by != CHECKPOINT_FORMAT:
        name, _, ours = CHECKPOINT_FORMAT.rpartition(" ")
        found = re.fullmatch(rf"{name} (\d{{1,9}})", made_by) if isinstance(made_by, str) else None
        if found and int(found[1]) > int(ours):
            formats = f"format {found[1]}; this one: {ours}"
            raise Fault(f"made by a newer version of this program ({formats})")
        raise Fault(f"no checkpoint of this program ({CHECKPOINT_FORMAT})")
    check_form(saved, CHECKPOINT)
    progress, settings = saved["progress"], settings_brought(saved["settings"])
    step, epoch, batches = progress["step"], progress["epoch"], progress["batches"]
    epoch_batches = progress["epoch_batches"]
    step_batches = settings.get("accumulate", 1) * (settings.get("ranks") or 1)
    steps = epoch * (epoch_batches // step_batches) + batches // step_batches
    if epoch_batches and (batches > epoch_batches or step != steps):
        stands = f"epoch {epoch} and batch {batches} of {epoch_batches}"
        raise Fault(f"progress.step is {step}, which is not that of {stands}")
    epochs = [row["epoch"] for row in progress["history"]] + [pair[1] for pair in progress["best"]]
    if max(epochs, default=0) > epoch:
        raise Fault(f"progress.epoch is {epoch}, but there are figures of epoch {max(epochs)}")
    data = saved.get("data") or {}
    weights = data.get("class_weights")
    if weights is not None and len(weights) != len(data["classes"]):
        counts = f"{len(weights)} entries, and data.classes {len(data['classes'])}"
        raise Fault(f"data.class_weights has {counts}")


def fault_of_tensors(found: Weights) -> str:
    """What is wrong with the weights of another program by themselves, if anything."""
    try:
        check_form(found, WEIGHTS)
    except Fault as fault:
        return str(fault)
    return ""


def check_shapes(saved: dict[str, Any]) -> None:
    """Raise Fault for tensors that are not those of the model that a checkpoint names."""
    settings, tensors = saved["settings"], saved["model"]
    name, size = settings.get("model"), settings.get("image_size") or 224
    most_rows = max((max(value.shape, default=0) for value in tensors.values()), default=0)
    # A forged number of classes must not cost time: some tensor has a row for each class.
    num_classes = min(settings.get("num_classes") or most_rows, most_rows + 1)
    try:
        with torch.device("meta"):  # takes no memory
            own = build_model(name, num_classes, size).state_dict()
    except Exception:  # unknown, not installed, too small an image: whoever builds it says why
        return
    parts = {part: saved[part] for part in ("model", "average", "ahead")}
    for number, rank_state in enumerate(saved.get("ranks") or ()):
        parts |= {f"ranks[{number}].{part}": rank_state[part] for part in ("buffers", "average")}
    for where, found in parts.items():
        if found is None:
            continue
        if where in ("model", "average") and (missing := own.keys() - found.keys()):
            raise Fault(f"{where}.{min(missing)} is missing")
        for each, value in found.items():
            if each not in own:
                raise Fault(f"{where}.{each[:60]} is unknown to {name}")
            if value.shape != own[each].shape:
                shapes = f"{list(value.shape)}, not {list(own[each].shape)}"
                raise Fault(f"{where}.{each} has the shape {shapes}")
            if value.dtype != own[each].dtype:
                raise Fault(f"{where}.{each} is of {value.dtype}, not {own[each].dtype}")


def claimed_bytes(value: Any) -> int:
    """Memory that the tensors of a checked value claim."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (dict, list, tuple)):
        return sum(map(claimed_bytes, value.values() if isinstance(value, dict) else value))
    return 0


def check_size(saved: Any, path: Path) -> None:
    """Raise Fault if a state claims more memory than its file can fill."""
    claimed, size_bytes = claimed_bytes(saved), path.stat().st_size
    if claimed > SHARING * size_bytes:
        raise Fault(f"its tensors claim {claimed} bytes, and it has {size_bytes}")


def check_archive(path: Path) -> None:
    """Raise Fault for an archive that would take more memory than its file."""
    size_bytes = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch.load will say so in its own words
    claimed = sum(entry.file_size for entry in entries)  # torch.save compresses nothing
    if claimed > size_bytes or any(entry.compress_type for entry in entries):
        raise Fault(f"its entries claim {claimed} bytes, and it has {size_bytes}")


def match_state(own: Any, saved: Any, where: str) -> Any:
    """A saved state, as far as it is made like the object's own; raises Fault for other values.

    Other versions of PyTorch may have more in it, or less.
    """
    if isinstance(own, dict):
        check_entries(saved, where, dict)
        found = dict(own)
        for key, value in own.items():
            if key in saved:
                found[key] = match_state(value, saved[key], f"{where}.{key}")
            elif not isinstance(value, (bool, type(None))):
                raise Fault(f"{where}.{key} is missing")
        return type(own)(found)  # a Counter, too
    if isinstance(own, (list, tuple)):
        check_entries(saved, where, list, tuple)
        require(len(saved) == len(own), saved, where, f"a list of {len(own)} entries")
        pairs = enumerate(zip(own, saved, strict=True))
        return type(own)(match_state(*pair, f"{where}[{number}]") for number, pair in pairs)
    if isinstance(own, bool) or own is None:
        require(saved is None or type(saved) is bool, saved, where, "True, False or None")
    elif isinstance(own, (int, float)):
        right = is_number(saved) and abs(saved) <= LARGEST_NUMBER
        require(right, saved, where, f"a number of at most {LARGEST_NUMBER}")
    else:
        require(type(saved) is type(own) and saved == own, saved, where, describe_value(own))
    return saved


SCHEDULED = ("lr", "momentum", "betas")  # what a scheduler changes


def match_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's saved state, with settings of this one. Raises Fault if it does not fit."""
    groups = optimizer.state_dict()["param_groups"]
    theirs = match_state(groups, saved["param_groups"], "optimizer.param_groups")
    for number, (own, group) in enumerate(zip(groups, theirs, strict=True)):
        where = f"optimizer.param_groups[{number}]"
        if group["params"] != own["params"]:
            raise Fault(f"{where}.params are not those of this model")
        own |= {name: group[name] for name in SCHEDULED if name in own}
        require(own["lr"] >= 0, own["lr"], f"{where}.lr", "0 or more")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = kept_for_weight(optimizer)
    needed = kept.keys() - {"momentum_buffer"}  # which may begin or end with any step
    for number, values in saved["state"].items():
        where = f"optimizer.state.{number}"
        if number not in range(len(weights)):
            raise Fault(f"{where} is of no weight of this model")
        if values and values.keys() - {"momentum_buffer"} != needed:
            names = ", ".join(sorted(needed)) or "momentum_buffer"
            raise Fault(f"{where} has {', '.join(map(str, values))[:100]}, not {names}")
        for name, value in values.items():
            if value is None and name == "momentum_buffer":
                continue
            is_count = name in kept and not kept[name].shape
            shape = () if is_count else weights[number].shape
            right = isinstance(value, torch.Tensor) and value.is_floating_point()
            right = right and value.shape == shape
            require(right, value, f"{where}.{name}", f"a tensor of the shape {list(shape)}")
    return {"state": saved["state"], "param_groups": groups}


def kept_for_weight(optimizer: torch.optim.Optimizer) -> Weights:
    """What an optimizer keeps for a weight of the shape (1,): a count of steps has the shape ()."""
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    known = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    other = type(optimizer)([weight], **options)
    other.step()
    return dict(other.state[weight])
