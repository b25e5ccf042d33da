"""What several tests of models use."""

import torch

from split_affinity.models.registry import build_model


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def build(name, classes=10, size=32):
    torch.manual_seed(0)
    return build_model(name, classes, size)
