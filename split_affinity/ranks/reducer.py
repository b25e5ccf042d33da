"""The sum of all ranks' gradients, in buckets that travel while backpropagation goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import distributed, nn

from split_affinity.models.freezing import trainable_weights
from split_affinity.models.weights import Weights
from split_affinity.ranks.ranks import SeveralRanks

BUCKET_BYTES = 25 * 2**20  # of gradients that travel together, as in DistributedDataParallel


@dataclass
class Bucket:
    """Gradients that travel together: a flat tensor, and the part of it, shaped and laid out as
    the weight is, for each by its name; those that are not there yet in this step, and what is to
    be waited for once the bucket has set out.
    """

    flat: torch.Tensor
    parts: Weights
    missing: set[str] = field(default_factory=set)
    journey: distributed.TrainState | None = None


def make_buckets(weights: Weights) -> list[Bucket]:
    """Buckets for the gradients of some weights, the last ones first: backpropagation has them
    first.
    """
    groups: list[list[str]] = []
    filled_bytes = BUCKET_BYTES
    for name, weight in reversed(weights.items()):
        if filled_bytes + weight.nbytes > BUCKET_BYTES:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(name)
        filled_bytes += weight.nbytes
    buckets = []
    for names in groups:
        sizes = [weights[name].numel() for name in names]
        flat = torch.zeros(sum(sizes), dtype=weights[names[0]].dtype)
        parts = (
            part.as_strided(weights[name].size(), weights[name].stride())
            for name, part in zip(names, flat.split(sizes), strict=True)
        )
        buckets.append(Bucket(flat, dict(zip(names, parts, strict=True))))
    return buckets


class Reducer:
    """Adds the gradients of all ranks up, in buckets (Li et al. 2020, arXiv 2006.15704): each sets
    out as soon as backpropagation of the last of a step's micro-batches has filled it, in the same
    order on all ranks, while that goes on.

    It belongs to some models with the same weights, of which one at a time goes back; `batches`
    says how many micro-batches a step has on each rank.
    """

    def __init__(
        self, ranks: SeveralRanks, models: Sequence[nn.Module], batches: Callable[[], int]
    ):
        self._ranks, self._batches = ranks, batches
        weights = trainable_weights(models[0])
        self._buckets = make_buckets(weights)
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.parts}
        self._hooks = [
            weight.register_post_accumulate_grad_hook(partial(self._added, name))
            for model in models
            for name, weight in trainable_weights(model).items()
        ]
        self.size_bytes = sum(bucket.flat.nbytes for bucket in self._buckets)
        self._begin()

    def close(self) -> None:
        """Look at the models no more."""
        for hook in self._hooks:
            hook.remove()

    def finish(self, model: nn.Module) -> None:
        """The reduce phase: wait for the sums, which are then the gradients of the model, without
        a copy. Raises, with all other ranks, the error of one that could not take part.
        """
        if self._arrive(failed=False):
            self._ranks.settle()
        for name, weight in trainable_weights(model).items():
            if weight.grad is not None:
                weight.grad = self._bucket_of[name].parts[name]
        self._begin()

    def give_up(self, error: Exception) -> None:
        """Take part in a step that this rank cannot finish, so that no rank makes it; raises the
        error, or that of the first rank that has one.
        """
        self._arrive(failed=True)
        self._ranks.settle(error)

    def _begin(self) -> None:
        self._added_up: Counter[str] = Counter()
        self._underway = 0  # so many buckets have set out
        for bucket in self._buckets:
            bucket.missing = set(bucket.parts)

    def _added(self, name: str, weight: torch.Tensor) -> None:
        """A micro-batch has added to the gradient of a weight, on the backward lane."""
        self._added_up[name] += 1
        if self._added_up[name] < self._batches():
            return
        bucket = self._bucket_of[name]
        if weight.grad.data_ptr() != bucket.parts[name].data_ptr():  # not there already
            bucket.parts[name].copy_(weight.grad)
        bucket.missing.discard(name)
        while self._underway < len(self._buckets) and not self._buckets[self._underway].missing:
            self._set_out()

    def _set_out(self) -> None:
        """Send the next bucket on its way; what is missing in it, since no image needed the weight,
        counts as 0.
        """
        bucket = self._buckets[self._underway]
        for name in bucket.missing:
            bucket.parts[name].zero_()
        with self._ranks.answered():
            bucket.journey = distributed.all_reduce(bucket.flat, async_op=True)
        self._underway += 1

    def _arrive(self, failed: bool) -> bool:
        """Send and await all that is left; whether any rank has failed."""
        while self._underway < len(self._buckets):
            self._set_out()
        failures = torch.tensor([int(failed)])
        with self._ranks.answered():
            last = distributed.all_reduce(failures, async_op=True)
            for bucket in self._buckets:
                bucket.journey.wait()
            last.wait()
        return bool(failures.item())
