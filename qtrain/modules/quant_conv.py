"""A convolution on its levels."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from qtrain.modules.config import QuantizerSection
from qtrain.modules.quantizer import Quantizer
from qtrain.numerics.affine import QParams


class QuantConv2d(nn.Conv2d):
    """conv2d(fq(x), fq(W)) + b, W [out, in / groups, kh, kw] with one scale for each output channel.

    Attributes:
        weight_quantizer, input_quantizer: None leaves that side as it is.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, weight: QuantizerSection | None = None, activation: QuantizerSection | None = None
    ) -> Self:
        """The same layer, fake-quantized; parameters are shared.

        An activation whose range is dynamic and per_token has one range for the whole tensor here: pixels have no rows.
        """
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        new.weight, new.bias = conv.weight, conv.bias
        if activation is not None and activation.granularity is None and activation.range == "dynamic":
            activation = activation.merged({"granularity": "per_tensor"})
        new.weight_quantizer = None if weight is None else Quantizer(weight, conv.weight)
        new.input_quantizer = None if activation is None else Quantizer(activation)
        new.train(conv.training)
        return new.to(conv.weight.device) if not conv.weight.is_meta else new

    def codes(self) -> tuple[Tensor, QParams]:
        """Codes of the weight, in its shape, and what maps them back."""
        assert self.weight_quantizer is not None
        return self.weight_quantizer.codes(self.weight)

    def quantized_weight(self) -> Tensor:
        """The weight on its levels, with gradients."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """[batch, in, height, width] to [batch, out, ..]."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        output: Tensor = self._conv_forward(input, self.quantized_weight(), self.bias)
        return output
