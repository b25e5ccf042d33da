"""A model as a phase computes with it: forward, loss and backpropagation, scores, a teacher."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from split_affinity.data.samples import Batch
from split_affinity.models.folding import fold
from split_affinity.models.freezing import trainable_weights
from split_affinity.models.fusion import fuse_norms
from split_affinity.models.weights import Weights, with_tensors

# What a forward phase returns: logits (n, classes) in float32 with their graph, the targets of the
# batch, and with a teacher its probabilities (n, classes) without a graph.
Output = tuple[torch.Tensor, ...]


class NonFiniteLoss(Exception):
    """The loss of a micro-batch is infinite or not a number; nothing was updated."""


@dataclass(frozen=True)
class Scores:
    """Mean loss of a batch, its images, and how many were right in top-1 and top-5."""

    loss: float
    images: int
    top1: int
    top5: int

    def figures(self) -> dict[str, float]:
        """The mean loss, and both accuracies in percent."""
        top1, top5 = (100 * count / self.images for count in (self.top1, self.top5))
        return {"loss": self.loss, "top1": top1, "top5": top5}


def score_batch(loss: float, logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Count right answers; for mixed images (targets (n, classes)) the larger share is right."""
    labels = targets.argmax(1) if targets.ndim == 2 else targets
    best = logits.detach().topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
    return Scores(loss, len(labels), int(best[:, 0].sum()), int(best.sum()))


LIKENESS = "msp"  # the maximum softmax probability, in files


def likeness(logits: torch.Tensor) -> torch.Tensor:
    """How much images, by their logits (n, classes), are like those that a model learnt, (n,).

    It is the probability of the likeliest class (Hendrycks and Gimpel 2017, arXiv 1610.02136).
    docs/trained-weights.md compares it with others.
    """
    return logits.softmax(1).amax(1)


def combine_scores(scores: Sequence[Scores]) -> Scores:
    """The scores of some batches together."""
    images = sum(each.images for each in scores)
    loss = sum(each.loss * each.images for each in scores) / images
    return Scores(
        loss, images, sum(each.top1 for each in scores), sum(each.top5 for each in scores)
    )


def build_loss(
    label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None
) -> nn.CrossEntropyLoss:
    """The loss of a batch, its mean; with weights that of each image (n,), for `weighted_mean`."""
    reduction = "mean" if class_weights is None else "none"
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing, reduction=reduction)


def weighted_mean(
    losses: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor
) -> torch.Tensor:
    """The mean of losses (n,), each times the weight of its image: that of the image's class, or of
    mixed images the mean by their shares (targets (n, classes)).

    So an image of weight 2 counts as two images would. PyTorch's own `weight` differs: it divides
    by the sum of a batch's weights, so that the parts of a step would not add up to it. Of mixed,
    smoothed or a teacher's targets it weighs each class's term, which changes what is learnt of an
    image: of half cat and half dog, with the weights 1 and 3, it would make a quarter and three.
    """
    weights = targets @ class_weights if targets.ndim == 2 else class_weights[targets]
    return (weights * losses).mean()


def interleave(dealt: Iterable[Sequence[Any]]) -> list[Any]:
    """What was dealt out to ranks one by one, in its former order."""
    nothing = object()
    rounds = itertools.zip_longest(*dealt, fillvalue=nothing)
    return [each for one in rounds for each in one if each is not nothing]


@dataclass(frozen=True)
class StepEnd:
    """What the next step changes before its update, as it was at the end of a step.

    `buffers` are BatchNorm's running statistics and the like. `weights` are those of the next step
    if `delayed` has begun it: one update old.
    """

    buffers: Weights
    random_state: torch.Tensor
    weights: Weights | None = None


