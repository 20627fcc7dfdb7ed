"""Rows in parts, by several threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from qtrain.numerics import row_parts
from qtrain.numerics.packing import pack, pack_rows, unpack_rows
from qtrain.numerics.row_parts import over_rows


@pytest.fixture(params=[1, 2, 4, 5, 6, 9])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_all_rows_in_their_order(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(row_parts, "PART", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seen, inside = set[int](), set[int]()
    x = torch.arange(17 * 30).view(17, 30)

    def work(rows: slice) -> torch.Tensor:
        seen.add(threading.get_ident())
        inside.add(torch.get_num_threads())
        assert torch.is_grad_enabled() == grad
        assert x[rows].numel() <= 100
        return x[rows].sum(1)

    try:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(torch.cat(over_rows(work, x)), x.sum(1))
        assert inside == {{6: 2, 9: 3}.get(threads, 1)}
        assert (threading.get_ident() in seen) == (threads == 1)
        assert torch.get_num_threads() == threads
        with pytest.raises(ZeroDivisionError):
            over_rows(lambda rows: 1 // 0, x)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_in_parts(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(row_parts, "PART", 100)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (13, 40), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    words = pack_rows(codes, bits)
    assert torch.equal(words, pack(codes, bits))
    assert torch.equal(unpack_rows(words, bits, 40), codes)
    assert pack_rows(codes[:0], bits).shape == (0, words.shape[1])


FORKED = """
import os, torch
from qtrain.numerics import row_parts
row_parts.PART = 100
torch.set_num_threads(2)
x = torch.arange(17 * 30).view(17, 30)
for place in ("parent", "child"):
    assert torch.equal(torch.cat(row_parts.over_rows(lambda rows: x[rows].sum(1), x)), x.sum(1))
    if place == "parent" and (child := os.fork()):
        _, status = os.waitpid(child, 0)
        raise SystemExit(os.waitstatus_to_exitcode(status))
os._exit(7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not copied here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


def test_all_parts_are_done_when_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "PART", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    done = []

    def work(rows: slice) -> None:
        if rows.start == 0:
            raise ZeroDivisionError
        time.sleep(0.01)
        done.append(rows.start)

    try:
        with pytest.raises(ZeroDivisionError):
            over_rows(work, torch.zeros(9, 1))
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == list(range(1, 9))
