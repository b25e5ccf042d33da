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
    """Gradients that travel together in a flat tensor; `parts` are views shaped as the weights."""

    flat: torch.Tensor
    parts: Weights
    missing: set[str] = field(default_factory=set)  # gradients still to come in this step
    transfer: distributed.Work | None = None


def make_buckets(weights: Weights) -> list[Bucket]:
    """Buckets for the gradients of some weights, the last ones first, as backpropagation goes."""
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
    """Adds up the gradients of all ranks (Li et al. 2020, arXiv 2006.15704).

    A bucket is sent as soon as the last micro-batch of a step has filled it, in the same order on
    all ranks. `models` have the same weights, and one at a time goes back; `batches` says how many
    micro-batches a step has on each rank.
    """

    def __init__(
        self, ranks: SeveralRanks, models: Sequence[nn.Module], batches: Callable[[], int]
    ):
        self._ranks, self._batches = ranks, batches
        self._buckets = make_buckets(trainable_weights(models[0]))
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.parts}
        self._hooks = [
            weight.register_post_accumulate_grad_hook(partial(self._count_gradient, name))
            for model in models
            for name, weight in trainable_weights(model).items()
        ]
        self.size_bytes = sum(bucket.flat.nbytes for bucket in self._buckets)
        self._begin_step()

    def close(self) -> None:
        """Remove the hooks from the models."""
        for hook in self._hooks:
            hook.remove()

    def finish(self, model: nn.Module) -> None:
        """The reduce phase: wait for the sums, then make them the model's gradients (no copy).

        If a rank could not take part, its error is raised on all.
        """
        if self._send_and_wait(failed=False):
            self._ranks.raise_on_all()
        for name, weight in trainable_weights(model).items():
            if weight.grad is not None:
                weight.grad = self._bucket_of[name].parts[name]
        self._begin_step()

    def give_up(self, error: Exception) -> None:
        """Take part in a step that this rank cannot finish, so that no rank makes it.

        Raises the error, or that of the first rank that has one.
        """
        self._send_and_wait(failed=True)
        self._ranks.raise_on_all(error)

    def _begin_step(self) -> None:
        self._added: Counter[str] = Counter()  # micro-batches, by weight
        self._sent = 0  # buckets
        for bucket in self._buckets:
            bucket.missing = set(bucket.parts)

    def _count_gradient(self, name: str, weight: torch.Tensor) -> None:
        """A micro-batch has added to the gradient of a weight, on the backward lane."""
        self._added[name] += 1
        if self._added[name] < self._batches():
            return
        bucket = self._bucket_of[name]
        if weight.grad.data_ptr() != bucket.parts[name].data_ptr():  # not there already
            bucket.parts[name].copy_(weight.grad)
        bucket.missing.discard(name)
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._send_bucket()

    def _send_bucket(self) -> None:
        bucket = self._buckets[self._sent]
        for name in bucket.missing:  # no image needed the weight
            bucket.parts[name].zero_()
        with self._ranks.answered():
            bucket.transfer = distributed.all_reduce(bucket.flat, async_op=True)
        self._sent += 1

    def _send_and_wait(self, failed: bool) -> bool:
        """Send the remaining buckets and wait for all; returns whether any rank has failed."""
        while self._sent < len(self._buckets):
            self._send_bucket()
        failures = torch.tensor([int(failed)])
        with self._ranks.answered():
            last = distributed.all_reduce(failures, async_op=True)
            for bucket in self._buckets:
                bucket.transfer.wait()
            last.wait()
        return bool(failures.item())
