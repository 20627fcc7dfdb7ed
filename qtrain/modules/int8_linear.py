"""A layer of int8 weights and int8 inputs that multiplies the codes themselves, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.kernels.int8_product import int8_product, int8_product_is_exact, pack_int8
from qtrain.modules.packed_linear import PackedLinear


class Int8Linear(nn.Module):
    """y = s_x s_w ((q_x - z_x) q_w^T) + b: the layer that was trained, its sum made of integers (Jacob 2018,
    arXiv 1712.05877). For inference: it has no gradient, and stays on the CPU.

    Args:
        layer: its codes become bytes in the kernel's order; bias and input quantizer are shared.

    Raises:
        ModelError: a layer that ``has_int8_product`` says no to, or a CPU whose products would be wrong.
    """

    def __init__(self, layer: PackedLinear) -> None:
        if layer.input_quantizer is None or not has_int8_product(layer):
            raise ModelError(
                f"a layer without a product of bytes: {layer.extra_repr()}",
                rule="weights are symmetric with one scale a row, inputs int8 by token or by one static range",
                fix="method.weight.format=int8 method.activation.format=int8",
            )
        if not int8_product_is_exact():
            raise ModelError(
                "products of bytes saturate on this CPU",
                rule="int8 kernels need VNNI (AVX512_VNNI, AVX_VNNI or AMX) to sum in 32 bits",
                fix="run the model as it was loaded: the same codes, multiplied as floats",
            )
        super().__init__()
        record = layer.record()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.input_quantizer = layer.bias, layer.input_quantizer
        self.packed = pack_int8(record.codes)
        self.scale = record.scale.flatten().to(torch.float32)
        self.row_sums = record.codes.sum(1, dtype=torch.int32) * self.scale
        self.eval()

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """y [.., out] of x [.., in]."""
        if torch.is_autocast_enabled(input.device.type):  # levels of the dtype that is multiplied
            input = input.to(torch.get_autocast_dtype(input.device.type))
        codes, qparams = self.input_quantizer.codes(input)
        product = int8_product(codes.reshape(-1, self.in_features), self.packed, self.scale)
        if qparams.zero_point is not None:
            product.sub_(qparams.zero_point.to(torch.float32) * self.row_sums)
        product.mul_(qparams.scale.to(torch.float32))
        if self.bias is not None:
            product.add_(self.bias)
        return product.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def extra_repr(self) -> str:
        """Widths."""
        return f"{self.in_features}, {self.out_features}"


def has_int8_product(layer: nn.Module) -> bool:
    """Whether a layer's sum is one of integers: one scale a row of the weight, one a token or tensor of the input."""
    if not isinstance(layer, PackedLinear) or layer.input_quantizer is None or layer.outlier_index is not None:
        return False
    weight, inputs = layer.spec, layer.input_quantizer.spec
    return (
        (weight.symmetric and weight.granularity == "per_channel" and not weight.mid_rise)
        and (inputs.format == "int8" and inputs.granularity in ("per_token", "per_tensor") and not inputs.mid_rise)
        and layer.input_quantizer.section.range in ("dynamic", "static")
    )


def use_int8_products(model: nn.Module) -> list[str]:
    """Exchange all layers that can for ``Int8Linear``; their names. Of ``load_packed``, on a CPU with VNNI.

    Raises:
        ModelError: a CPU whose products would be wrong.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    found = [name for name, layer in layers.items() if has_int8_product(layer)]
    for name in found:
        model.set_submodule(name, Int8Linear(layers[name]))
    return found
