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
from split_affinity.options.settings import Settings
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks
from split_affinity.ranks.reducer import Reducer
from split_affinity.training.network import Network, Scores, StepEnd, score
from split_affinity.training.optimizer import begin_momentum

VANISHING_NORM, EXPLODING_NORM = 1e-7, 1e3
STEPS_BETWEEN_NORMS = 10


class MovingAverage:
    """An exponential moving average of weights and buffers, one step after each optimizer step;
    `model` computes with them.

    Averages with torch's own function; what is no floating-point number (a count) is copied. The
    decay begins with 0.1 and rises to `decay` with the number of `updates` made, as that of
    TensorFlow's ExponentialMovingAverage (and, on a curve of its own, timm's ModelEmaV3): about the
    last ninth of the steps counts, and a short run does not keep the weights that it began with.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.model = with_tensors(model, self.values).eval()
        self.updates = 0
        self._decay = decay

    def update(self, values: Weights) -> None:
        """Take in the model's values of today, by the names of its state_dict."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        with torch.no_grad():
            floats = [name for name, value in self.values.items() if value.is_floating_point()]
            ours, theirs = ([each[name] for name in floats] for each in (self.values, values))
            torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(ours, theirs, 0)
            for name in self.values.keys() - set(floats):
                self.values[name].copy_(values[name])


