"""The update of the weights, and what belongs to it: moving average, gradient norms, thaw."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from split_affinity.data.samples import Batch
from split_affinity.models.freezing import begin_training, layer_groups, trainable_weights
from split_affinity.models.weights import Weights, with_tensors
from split_affinity.options.settings import TrainingSettings
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks
from split_affinity.ranks.reducer import Reducer
from split_affinity.training.network import Network, Scores, StepEnd, likeness, score_batch
from split_affinity.training.optimizer import begin_momentum

VANISHING_NORM, EXPLODING_NORM = 1e-7, 1e3
STEPS_BETWEEN_NORMS = 10


class MovingAverage:
    """An exponential moving average of weights and buffers, updated after each optimizer step.

    `model` computes with it. The decay begins at 0.1 and rises to `decay` with the number of
    `updates`, as in TensorFlow's ExponentialMovingAverage (and, on another curve, in timm's
    ModelEmaV3). So about the last ninth of the steps counts, and a short run does not keep its
    initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.model = with_tensors(model, self.values).eval()
        self.updates = 0
        self._decay = decay

    def update(self, values: Weights) -> None:
        """Average with the model's values of today, by the names of its state_dict."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        with torch.no_grad():
            floats = [name for name, value in self.values.items() if value.is_floating_point()]
            ours, theirs = ([each[name] for name in floats] for each in (self.values, values))
            torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(ours, theirs, 0)
            for name in self.values.keys() - set(floats):  # counts are copied
                self.values[name].copy_(values[name])


def build_average(model: nn.Module, settings: TrainingSettings) -> MovingAverage | None:
    """The moving average of the weights, with `--model-ema`."""
    return MovingAverage(model, settings.model_ema_decay) if settings.model_ema else None


class GradientNorms:
    """Norms of the gradients by layer group, every tenth optimizer step."""

    def __init__(self, model: nn.Module):
        self.watch(model)
        self._sums: Counter[str] = Counter()
        self._measured = self._steps = 0

    def watch(self, model: nn.Module) -> None:
        """From here on, measure those weights that are trained now."""
        trained = trainable_weights(model)
        self._groups = {}
        for group, names in layer_groups(name for name, _ in model.named_parameters()).items():
            if present := [name for name in names if name in trained]:
                self._groups[group] = present

    def measure(self, weights: Weights) -> dict[str, float]:
        """The norms before an update; empty if this step is not measured."""
        if self._steps % STEPS_BETWEEN_NORMS:
            return {}
        norms = {}
        for group, names in self._groups.items():
            present = [weights[name].grad for name in names if weights[name].grad is not None]
            norms[group] = nn.utils.get_total_norm(present).item()
        return norms

    def add(self, norms: dict[str, float]) -> None:
        """Add the norms of a step, once its update is made."""
        self._steps += 1
        self._measured += bool(norms)
        self._sums.update(norms)  # a Counter adds

    def pop_means(self) -> dict[str, float]:
        """The mean norm of each layer group since the last call; empty if none was measured."""
        largest = 1e200  # in place of inf and NaN: JSON can hold it and a picture can show it
        means = {
            group: total / self._measured if total <= largest else largest
            for group, total in self._sums.items()
        }
        self._sums, self._measured, self._steps = Counter(), 0, 0
        return means

    def state(self) -> dict[str, Any]:
        """What has been measured since the last `pop_means`, in plain types."""
        return {"sums": dict(self._sums), "measured": self._measured, "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._sums = Counter(state["sums"])
        self._measured, self._steps = state["measured"], state["steps"]


def gradient_warnings(norms: dict[str, float]) -> Iterator[str]:
    """Warnings about the gradient norms of an epoch."""
    for group, norm in norms.items():
        if norm < VANISHING_NORM:
            yield f"gradients vanish in {group}: norm {norm:.1e}, below {VANISHING_NORM:g}"
        elif not norm <= EXPLODING_NORM:
            yield f"gradients explode in {group}: norm {norm:.1e}, above {EXPLODING_NORM:g}"


# What each rank has for itself between two steps: the model's "buffers", such as BatchNorm's
# statistics, those of its moving "average", and the "random_state".
RankState = dict[str, Any]


def mean_rank_state(rank_states: Sequence[RankState]) -> RankState:
    """The mean buffers of all ranks; a count is that of rank 0."""
    means: RankState = {"buffers": {}, "average": {}}
    for kind, tensors in means.items():
        for name, value in rank_states[0][kind].items():
            if value.is_floating_point():
                of_ranks = [rank_state[kind][name].double() for rank_state in rank_states]
                value = torch.stack(of_ranks).mean(0).to(value.dtype)
            tensors[name] = value
    return means


@dataclass
class TrainState:
    """A network, its optimizer, and whatever else changes from step to step.

    `end` is a copy, made after the latest step, of what the next step changes before its update. So
    a checkpoint can be saved at any time but during an update: `updating` is set then. `reduced` is
    set while the gradients are the sum of all ranks'. `folded` are the models that are evaluated,
    while they have copies for that.
    """

    network: Network
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    average: MovingAverage | None = None
    gradient_norms: GradientNorms | None = None
    clip_grad_norm: float = 0.0
    grads_to_none: bool = True
    ranks: Ranks = ONE_PROCESS
    reducer: Reducer | None = None
    end: StepEnd | None = None
    updating: bool = False
    reduced: bool = False
    folded: Sequence[nn.Module] = ()

    # A step: `attach_reducer` comes before an epoch's first one, the others after backward.

    def attach_reducer(self, *models: nn.Module) -> None:
        """With several ranks, add up the gradients of these models from here on."""
        if self.reducer:
            self.reducer.close()
        if self.ranks.size > 1:
            self.reducer = Reducer(self.ranks, models, lambda: self.network.accumulate)

    def reduce(self, copied: nn.Module | None = None, after: Future | None = None) -> None:
        """Replace the gradients, of the model or a copy, by the sum over all ranks.

        Raises the error of the phase `after` which it was queued.
        """
        if after:
            after.result()
        self.reducer.finish(copied or self.network.model)
        self.reduced = True

    def update(
        self,
        copied: nn.Module | None = None,
        begun: StepEnd | None = None,
        after: Future | None = None,
    ) -> None:
        """Make the optimizer step, with the gradients of the model or a copy; clears these.

        `begun` is the end of this step if `delayed` has begun the next one already. Raises the
        error of the phase `after` which it was queued.
        """
        if after:
            after.result()
        weights = trainable_weights(self.network.model)
        for name, weight in trainable_weights(copied).items() if copied else ():
            weights[name].grad = weight.grad
        norms = self.gradient_norms.measure(weights) if self.gradient_norms else {}
        if self.clip_grad_norm:
            nn.utils.clip_grad_norm_(weights.values(), self.clip_grad_norm)
        end = begun or self.network.step_end()  # needs memory: it comes first, since it may fail
        self.updating = True
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        if self.gradient_norms:
            self.gradient_norms.add(norms)
        self.end = end
        if self.average:
            self.average.update(self.model_state())
        self.updating = self.reduced = False
        self.optimizer.zero_grad(set_to_none=self.grads_to_none)
        if copied and self.grads_to_none:
            copied.zero_grad()

    # Between two steps: saving, with several ranks each its own part.

    def model_state(self) -> Weights:
        """The model's state_dict after the latest step, without changes by a step already begun."""
        return self.network.model.state_dict() | (self.end.buffers if self.end else {})

    def rank_state(self) -> RankState:
        """What belongs to this rank alone, after the latest step."""
        end = self.end or self.network.step_end()
        values = self.average.values if self.average else {}
        average = {name: values[name].clone() for name in end.buffers if values}
        return {"buffers": end.buffers, "average": average, "random_state": end.random_state}

    def load_buffers(self, rank_state: RankState) -> None:
        """Copy buffers into the model and its moving average."""
        into = {"buffers": self.network.model.state_dict()}
        into["average"] = self.average.values if self.average else {}
        for kind, tensors in into.items():
            for name, value in rank_state[kind].items():
                tensors[name].copy_(value)

    # Between two epochs.

    @contextlib.contextmanager
    def with_mean_buffers(self) -> Iterator[None]:
        """Compute with the mean of all ranks' buffers for a while: the same on every rank."""
        if self.ranks.size == 1:
            yield
            return
        own = self.rank_state()
        self.load_buffers(mean_rank_state(self.ranks.gather_objects(own)))
        try:
            yield
        finally:
            self.load_buffers(own)

    @contextlib.contextmanager
    def folded_norms(self) -> Iterator[None]:
        """Evaluate with copies without batch norms for a while, of the weights as they are now."""
        self.folded = [self.network.folded(model) for model in self.evaluated()]
        try:
            yield
        finally:
            self.folded = ()

    def evaluated(self) -> Sequence[nn.Module]:
        """The models that are evaluated: the moving average, if there is one, and the model."""
        return self.folded or [*([self.average.model] if self.average else []), self.network.model]

    def evaluate(self, batch: Batch) -> tuple[list[Scores], torch.Tensor, torch.Tensor]:
        """The scores of a batch, the predicted classes (n,) and the `likeness` of its images (n,).

        In evaluation mode. With a moving average, its scores come first, and it predicts; the
        model's own scores follow.
        """
        images, targets = batch
        with torch.inference_mode():
            logits = [self.network.compute(model, images) for model in self.evaluated()]
            losses = [nn.functional.cross_entropy(each, targets).item() for each in logits]
            pairs = zip(losses, logits, strict=True)
            scores = [score_batch(*pair, targets) for pair in pairs]
            return scores, logits[0].argmax(1), likeness(logits[0])

    def thaw(self) -> None:
        """Train all weights from here on; not within an epoch, where `delayed` has copies."""
        model = self.network.model
        for name in self.network.frozen:
            model.get_parameter(name).requires_grad_(True)
        self.network.frozen = ()
        begin_training(model)
        begin_momentum(self.optimizer)
        if self.gradient_norms:
            self.gradient_norms.watch(model)
