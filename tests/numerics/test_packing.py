"""Packed words, with compressed-tensors as the judge."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.errors import ConfigError
from qtrain.numerics.packing import PACKED_BITS, pack, unpack, words_of

JUDGED = (2, 3, 4, 8)


@settings(max_examples=100, deadline=None)
@given(bits=st.sampled_from(JUDGED), rows=st.integers(1, 6), columns=st.integers(1, 90), seed=st.integers(0, 99))
def test_the_words_are_those_of_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    high = 2 ** (bits - 1)
    codes = torch.randint(-high, high, (rows, columns), generator=generator, dtype=torch.int8)
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack(words, bits, columns), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


def test_the_first_code_takes_the_lowest_bits() -> None:
    codes = torch.tensor([[-7, -6, -5, -4, -3, -2, -1, 7]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[int.from_bytes(bytes([0x21, 0x43, 0x65, 0xF7]), "little", signed=True)]]


def test_strided_codes_are_packed_as_they_read() -> None:
    codes = torch.randint(-8, 8, (24, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(pack(codes.t(), 4), pack(codes.t().contiguous(), 4))


@settings(max_examples=100, deadline=None)
@given(bits=st.sampled_from(PACKED_BITS), rows=st.integers(0, 4), columns=st.integers(1, 140), seed=st.integers(0, 99))
def test_a_row_is_one_stream_of_bits(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    high = 2 ** (bits - 1)
    codes = torch.randint(-high, high, (rows, columns), generator=generator, dtype=torch.int8)
    words = pack(codes, bits)
    assert words.shape == (rows, words_of(columns, bits))
    for row, packed in zip(codes.tolist(), words, strict=True):
        stream = sum((code + high) << (bits * k) for k, code in enumerate(row))
        assert packed.numpy().tobytes() == stream.to_bytes(4 * len(packed), "little")
    assert torch.equal(unpack(words, bits, columns), codes)


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="2, 3, 4, 5, 6, 7, 8"):
        pack(torch.zeros(1, 32, dtype=torch.int8), 1)
