"""Models of our own: a ResNet for small images, and a hybrid of convolutions and a transformer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation


class PadShortcut(nn.Module):
    """The shortcut without parameters (option A) of He et al. 2016, section 4.2.

    It takes every `stride`-th pixel and adds channels of zeros.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.missing = channels_out - channels_in

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, in, h, w) to (n, out, ceil(h / stride), ceil(w / stride))."""
        picked = images[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(picked, (0, 0, 0, 0, 0, self.missing))


def init_convolutions(model: nn.Module) -> None:
    """Initialise convolutions as in He et al. 2015 (fan-out), as torchvision does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class SmallResNet(nn.Module):
    """The ResNet for 32-pixel images of He et al. 2016 (arXiv 1512.03385), section 4.2.

    Three stages, of 16, 32 and 64 channels, have `blocks` blocks of two convolutions each. Nine
    blocks make ResNet-56 (853,018 parameters for 10 classes), three ResNet-20.
    """

    def __init__(self, num_classes: int, blocks: int = 9):
        super().__init__()
        self.stem = Conv2dNormActivation(3, 16, kernel_size=3)
        self.stage1 = self._stage(16, 16, 1, blocks)
        self.stage2 = self._stage(16, 32, 2, blocks)
        self.stage3 = self._stage(32, 64, 2, blocks)
        self.fc = nn.Linear(64, num_classes)
        init_convolutions(self)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        shortcut = PadShortcut(channels_in, channels, stride) if stride > 1 else None
        first = BasicBlock(channels_in, channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, num_classes) of images (n, 3, h, w)."""
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        return self.fc(features.mean((2, 3)))


class ChannelAttention(nn.Module):
    """Scales each channel by a gate in (0, 1), computed from its global average and maximum."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv2d(2 * channels, channels // 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n, channels, h, w), same shape out."""
        pooled = features.mean((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
        return features * self.gate(torch.cat(pooled, 1))


class TokenEncoder(nn.Module):
    """Post-norm transformer blocks over the places of a feature map.

    Each token is a place plus its learned position plus the embedding of the whole image. There are
    `grid` x `grid` positions; for other sizes they are interpolated.
    """

    def __init__(self, channels: int, width: int, blocks: int, grid: int):
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        positions = torch.empty(1, width, grid, grid)
        self.positions = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))
        options = {"dropout": 0.1, "activation": "gelu", "batch_first": True}
        layers = (nn.TransformerEncoderLayer(width, 8, 4 * width, **options) for _ in range(blocks))
        self.blocks = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Features (n, channels, h, w) and embeddings (n, width) to tokens (n, h * w, width)."""
        places, positions = self.project(features), self.positions
        if places.shape[2:] != positions.shape[2:]:
            positions = nn.functional.interpolate(positions, places.shape[2:], mode="bicubic")
        tokens = (places + positions).flatten(2).transpose(1, 2)
        return self.blocks(tokens + embedding.unsqueeze(1))


def normalised_linear(width_in: int, width: int, dropout: float) -> list[nn.Module]:
    """A linear layer with layer normalisation, ReLU and dropout after it."""
    linear, norm = nn.Linear(width_in, width), nn.LayerNorm(width)
    return [linear, norm, nn.ReLU(inplace=True), nn.Dropout(dropout)]


class Hybrid(nn.Module):
    """Convolutions with channel attention, then a transformer over the places of the last map.

    `channels` are those of the stem and of three residual blocks; the last map has a 32nd of the
    image's side. `width` and `blocks` are the transformer's.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        channels: Sequence[int] = (64, 128, 256, 512),
        width: int = 768,
        blocks: int = 4,
    ):
        super().__init__()
        last = channels[-1]
        self.stem = nn.Sequential(
            *Conv2dNormActivation(3, channels[0], kernel_size=7, stride=2),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages = nn.Sequential(*(self._block(*pair) for pair in itertools.pairwise(channels)))
        self.attention = ChannelAttention(last)
        self.embedding = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            *normalised_linear(16 * last, 2048, dropout=0.1),
            nn.Linear(2048, width),
        )
        self.encoder = TokenEncoder(last, width, blocks, grid=-(-image_size // 32))
        self.head = nn.Sequential(
            *normalised_linear(width, 512, dropout=0.2),
            nn.Linear(512, 256),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Linear(256, num_classes),
        )
        init_convolutions(self)

    @staticmethod
    def _block(channels_in: int, channels: int) -> nn.Module:
        projection = Conv2dNormActivation(channels_in, channels, 1, 2, activation_layer=None)
        return BasicBlock(channels_in, channels, 2, projection)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, num_classes) of images (n, 3, size, size)."""
        features = self.attention(self.stages(self.stem(images)))
        tokens = self.encoder(features, self.embedding(features))
        return self.head(tokens.mean(1))
