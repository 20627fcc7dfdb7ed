"""A linear layer that multiplies what will be deployed: y = fq(x) fq(W)^T + b."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.kernels.quantized_linear import quantized_linear
from qtrain.modules.config import QuantizerSection
from qtrain.modules.quantizer import Quantizer
from qtrain.numerics.affine import QParams


class QuantLinear(nn.Linear):
    """y = fq(x) fq(W)^T + b; with adapters y = fq(x) fq(W + lora_scale B A)^T + b, on the levels that are exported.

    Made by ``from_linear``; ``weight`` and ``bias`` are the layer's own, under their own names.

    Attributes:
        weight_quantizer, input_quantizer: None leaves that side as it is.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weight: QuantizerSection | None = None, activation: QuantizerSection | None = None
    ) -> Self:
        """The same layer, fake-quantized; parameters are shared, not copied."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.weight_quantizer = None if weight is None else Quantizer(weight, linear.weight)
        new.input_quantizer = None if activation is None else Quantizer(activation)
        new.register_parameter("lora_A", None)
        new.register_parameter("lora_B", None)
        new.lora_scale = 0.0
        new.train(linear.training)
        return new.to(linear.weight.device) if not linear.weight.is_meta else new

    def add_adapter(self, r: int, lora_alpha: float) -> None:
        """Freeze W; train A [r, in] and B [out, r] from 0, in fp32: fq(W + (lora_alpha / r) B A) (Hu 2021)."""
        self.weight.requires_grad_(False)
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.lora_scale = lora_alpha / r

    def merged_weight(self) -> Tensor:
        """W, or W + lora_scale B A in fp32: what is quantized."""
        if self.lora_A is None or self.lora_B is None:
            return self.weight
        return torch.addmm(self.weight.to(torch.float32), self.lora_B, self.lora_A, alpha=self.lora_scale)

    def quantized_weight(self) -> Tensor:
        """The weight [out, in] on its levels, with gradients: what the product is made with."""
        weight = self._merged_outside_autocast()
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight)

    def codes(self) -> tuple[Tensor, QParams]:
        """Codes [out, in] of the weight and what maps them back, as the last forward used them."""
        assert self.weight_quantizer is not None
        return self.weight_quantizer.codes(self._merged_outside_autocast())

    def forward(self, input: Tensor) -> Tensor:
        """[.., in] to [.., out]."""
        for_weight, for_input = self.weight_quantizer, self.input_quantizer
        if for_input is not None and for_input.observer is not None:
            input = for_input(input)
        weight_on = for_weight is not None and for_weight.enabled
        input_on = for_input is not None and for_input.enabled and for_input.observer is None
        if not (weight_on or input_on):
            return F.linear(input, self._merged_outside_autocast(), self.bias)
        for quantizer, on in ((for_weight, weight_on), (for_input, input_on)):
            if quantizer is not None and on:
                quantizer.check_ready()
        weight_scale, weight_offset = (
            for_weight.range_tensors() if for_weight is not None and weight_on else (None, None)
        )
        input_scale, input_offset = for_input.range_tensors() if for_input is not None and input_on else (None, None)
        return quantized_linear(
            input,
            self._merged_outside_autocast(),
            self.bias,
            weight_rule=for_weight.rule if for_weight is not None and weight_on else None,
            weight_scale=weight_scale,
            weight_offset=weight_offset,
            input_rule=for_input.rule if for_input is not None and input_on else None,
            input_scale=input_scale,
            input_offset=input_offset,
        )

    def to_linear(self) -> nn.Linear:
        """A plain layer with its weight on the levels."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            plain.weight = nn.Parameter(self.quantized_weight().detach().to(self.weight.dtype))
        plain.bias = self.bias
        return plain

    def _merged_outside_autocast(self) -> Tensor:
        if self.lora_A is None:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.merged_weight()
