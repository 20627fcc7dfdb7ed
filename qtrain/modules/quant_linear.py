"""A linear layer that multiplies what will be deployed: y = fq(x) fq(W)^T + b."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.kernels.fp8_linear import fp8_linear, lacks_fp8_product
from qtrain.kernels.int8_linear import int8_linear, lacks_int8_product
from qtrain.kernels.quantized_linear import quantized_linear
from qtrain.modules.config import QuantizerSection
from qtrain.modules.kernel_keys import AUTO, PRODUCTS, Kernels
from qtrain.modules.quantizer import Quantizer
from qtrain.numerics.affine import QParams
from qtrain.numerics.rules import Rule


class QuantLinear(nn.Linear):
    """y = fq(x) fq(W)^T + b; with adapters y = fq(x) fq(W + lora_scale B A)^T + b, on the levels that are exported.

    Made by ``from_linear``; ``weight`` and ``bias`` are the layer's own, under their own names.

    Attributes:
        weight_quantizer, input_quantizer: None leaves that side as it is.
        kernels: which arithmetic it trains with; the codes are the same in all.
        byte_gradient: the input's gradient is a product of bytes, where the forward is one of int8.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    kernels: Kernels = AUTO
    byte_gradient: bool = False
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

    def rules(self) -> tuple[Rule | None, Rule | None]:
        """Of weight and input as they are multiplied now; None leaves that side as it is."""
        for_weight, for_input = self.quantizers()
        return _rule_in_use(for_weight), _rule_in_use(for_input)

    def quantizers(self) -> tuple[Quantizer | None, Quantizer | None]:
        """Of weight and input. Asked for in every forward: as attributes they are looked for in four places."""
        kept = self._modules
        return kept.get("weight_quantizer"), kept.get("input_quantizer")  # type: ignore[return-value]

    def lacks_product(self, kind: Kernels) -> str | None:
        """Why its codes are not multiplied by now as ``kind``, int8 or fp8; None where they are if it is asked to."""
        return self._lacks(kind, *self.rules())

    def forward(self, input: Tensor) -> Tensor:
        """[.., in] to [.., out]."""
        for_weight, for_input = self.quantizers()
        if for_input is not None and for_input.observer is not None:
            input = for_input(input)
        weight = self._merged_outside_autocast()
        weight_rule, weight_scale, weight_offset = _in_use(for_weight)
        input_rule, input_scale, input_offset = _in_use(for_input)
        if weight_rule is None and input_rule is None:
            return F.linear(input, weight, self.bias)
        if self.kernels in PRODUCTS and self._lacks(self.kernels, weight_rule, input_rule) is None:
            assert weight_rule is not None and input_rule is not None
            rules = {"weight_rule": weight_rule, "input_rule": input_rule}
            if self.kernels == "fp8":
                return fp8_linear(input, weight, self.bias, **rules, weight_scale=weight_scale)
            return int8_linear(
                input, weight, self.bias, **rules, weight_scale=weight_scale, byte_gradient=self.byte_gradient
            )
        return quantized_linear(
            input,
            weight,
            self.bias,
            weight_rule=weight_rule,
            weight_scale=weight_scale,
            weight_offset=weight_offset,
            input_rule=input_rule,
            input_scale=input_scale,
            input_offset=input_offset,
            plain=self.kernels == "plain",
        )

    def to_linear(self) -> nn.Linear:
        """A plain layer with its weight on the levels."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            plain.weight = nn.Parameter(self.quantized_weight().detach().to(self.weight.dtype))
        plain.bias = self.bias
        return plain

    def _lacks(self, kind: Kernels, weight_rule: Rule | None, input_rule: Rule | None) -> str | None:
        if kind == "fp8":
            return lacks_fp8_product(weight_rule, input_rule, self.out_features, self.in_features)
        return lacks_int8_product(weight_rule, input_rule)

    def _merged_outside_autocast(self) -> Tensor:
        if self.lora_A is None:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.merged_weight()


def _rule_in_use(quantizer: Quantizer | None) -> Rule | None:
    """None where there is no quantizer, or it is off or only looks."""
    return None if quantizer is None or not quantizer.enabled or quantizer.observer is not None else quantizer.rule


def _in_use(quantizer: Quantizer | None) -> tuple[Rule | None, Tensor | None, Tensor | None]:
    """What quantizes, its scale and its offset."""
    rule = _rule_in_use(quantizer)
    if quantizer is None or rule is None:
        return None, None, None
    quantizer.check_ready()
    return rule, *quantizer.range_tensors()
