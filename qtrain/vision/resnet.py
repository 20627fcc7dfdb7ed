"""Residual networks for small images (He et al. 2016, arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[], nn.Module]


class ResidualBlock(nn.Module):
    """``y = f(norm(conv(f(norm(conv(x))))) + x)`` with 3 x 3 convolutions and f the activation.

    Where the shapes differ, x takes every second pixel and is filled up with channels of zeros: the paper's option A,
    which has no parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.stride, self.added_channels = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.activation1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.activation2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] → [N, outputs, H / stride, W / stride], rounded up."""
        y = self.activation1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.activation2(y + self._shortcut(x))  # type: ignore[no-any-return]

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            x = functional.pad(x, (0, 0, 0, 0, 0, self.added_channels))
        return x


class ResNet(nn.Module):
    """A convolution, three stages of (depth - 2) / 6 blocks of two convolutions, mean over pixels, a linear layer.

    The second and third stage halve the image and double the channels. Activations are modules of their own, each
    used once.

    Args:
        depth: layers with weights: 6 n + 2.
        width: channels of the first stage.
        classes: outputs.
        channels: of the image.
        activation: makes an activation.
    """

    def __init__(
        self, depth: int = 20, width: int = 16, classes: int = 10, channels: int = 1, activation: Activation = nn.ReLU
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth}: three stages of n blocks of two convolutions make 6 n + 2 layers")
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.activation = activation()
        self.stage1 = _stage(blocks, width, width, 1, activation)
        self.stage2 = _stage(blocks, width, 2 * width, 2, activation)
        self.stage3 = _stage(blocks, 2 * width, 4 * width, 2, activation)
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """[N, channels, H, W] → logits [N, classes]."""
        x = self.activation(self.norm(self.conv(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(blocks: int, inputs: int, outputs: int, stride: int, activation: Activation) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, stride, activation)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1, activation) for _ in range(blocks - 1)))