@dataclass(frozen=True)
class Teacher:
    """A trained model in evaluation mode; its probabilities are `share` of the target.

    It sees the very images that the student sees, cropped and mixed alike (Beyer et al. 2022, arXiv
    2106.05237), but normalised anew by `scale` and `shift` (3, 1, 1) if it was trained so.
    """

    model: nn.Module
    share: float
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (n, classes) for images."""
        with torch.no_grad():
            if self.scale is not None:
                images = images * self.scale + self.shift
            return self.model(images).float().softmax(1)

    def loss(
        self, of_labels: torch.Tensor, logits: torch.Tensor, probabilities: torch.Tensor
    ) -> torch.Tensor:
        """The loss with a teacher; it is linear in the target, so each part counts by its share.

        Of a batch, or of each image (n,), as is the loss `of_labels`.
        """
        reduction = "none" if of_labels.ndim else "mean"
        taught = nn.functional.cross_entropy(logits, probabilities, reduction=reduction)
        return (1 - self.share) * of_labels + self.share * taught


@dataclass
class Network:
    """A model and how it computes: everything but the update of its weights.

    A step has `accumulate` micro-batches on each of `ranks`. With `class_weights` (classes,) the
    `loss` is that of each image (see `build_loss`). `note` describes the trained weights that the
    model starts from; `frozen` names the weights that `--freeze` keeps as they are.
    `view` is what the forward phase calls in place of the model, whose tensors it shares: `fused`
    says whether its norms are fused with what follows them, `fusing` why.
    """

    model: nn.Module
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    accumulate: int = 1
    bf16: bool = False
    channels_last: bool = False
    ranks: int = 1
    class_weights: torch.Tensor | None = None
    note: str = ""
    teacher: Teacher | None = None
    frozen: Collection[str] = ()
    fold_norm: bool = False
    view: nn.Module | None = None
    fused: bool = False
    fusing: str = ""

    def folded(self, model: nn.Module, frozen_alone: bool = False) -> nn.Module:
        """A copy of a model as it is now, with `--fold-norm` without batch norms (see `fold`)."""
        return fold(model, self.bf16, frozen_alone) if self.fold_norm else model

    def build_view(self) -> int:
        """Decide how the steps that follow compute the model; returns how many norms are fused.

        The front part that is frozen now has its norms folded: it must have its weights. No lane
        may compute meanwhile. Raises CannotTrace, with `fused` alone.
        """
        fused, self.view = 0, None
        if self.frozen:
            self.view = self.folded(self.model, frozen_alone=True)
        if self.fused:
            self.view, fused = fuse_norms(self.view or self.model)
        return fused

    def compute(self, model: Callable[..., torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """Run the model or the teacher on images (n, 3, size, size): (n, classes) in float32."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            computed = model(images)
        return computed.float()

    def forward(self, batch: Batch, model: nn.Module | None = None) -> Output:
        """The forward phase; the teacher is first, while the model has no activations yet."""
        images, targets = batch
        taught = (self.compute(self.teacher, images),) if self.teacher else ()
        return self.compute(model or self.view or self.model, images), targets, *taught

    def backward(self, output: Output) -> Scores:
        """Loss and backpropagation; adds to the gradients."""
        logits, targets, *taught = output
        loss = self.loss(logits, targets)
        if taught:
            loss = self.teacher.loss(loss, logits, *taught)
        if self.class_weights is not None:
            loss = weighted_mean(loss, targets, self.class_weights)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLoss(str(value))
        # For CPU tensors this runs in the calling thread.
        (loss / (self.accumulate * self.ranks)).backward()
        return score_batch(value, logits, targets)

    def copy(self, begun: Weights | None = None) -> nn.Module:
        """A copy with trained weights of its own: the model's, or those of a step already begun."""
        model = self.view or self.model
        names = trainable_weights(model)
        now = names | (begun or {})
        own = {name: nn.Parameter(now[name].detach().clone()) for name in names}
        return with_tensors(model, own)

    def refresh(self, copied: nn.Module) -> StepEnd:
        """Copy the model's weights into a copy; the next step begins with it."""
        weights = trainable_weights(self.model)
        with torch.no_grad():
            for name, weight in trainable_weights(copied).items():
                weight.copy_(weights[name])
        return self.step_end(trainable_weights(copied))

    def step_end(self, begun: Weights | None = None) -> StepEnd:
        """The end of a step, which is now; `begun` are the weights of the next one."""
        weights = dict(self.model.named_parameters())
        state = self.model.state_dict()
        buffers = {name: state[name].clone() for name in state if name not in weights}
        return StepEnd(buffers, torch.get_rng_state(), begun)


# Images by (true class, predicted class), of the pairs that occur: with the 21,841 classes of
# ImageNet-21k a matrix would take 3.6 GiB.
Confusion = Counter[tuple[int, int]]