class GradientNorms:
    """Norms of the gradients by layer group, every tenth optimizer step.

    `pop_means` gives the means since the last call.
    """

    def __init__(self, model: nn.Module):
        self.watch(model)
        self._sums: Counter[str] = Counter()
        self._measured = self._steps = 0

    def watch(self, model: nn.Module) -> None:
        """Look at what is trained from here on."""
        watched = trainable_weights(model)
        groups = layer_groups(name for name, _ in model.named_parameters())
        watched_by_group = {
            group: [name for name in groups[group] if name in watched] for group in groups
        }
        self._groups = {group: names for group, names in watched_by_group.items() if names}

    def measure(self, weights: Weights) -> dict[str, float]:
        """The norms of a step that is about to be made, if it is one to look at."""
        if self._steps % STEPS_BETWEEN_NORMS:
            return {}
        norms = {}
        for group, names in self._groups.items():
            present = [weights[name].grad for name in names if weights[name].grad is not None]
            norms[group] = nn.utils.get_total_norm(present).item()
        return norms

    def add(self, norms: dict[str, float]) -> None:
        """Take in the norms of a step that has been made."""
        self._steps += 1
        self._measured += bool(norms)
        self._sums.update(norms)  # which adds, in a Counter

    def pop_means(self) -> dict[str, float]:
        """The mean norm of each layer group since the last call; empty if none was measured. What
        is not finite counts as 1e200, which JSON can hold and a picture can show.
        """
        largest = 1e200
        norms = {
            group: total / self._measured if total <= largest else largest
            for group, total in self._sums.items()
        }
        self._sums, self._measured, self._steps = Counter(), 0, 0
        return norms

    def state(self) -> dict[str, Any]:
        """What has been measured since the last `pop_means`, in plain types."""
        return {"sums": dict(self._sums), "measured": self._measured, "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._sums = Counter(state["sums"])
        self._measured, self._steps = state["measured"], state["steps"]


def gradient_warnings(norms: dict[str, float]) -> Iterator[str]:
    """What the gradient norms of an epoch show to be wrong."""
    for group, norm in norms.items():
        if norm < VANISHING_NORM:
            yield f"gradients vanish in {group}: norm {norm:.1e}, below {VANISHING_NORM:g}"
        elif not norm <= EXPLODING_NORM:
            yield f"gradients explode in {group}: norm {norm:.1e}, above {EXPLODING_NORM:g}"


# What each rank has for itself between two steps: "buffers", such as BatchNorm's statistics, those
# of the moving "average", and the "random_state".
RankState = dict[str, Any]


def mean_rank_state(rank_states: Sequence[RankState]) -> RankState:
    """The means of the ranks' buffers; what is no floating-point number (a count) is rank 0's."""
    means = {}
    for kind in ("buffers", "average"):
        means[kind] = {
            name: torch.stack([rank_state[kind][name].double() for rank_state in rank_states])
            .mean(0)
            .to(value.dtype)
            if value.is_floating_point()
            else value
            for name, value in rank_states[0][kind].items()
        }
    return means


@dataclass
class TrainState:
    """The update of a network's weights, and what a run needs to go on between two steps.

    Together with `end`, that of the latest step, the weights and all that an update changes are the
    state between two steps, at any moment but within an update: then `updating` is set. `reduced`
    is, once all ranks have their gradients together, until the update is made.
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

    def watch(self, *models: nn.Module) -> None:
        """Have the gradients of these models, which an epoch's steps go back on, be added up over
        the ranks, if there are several.
        """
        if self.reducer:
            self.reducer.close()
        if self.ranks.size > 1:
            self.reducer = Reducer(self.ranks, models, lambda: self.network.accumulate)

    def reduce(self, copied: nn.Module | None = None, after: Future | None = None) -> None:
        """The gradients of the model or of a copy become those of all ranks, added up. Raises what
        the phase `after` which it was queued has raised.
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
        """The optimizer step, with the gradients of the model or of a copy, and what belongs to it:
        norms, clipping, learning rate of the next step, moving average; clears the gradients.
        `begun` is the end of this step if `delayed` has begun the next one. Raises what the phase
        `after` which it was queued has raised.
        """
        if after:
            after.result()
        weights = trainable_weights(self.network.model)
        for name, weight in trainable_weights(copied).items() if copied else ():
            weights[name].grad = weight.grad
        norms = self.gradient_norms.measure(weights) if self.gradient_norms else {}
        if self.clip_grad_norm:
            nn.utils.clip_grad_norm_(weights.values(), self.clip_grad_norm)
        end = begun or self.network.step_end()  # what needs memory comes first: it may fail
        self.updating = True
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        if self.gradient_norms:
            self.gradient_norms.add(norms)
        self.end = end
        if self.average:
            self.average.update(self.values())
        self.updating = self.reduced = False
        self.optimizer.zero_grad(set_to_none=self.grads_to_none)
        if copied and self.grads_to_none:
            copied.zero_grad()

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

    def evaluate(self, batch: Batch) -> tuple[list[Scores], torch.Tensor]:
        """The scores of a batch, first of the moving average if there is one, last of the model's
        own weights, and the classes (n,) that the first predicts; the model has to be in evaluation
        mode.
        """
        network, (images, targets) = self.network, batch
        models = [*([self.average.model] if self.average else []), network.model]
        with torch.inference_mode():
            logits = [network.compute(model, images) for model in models]
            losses = [nn.functional.cross_entropy(each, targets).item() for each in logits]
            pairs = zip(losses, logits, strict=True)
            return [score(*pair, targets) for pair in pairs], logits[0].argmax(1)

    def rank_state(self) -> RankState:
        """What belongs to this rank alone, as of the last step."""
        end = self.end or self.network.step_end()
        values = self.average.values if self.average else {}
        average = {name: values[name].clone() for name in end.buffers if values}
        return {"buffers": end.buffers, "average": average, "random_state": end.random_state}

    def load_buffers(self, rank_state: RankState) -> None:
        """Give the model, and its moving average, other buffers."""
        into = {"buffers": self.network.model.state_dict()}
        into["average"] = self.average.values if self.average else {}
        for kind, tensors in into.items():
            for name, value in rank_state[kind].items():
                tensors[name].copy_(value)

    @contextlib.contextmanager
    def with_mean_buffers(self) -> Iterator[None]:
        """Have the model, and its moving average, compute with the mean of all ranks' buffers for a
        while, so that they are the same on all of them.
        """
        own, alone = self.rank_state(), self.ranks.size == 1
        if not alone:
            self.load_buffers(mean_rank_state(self.ranks.exchange(own)))
        try:
            yield
        finally:
            if not alone:
                self.load_buffers(own)

    def values(self) -> Weights:
        """The model's state as of the last step: what a step already begun has changed left out."""
        return self.network.model.state_dict() | (self.end.buffers if self.end else {})


def build_average(model: nn.Module, settings: Settings) -> MovingAverage | None:
    """The moving average of the weights, if it is asked for."""
    return MovingAverage(model, settings.model_ema_decay) if settings.model_ema else None
