"""What a checkpoint may hold: types, ranges, shapes and sizes, checked before any of it is used.

The seal at a checkpoint's end proves that the file is whole, not that who made it is honest.
"""

from __future__ import annotations

import argparse
import inspect
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from split_affinity.models.registry import build_model
from split_affinity.models.weights import Weights
from split_affinity.options.saved import settings_brought
from split_affinity.options.values import LARGEST_NUMBER

MOST_ENTRIES = 10**6  # of a list or of a table
LONGEST_TEXT = 10**5
SHARING = 4  # tensors may share memory, as much as that: a state of several ranks does


class Fault(ValueError):
    """What is wrong with a checkpoint's content, and where."""


Check = Callable[[Any, str], None]  # raises Fault; of a value, and where in the checkpoint it is


def described(value: Any) -> str:
    """A value from a file, in a few characters."""
    if isinstance(value, int) and abs(value) > 2**64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float, str, type(None))):
        text = repr(value[:40] if isinstance(value, str) else value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def check_kind(is_right: bool, value: Any, where: str, allowed: str) -> None:
    """Raise Fault unless a value is right."""
    if not is_right:
        raise Fault(f"{where} is {described(value)}, not {allowed}")


def check_count(value: Any, where: str) -> None:
    """A count."""
    right = type(value) is int and 0 <= value <= LARGEST_NUMBER
    check_kind(right, value, where, f"a whole number from 0 to {LARGEST_NUMBER}")


def check_number(value: Any, where: str) -> None:
    """A number."""
    right = type(value) in (int, float) and abs(value) <= 1e300  # compares exactly, NaN is not
    check_kind(right, value, where, "a finite number")


def check_text(value: Any, where: str) -> None:
    """A text, of any characters."""
    right = type(value) is str and len(value) <= LONGEST_TEXT
    check_kind(right, value, where, f"a text of at most {LONGEST_TEXT} characters")


def optional(check: Check) -> Check:
    """What passes `check`, or nothing."""

    def check_optional(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return check_optional


def any_of(*kinds: type) -> Check:
    """A value of some simple types; numbers are finite."""
    names = " or ".join(kind.__name__.replace("NoneType", "None") for kind in kinds)

    def check_type(value: Any, where: str) -> None:
        check_kind(type(value) in kinds, value, where, names)
        if type(value) in (int, float):
            check_number(value, where)

    return check_type


def check_entries(values: Any, where: str, *kinds: type) -> None:
    """Raise Fault unless a value is a collection, and not too long."""
    check_kind(
        isinstance(values, kinds), values, where, "a table" if kinds == (dict,) else "a list"
    )
    if len(values) > MOST_ENTRIES:
        raise Fault(f"{where} has {len(values)} entries; {MOST_ENTRIES} are allowed")


def list_of(check: Check) -> Check:
    """A list of values that pass `check`."""

    def check_list(values: Any, where: str) -> None:
        check_entries(values, where, list, tuple)
        for number, value in enumerate(values):
            check(value, f"{where}[{number}]")

    return check_list


def table_of(check: Check, keys: type = str) -> Check:
    """A dictionary of values that pass `check`."""

    def check_table(values: Any, where: str) -> None:
        check_entries(values, where, dict)
        for key, value in values.items():
            check_kind(type(key) is keys, key, f"a key of {where}", f"of type {keys.__name__}")
            check(value, f"{where}.{str(key)[:60]}")

    return check_table


def fields(required: dict[str, Check], others: dict[str, Check] | None = None) -> Check:
    """A dictionary with these fields, and perhaps with `others`."""
    known = required | (others or {})

    def check_fields(values: Any, where: str) -> None:
        prefix = f"{where}." if where else ""
        check_entries(values, where or "the content", dict)
        if missing := sorted(required.keys() - values.keys()):
            raise Fault(f"{prefix}{missing[0]} is missing")
        if unknown := sorted(str(key)[:60] for key in values.keys() - known.keys()):
            raise Fault(f"{prefix}{unknown[0]} is unknown to this version")
        for name, value in values.items():
            known[name](value, f"{prefix}{name}")

    return check_fields


def check_tensor(value: Any, where: str) -> None:
    """A plain tensor that has all its elements: it claims no more than is in memory."""
    right = isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter)
    right = right and value.layout == torch.strided and value.device.type == "cpu"
    right = right and not (value.is_quantized or value.is_complex())
    check_kind(right, value, where, "a plain tensor")
    claimed, there = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if claimed > there:
        raise Fault(f"{where} claims {claimed} bytes, of which the file has {there}")


def check_weights(values: Any, where: str) -> None:
    """Tensors by name, of finite numbers."""
    table_of(check_tensor)(values, where)
    for name, value in values.items():
        if value.is_floating_point() and not value.isfinite().all():
            reason = "holds values that are infinite or no numbers: the run had diverged"
            raise Fault(f"{name[:200]} {reason}")


def check_random_state(value: Any, where: str) -> None:
    """What torch.set_rng_state takes."""
    check_tensor(value, where)
    own = torch.get_rng_state()
    right = (value.dtype, value.shape) == (own.dtype, own.shape)
    check_kind(right, value, where, f"a state of torch's generator, of {len(own)} bytes")


def check_settings(values: Any, where: str) -> None:
    """Settings by name, those that are taken checked as if they had been typed."""
    table_of(lambda value, where: None)(values, where)
    try:
        settings_brought(values)
    except argparse.ArgumentTypeError as error:
        raise Fault(f"{where}.{error}") from None


def check_nested(value: Any, where: str, depth: int = 6) -> None:
    """Numbers, texts and tensors in lists and tables: what an optimizer or a scheduler tells."""
    if isinstance(value, (dict, list, tuple)):
        check_kind(depth > 0, value, where, "nested so deeply")
        check_entries(value, where, dict, list, tuple)
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            check_kind(type(key) in (int, str), key, f"a key of {where}", "a number or a text")
            check_nested(each, f"{where}.{str(key)[:60]}", depth - 1)
    elif isinstance(value, torch.Tensor):
        check_tensor(value, where)
    else:
        any_of(bool, int, float, str, type(None))(value, where)


def check_row(row: Any, where: str) -> None:
    """The figures of an epoch; of layer groups a table of their own."""
    check_entries(row, where, dict)
    if missing := [name for name in ("epoch", "val_top1", "gradient_norms") if name not in row]:
        raise Fault(f"{where}.{missing[0]} is missing")
    check_count(row["epoch"], f"{where}.epoch")
    optional(check_number)(row["val_top1"], f"{where}.val_top1")
    table_of(check_number)(row["gradient_norms"], f"{where}.gradient_norms")
    others = {name: value for name, value in row.items() if name != "gradient_norms"}
    table_of(any_of(int, float, str, bool, type(None)))(others, where)


def check_best(pair: Any, where: str) -> None:
    """An accuracy, and the epoch that had it."""
    list_of(check_number)(pair, where)
    check_kind(len(pair) == 2, pair, where, "an accuracy and an epoch")
    check_kind(0 <= pair[0] <= 100, pair[0], f"{where}[0]", "from 0 to 100")
    check_count(pair[1], f"{where}[1]")


def check_group(group: Any, where: str) -> None:
    """How an optimizer treats some weights, and the numbers of these."""
    table_of(check_nested)(group, where)
    list_of(check_count)(group.get("params"), f"{where}.params")


PROGRESS = {
    **dict.fromkeys("step epoch batches images top1 top5 epoch_batches".split(), check_count),
    "loss_sum": check_number,
    "lr": check_number,
    "best": list_of(check_best),
    "history": list_of(check_row),
    "bad_images": list_of(check_text),
}
PART = fields(
    {"buffers": check_weights, "average": check_weights, "random_state": check_random_state}
)
STATE = fields(
    {
        "format": check_text,
        "model": check_weights,
        "average": optional(check_weights),
        "optimizer": fields(
            {
                "state": table_of(table_of(check_nested), keys=int),
                "param_groups": list_of(check_group),
            }
        ),
        "scheduler": optional(table_of(check_nested)),
        "flow": optional(
            fields({"sums": table_of(check_number), "measured": check_count, "steps": check_count})
        ),
        "ahead": optional(check_weights),
        "random_state": check_random_state,
        "progress": fields(PROGRESS),
        "settings": check_settings,
        "versions": table_of(check_text),
    },
    {
        "data": optional(
            fields(
                {"classes": list_of(check_text), "images": check_count, "fingerprint": check_text},
                {"confused": list_of(check_text)},
            )
        ),
        "asked": optional(check_settings),
        "ranks": optional(list_of(PART)),
    },
)


def fault_of_content(state: dict[str, Any]) -> str:
    """What is wrong with the content of a checkpoint by itself, if anything."""
    try:
        STATE(state, "")
        check_progress(state["progress"], settings_brought(state["settings"]))
    except Fault as fault:
        return str(fault)
    return ""


def fault_of_tensors(found: Weights) -> str:
    """What is wrong with weights of another program by themselves, if anything."""
    try:
        check_weights(found, "its content")
    except Fault as fault:
        return str(fault)
    return ""


def check_progress(progress: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise Fault for a run that cannot stand there. Every epoch has as many steps as its batches
    fill.
    """
    step, epoch, batches, of_epoch = (
        progress[name] for name in ("step", "epoch", "batches", "epoch_batches")
    )
    in_step = settings.get("accumulate", 1) * (settings.get("ranks") or 1)
    steps = epoch * (of_epoch // in_step) + batches // in_step
    if of_epoch and (batches > of_epoch or step != steps):
        stands = f"epoch {epoch} and batch {batches} of {of_epoch}"
        raise Fault(f"progress.step is {step}, which is not that of {stands}")
    epochs = [row["epoch"] for row in progress["history"]] + [pair[1] for pair in progress["best"]]
    if max(epochs, default=0) > epoch:
        raise Fault(f"progress.epoch is {epoch}, but there are figures of epoch {max(epochs)}")


def fault_of_weights(state: dict[str, Any]) -> str:
    """Which tensors are not those of the model that a checkpoint names, if any. A model that cannot
    be built here is no fault of the file: whoever builds it will say why.
    """
    own = own_weights(state["settings"], state["model"])
    if own is None:
        return ""
    parts = [("model", state["model"], True), ("average", state["average"], True)]
    parts.append(("ahead", state["ahead"], False))
    for number, part in enumerate(state.get("ranks") or ()):
        names = "buffers", "average"
        parts += [(f"ranks[{number}].{name}", part[name], False) for name in names]
    for where, found, complete in parts:
        if found is None:
            continue
        if missing := own.keys() - found.keys() if complete else ():
            return f"{where}.{min(missing)} is missing"
        for name, value in found.items():
            if name not in own:
                return f"{where}.{name[:60]} is unknown to {state['settings']['model']}"
            if value.shape != own[name].shape:
                shapes = (list(value.shape), list(own[name].shape))
                return "{} has the shape {}, not {}".format(f"{where}.{name}", *shapes)
            if value.dtype != own[name].dtype:
                return f"{where}.{name} is of {value.dtype}, not {own[name].dtype}"
    return ""


def own_weights(settings: dict[str, Any], found: Weights) -> Weights | None:
    """The tensors of the model that settings name, without memory for them; None if it cannot be
    built. It has no more classes than some tensor that was found has rows.
    """
    name, size = settings.get("model"), settings.get("image_size") or 224
    most = max((max(value.shape, default=0) for value in found.values()), default=0)
    count = min(settings.get("num_classes") or most, most + 1)
    try:
        with torch.device("meta"):
            return build_model(name, count, size).state_dict()
    except Exception:  # unknown, not installed, too small an image: libraries raise many kinds
        return None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a checked state."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def fault_of_sizes(state: Any, size_bytes: int) -> str:
    """Why a state claims more memory than its file of that size can fill, if so."""
    claimed = sum(each.numel() * each.element_size() for each in tensors_in(state))
    if claimed > SHARING * size_bytes:
        return f"its tensors claim {claimed} bytes, and it has {size_bytes}"
    return ""


def fault_of_archive(path: Path) -> str:
    """Why an archive would take more memory than its file, if so. torch.save compresses nothing."""
    size_bytes = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return ""  # which torch.load will say in its own words
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size_bytes or any(entry.compress_type for entry in entries):
        return f"its entries claim {claimed} bytes, and it has {size_bytes}"
    return ""


def like(own: Any, saved: Any, where: str) -> Any:
    """A saved state of an object, as far as it is made like the object's `own` of today: what other
    versions of PyTorch had in it besides is left out. Raises Fault for values of other kinds.
    """
    if isinstance(own, dict):
        check_entries(saved, where, dict)
        found = {}
        for key, value in own.items():
            if key not in saved and not isinstance(value, (bool, type(None))):
                raise Fault(f"{where}.{key} is missing")
            found[key] = like(value, saved[key], f"{where}.{key}") if key in saved else value
        return type(own)(found)  # a Counter, too
    if isinstance(own, (list, tuple)):
        check_entries(saved, where, list, tuple)
        check_kind(len(saved) == len(own), saved, where, f"a list of {len(own)} entries")
        pairs = zip(own, saved, strict=True)
        return type(own)(like(*pair, f"{where}[{n}]") for n, pair in enumerate(pairs))
    if isinstance(own, bool) or own is None:
        any_of(bool, type(None))(saved, where)
    elif isinstance(own, (int, float)):
        check_number(saved, where)
        check_kind(abs(saved) <= LARGEST_NUMBER, saved, where, f"at most {LARGEST_NUMBER}")
    else:
        check_kind(type(saved) is type(own) and saved == own, saved, where, described(own))
    return saved


SCHEDULED = ("lr", "momentum", "betas")  # what a course of the learning rate changes


def like_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state of an optimizer, with all that follows from the settings taken from this one.
    Raises Fault for what this one could not go on from.
    """
    groups = optimizer.state_dict()["param_groups"]
    known = like(groups, saved["param_groups"], "optimizer.param_groups")
    for number, (own, theirs) in enumerate(zip(groups, known, strict=True)):
        where = f"optimizer.param_groups[{number}]"
        if theirs["params"] != own["params"]:
            raise Fault(f"{where}.params are not those of this model")
        own |= {name: theirs[name] for name in SCHEDULED if name in own}
        check_kind(own["lr"] >= 0, own["lr"], f"{where}.lr", "0 or more")
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
            check_kind(right, value, f"{where}.{name}", f"a tensor of the shape {list(shape)}")
    return {"state": saved["state"], "param_groups": groups}


def kept_for_weight(optimizer: torch.optim.Optimizer) -> Weights:
    """What an optimizer keeps for a weight of the shape (1,), which it has made a step on: what is
    no count of steps, of shape (), has the weight's shape.
    """
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    known = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    other = type(optimizer)([weight], **options)
    other.step()
    return dict(other.state[weight])
