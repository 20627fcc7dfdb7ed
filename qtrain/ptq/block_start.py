"""Where the training of a block begins: at the codes of a starting point, with weights as little moved as can be."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.modules.block_chain import Chain
from qtrain.modules.config import QuantizerSection
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.record import LinearRecord
from qtrain.modules.swap import quantize_layer
from qtrain.numerics.affine import QParams, dequantize, grouped
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import GptqSection, MseSection
from qtrain.ptq.gptq import Gptq
from qtrain.ptq.inputs import gather_inputs, shared_inputs
from qtrain.ptq.mse import Mse
from qtrain.ptq.start import Inputs, Start

TOKENS = 2**18
"""Of the rows that a start's statistics are gathered on, as many as GPTQ's 128 rows of 2048 tokens."""
INSIDE = 0.49
"""How far from its level a weight may begin, in steps; 0.5 would leave it to the rounding of a quotient."""


def start_records(
    name: str, chain: Chain, k: int, specs: Mapping[str, QuantSpec], inputs: Tensor, rows: Tensor
) -> dict[str, LinearRecord]:
    """Records of block k's linears, each found on its own in the full-precision block.

    A layer that no token reaches gets the range of least squared error.

    Args:
        name: mse or gptq.
        specs: by the names within the block.
        inputs: what enters the block [rows, L, d].
        rows: numbers of those to look at.
    """
    start: Start[Any] = Gptq(GptqSection()) if name == "gptq" else Mse(MseSection())
    block = chain.blocks[k]
    layers = {key: block.get_submodule(key) for key in specs}
    seen: dict[str, Inputs] = {}
    if start.statistic != "none" and layers:
        chosen = rows[: max(1, TOKENS // inputs.shape[1])]
        groups = shared_inputs(layers, _passes(chain, k, inputs, chosen))
        seen = gather_inputs(groups, layers, _passes(chain, k, inputs, chosen), start.statistic)
    plain = Mse(MseSection())
    records = {}
    for key, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        own, weight = (start if key in seen else plain), layer.weight.detach().to(torch.float32)
        records[key] = own.quantize(weight, specs[key], seen.get(key, Inputs()))
    return records


def trainable_copy(block: nn.Module, records: Mapping[str, LinearRecord]) -> nn.Module:
    """The block with QuantLinears in fp32 in place of its linears, on these codes; W, s and z train, nothing else."""
    own = copy.deepcopy(block).requires_grad_(False)
    for name, record in records.items():
        linear = own.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        # A step of 1e-5 is lost in a bf16 weight; the product still runs in the dtype of the block's input.
        linear.weight = nn.Parameter(nearest_weights(linear.weight.detach().to(torch.float32), record))
        quantize_layer(linear, _learned(record.spec))
        assert isinstance(linear, QuantLinear) and linear.weight_quantizer is not None
        linear.weight_quantizer.set(record.qparams)
    return own


def nearest_weights(weight: Tensor, record: LinearRecord) -> Tensor:
    """The weights [out, in] nearest to ``weight`` that round to the record's codes.

    Those that round there by themselves keep all that they know of how near the next code is. On the levels themselves
    each would have half a step to go: training then lowered the error by a third of what it does from here (a tiny
    Llama, 2 bits, 46 steps).
    """
    spec = record.spec
    codes = grouped(record.codes, spec)
    scale = record.scale.to(torch.float32).unsqueeze(-1)
    ones = QParams(torch.ones_like(record.scale, dtype=torch.float32), record.zero_point)
    level = grouped(dequantize(record.codes, ones, spec), spec)
    low = torch.where(codes == spec.quant_min, -torch.inf, (level - INSIDE) * scale)
    high = torch.where(codes == spec.quant_max, torch.inf, (level + INSIDE) * scale)
    return torch.minimum(torch.maximum(grouped(weight, spec), low), high).reshape(weight.shape)


@torch.no_grad()
def record_of(layer: nn.Module) -> LinearRecord:
    """The codes and ranges that the layer multiplies with."""
    assert isinstance(layer, QuantLinear) and layer.weight_quantizer is not None
    codes, qparams = layer.codes()
    return LinearRecord(codes, *qparams, layer.weight_quantizer.spec)


def _learned(spec: QuantSpec) -> QuantizerSection:
    """A quantizer of this spec whose range trains."""
    return QuantizerSection.model_validate(spec.to_dict() | {"range": "learned"})


def _passes(chain: Chain, k: int, inputs: Tensor, rows: Tensor) -> Iterator[None]:
    """Runs of the block on one batch after the other."""
    for batch in rows.split(chain.size):
        with torch.no_grad():
            chain.run(k, inputs[batch])
        yield
