"""The loops of other trainers, each as its own program has it, on random images from memory.

All have SGD with momentum and a learning rate of 0: nothing can diverge, at the same speed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from other_trainers.pace import Loop
from split_affinity.lanes.lane import tune_allocator
from split_affinity.options.settings import Settings

BATCHES = 8  # that take turns, as in `compare`

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # images (n, 3, size, size), labels (n,)


def random_batches(settings: Settings) -> Batches:
    """Batches from memory, in turn, without an end."""
    size = (settings.batch_size, 3, settings.image_size, settings.image_size)
    labels = partial(torch.randint, settings.num_classes, size[:1])
    yield from itertools.cycle([(torch.randn(size), labels()) for _ in range(BATCHES)])


def torchvision_model(settings: Settings) -> nn.Module:
    """torchvision's model of the given name, to train from scratch."""
    from torchvision.models import get_model

    return get_model(settings.model, num_classes=settings.num_classes)


def timm_loop(settings: Settings, compiled: bool = False, tuned: bool = False) -> Loop:
    """The training loop of timm's train.py."""
    from timm import create_model
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask
    from timm.utils import AverageMeter

    if tuned:
        tune_allocator()
    device, losses, batches = torch.device("cpu"), AverageMeter(), random_batches(settings)
    model = create_model(settings.model, num_classes=settings.num_classes)
    model.to(device=device, memory_format=torch.channels_last)
    criterion = LabelSmoothingCrossEntropy(smoothing=0.1)
    task = ClassificationTask(model, criterion, device=device, verbose=False)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.0, weight_decay=2e-5, momentum=0.9)
    if compiled:
        task.compile(backend="inductor")
    task.get_trainable_module().train()

    def train(steps: int, step_done: Callable[[], None]) -> None:
        for images, labels in itertools.islice(batches, steps):
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = task(images, labels)["loss"]
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(images))
            optimizer.zero_grad()
            step_done()

    return train


def torchvision_loop(settings: Settings) -> Loop:
    """The training loop of torchvision's references/classification, with its defaults."""
    model, batches = torchvision_model(settings), random_batches(settings)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    model.train()

    def train(steps: int, step_done: Callable[[], None]) -> None:
        for images, labels in itertools.islice(batches, steps):
            output = model(images)
            loss = criterion(output, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right = output.detach().topk(5).indices == labels[:, None]
            for score in (loss, right[:, 0].sum(), right.sum()):
                score.item()
            step_done()

    return train


class Stream(IterableDataset):
    """Whole batches from memory, for trainers that want a DataLoader."""

    def __init__(self, settings: Settings):
        self._batches = random_batches(settings)

    def __iter__(self) -> Batches:
        return self._batches


class Classifier(nn.Module):
    """torchvision's model in channels_last and its loss, as Hugging Face's models return it."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.model = torchvision_model(settings).to(memory_format=torch.channels_last)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss and the logits of a batch."""
        logits = self.model(pixel_values.contiguous(memory_format=torch.channels_last))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def transformers_loop(settings: Settings) -> Loop:
    """Hugging Face's Trainer, which writes nothing and clips nothing; a round is its `train`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils.logging import set_verbosity_error

    class FromMemory(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            def as_inputs(batch: Any) -> dict[str, torch.Tensor]:
                return dict(zip(("pixel_values", "labels"), batch, strict=True))

            return DataLoader(self.train_dataset, batch_size=None, collate_fn=as_inputs)

    set_verbosity_error()
    model, stream = Classifier(settings), Stream(settings)
    forward = model.forward

    def train(steps: int, step_done: Callable[[], None]) -> None:
        class StepEnds(TrainerCallback):
            def on_step_end(self, *args: Any, **others: Any) -> None:
                step_done()

        model.forward = forward  # without the autocast that an earlier round's Trainer put there
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
        same_rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                use_cpu=True,
                bf16=settings.precision == "bf16",
                per_device_train_batch_size=settings.batch_size,
                max_steps=steps,
                max_grad_norm=0.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = FromMemory(
                model,
                arguments,
                train_dataset=stream,
                optimizers=(optimizer, same_rate),
                callbacks=[StepEnds()],
            )
            with contextlib.redirect_stdout(None):  # it prints its summary
                trainer.train()

    return train


def lightning_loop(settings: Settings) -> Loop:
    """Lightning's Trainer, which writes nothing and validates nothing; a round is its `fit`."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = Classifier(settings)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.classifier(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            weights = self.parameters()
            return torch.optim.SGD(weights, lr=0.0, momentum=0.9, weight_decay=1e-4)

    warnings.simplefilter("ignore")  # its advice on loaders and loggers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, stream = Module(), Stream(settings)

    def train(steps: int, step_done: Callable[[], None]) -> None:
        class StepEnds(lightning.Callback):
            def on_train_batch_end(
                self, trainer: Any, module: Any, outputs: Any, *args: Any, **others: Any
            ) -> None:
                outputs["loss"].item()
                step_done()

        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            max_steps=steps,
            callbacks=[StepEnds()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(stream, batch_size=None))

    return train


# Each peer's loop, and the packages that it needs.
PEERS: dict[str, tuple[Callable[[Settings], Loop], tuple[str, ...]]] = {
    "timm": (timm_loop, ("timm",)),
    "timm-compile": (partial(timm_loop, compiled=True), ("timm",)),
    "timm-malloc": (partial(timm_loop, tuned=True), ("timm",)),
    "torchvision": (torchvision_loop, ()),
    "transformers": (transformers_loop, ("transformers", "accelerate")),
    "lightning": (lightning_loop, ("lightning",)),
}
