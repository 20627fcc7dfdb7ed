"""Codes and scales as ggml's blocks, and back; one block is a run of bytes, a row of blocks a row of the tensor.

Q4_0   d fp16, 16 bytes: low nibbles l_0 + 8 .. l_15 + 8, high nibbles l_16 + 8 .. l_31 + 8
Q4_1   d fp16, m fp16, 16 bytes of u in the same order
Q8_0   d fp16, 32 bytes of l
TQ2_0  64 bytes: of each 128 weights the byte j holds l_j, l_(j+32), l_(j+64), l_(j+96), two bits each; d fp16
TQ1_0  52 bytes of five (the last four: of four) ternary digits, as a fraction of 243; d fp16
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ExportError
from qtrain.export.gguf.trained import Q4_0, Q4_1, Q8_0, TQ1_0, TQ2_0, BlockType
from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec

SPECS = {
    kind.name: QuantSpec(format=form, symmetric=kind is not Q4_1, group_size=kind.size, full_range=full)
    for kind, form, full in (
        (TQ1_0, "ternary", False),
        (TQ2_0, "ternary", False),
        (Q4_0, "int4", True),
        (Q4_1, "int4", False),
        (Q8_0, "int8", True),
    )
}
"""What the codes of each type mean."""
# TQ1_0 takes digits from parts of these lengths, each cut into rows of so many weights, one digit of a byte a row.
PARTS = ((160, 32), (80, 16), (16, 4))


def stored_record(record: LinearRecord, kind: BlockType) -> LinearRecord:
    """A layer as the file holds it: the same numbers with levels as codes (Q4_1: codes and zero points), fp16 scales,
    one for each block.

    Raises:
        ExportError: outliers, or scales or levels that the type does not hold.
    """
    if record.outliers is not None:
        raise ExportError("some weights are no codes", rule="a block holds codes alone", fix="export.format=merged")
    rows, width = record.codes.shape
    scale, zero = record.scale.expand(rows, -1), record.zero_point
    per_block, left = divmod(width // kind.size, scale.shape[1])
    if left or width % kind.size:
        raise ExportError(
            f"{scale.shape[1]} scales a row of {width} weights",
            rule=f"{kind.name} is in blocks of {kind.size}",
            fix="method.weight.group_size=32",
        )
    half = scale.to(torch.float16)
    if not torch.equal(half.to(torch.float32), scale.to(torch.float32)):
        raise ExportError(
            "scales that are no fp16 numbers", rule="a block's scale is in fp16", fix="export.format=merged"
        )
    codes = record.codes
    if zero is not None and kind is not Q4_1:
        if zero.is_floating_point():
            raise ExportError("zero points that are no whole numbers", rule="levels are", fix="export.format=merged")
        wide = codes.to(torch.int16).view(rows, scale.shape[1], -1) - zero.to(torch.int16).unsqueeze(-1)
        codes, zero = wide.view(rows, width), None
    if zero is None and not kind.low <= int(codes.min()) <= int(codes.max()) <= kind.high:
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ExportError(f"levels from {found}", rule=f"{kind.name} holds {kind.low} to {kind.high}")
    zero = None if zero is None else zero.repeat_interleave(per_block, dim=1)
    return LinearRecord(codes.to(torch.int8), half.repeat_interleave(per_block, dim=1), zero, SPECS[kind.name])


def minimum(record: LinearRecord) -> Tensor:
    """m = (quant_min - z) s of an asymmetric layer, fp32 [out, groups]."""
    assert record.zero_point is not None
    return (record.spec.quant_min - record.zero_point.to(torch.float32)) * record.scale.to(torch.float32)


def minimum_is_exact(record: LinearRecord) -> bool:
    """Whether fp16 holds every minimum, as Q4_1 needs it."""
    exact = minimum(record)
    return torch.equal(exact.to(torch.float16).to(torch.float32), exact)


def pack_blocks(record: LinearRecord, kind: BlockType) -> Tensor:
    """A ``stored_record`` [out, in] as bytes uint8 [out, bytes of a row]."""
    rows, width = record.codes.shape
    blocks = record.codes.view(rows, width // kind.size, kind.size)
    head = [_bytes(record.scale)]
    if kind is Q8_0:
        body = blocks.view(torch.uint8)
    elif kind is TQ2_0:
        digits = (blocks + 1).view(torch.uint8).unflatten(-1, (2, 4, 32))
        body = sum(digits[..., place, :] << (2 * place) for place in range(4)).flatten(-2)
    elif kind is TQ1_0:
        body = torch.cat([_fractions(part) for part in (blocks + 1).split([length for length, _ in PARTS], -1)], -1)
    else:
        unsigned = (blocks + 8).view(torch.uint8)
        body = unsigned[..., :16] | (unsigned[..., 16:] << 4)
    if kind is Q4_1:
        head.append(_bytes(minimum(record).to(torch.float16)))
    parts = [body, *head] if kind in (TQ1_0, TQ2_0) else [*head, body]
    return torch.cat(parts, dim=-1).flatten(1)


def unpack_blocks(packed: Tensor, kind: BlockType) -> LinearRecord:
    """Bytes uint8 [out, bytes of a row] as the record that ``pack_blocks`` was given.

    Raises:
        ExportError: a minimum of Q4_1 that is no whole multiple of its scale.
    """
    spec = SPECS[kind.name]
    tail = kind in (TQ1_0, TQ2_0)
    head = 4 if kind is Q4_1 else 2
    body_size = {"TQ1_0": 52, "TQ2_0": 64, "Q8_0": 32}.get(kind.name, 16)
    blocks = packed.unflatten(1, (-1, body_size + head))
    body, halves = (
        (blocks[..., :body_size], blocks[..., body_size:]) if tail else (blocks[..., head:], blocks[..., :head])
    )
    numbers = halves.contiguous().view(torch.float16)
    scale = numbers[..., 0].contiguous()
    if kind is Q8_0:
        codes = body.contiguous().view(torch.int8)
    elif kind is TQ2_0:
        pairs = [(body.unflatten(-1, (2, 32)) >> (2 * place)) & 3 for place in range(4)]
        codes = torch.stack(pairs, dim=-2).flatten(-3).view(torch.int8) - 1
    elif kind is TQ1_0:
        lengths = [row for _, row in PARTS]
        digits = [
            _digits(part, length // row) for part, (length, row) in zip(body.split(lengths, -1), PARTS, strict=True)
        ]
        codes = torch.cat(digits, dim=-1) - 1
    else:
        codes = torch.cat([body & 15, body >> 4], dim=-1).view(torch.int8) - 8
    zero = None
    if kind is Q4_1:
        ratio = -numbers[..., 1].to(torch.float32) / scale.to(torch.float32)
        zero = (ratio.round() + spec.quant_min).to(torch.int8)
        if not torch.equal(ratio.round() * scale.to(torch.float32), -numbers[..., 1].to(torch.float32)):
            raise ExportError("a minimum that is no multiple of its scale", rule="Q4_1 of whole zero points has such")
    return LinearRecord(codes.flatten(1), scale, zero, spec)


def _bytes(numbers: Tensor) -> Tensor:
    """fp16 [out, blocks] as uint8 [out, blocks, 2]."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


def _fractions(digits: Tensor) -> Tensor:
    """Ternary digits 0, 1, 2 [.., 5 n] as bytes [.., n]: ceil(256 x / 243) of the number x that five digits spell, so
    that a multiplication by 3 brings the next digit into the byte above.
    """
    length = digits.shape[-1]
    row = next(row for whole, row in PARTS if whole == length)
    spelled = torch.zeros((*digits.shape[:-1], row), dtype=torch.int32)
    for place, digit in enumerate(digits.to(torch.int32).unflatten(-1, (-1, row)).unbind(-2)):
        spelled += digit * 3 ** (4 - place)
    return ((spelled * 256 + 242) // 243).to(torch.uint8)


def _digits(fractions: Tensor, count: int) -> Tensor:
    """The inverse of ``_fractions``: int8 [.., count * n]."""
    rows = [(fractions.to(torch.int32) * 3**place % 256 * 3) >> 8 for place in range(count)]
    return torch.cat(rows, dim=-1).to(torch.int8)
