"""Rows of two models' logits to their divergence and, over the student's, to its gradient.

The Triton twin of ``qtrain.kernels.divergence.plain``, which has up to five matrices of numbers of four bytes and goes
over them some twenty times. Here both logits are read for their normalizers, and once more beside the gradient's write;
the gradient of reverse KL and of JSD has the row's own divergence in it, which takes one reading between.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.cross_entropy_tiles import DTYPES as DTYPES
from qtrain.kernels.cross_entropy_tiles import _lanes, _log_sum
from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import _to

BLOCK, WARPS = 4096, 16
"""Logits of a row at a time, eight a thread: six numbers are kept of each until a loop ends."""
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def divergence_(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    loss: str,
    temperature: float,
    ce_weight: float,
    jsd_beta: float,
) -> tuple[Tensor, Tensor]:
    """As ``qtrain.kernels.divergence.divergence_``; student contiguous."""
    assert student.is_contiguous() and student.shape == teacher.shape
    rows, vocab = student.shape
    losses = torch.empty(rows, dtype=torch.float32, device=student.device)
    if not rows:
        return losses, student
    block = min(BLOCK, triton.next_power_of_2(vocab))
    launch(
        _rows,
        (rows,),
        *(student, teacher.contiguous(), target.contiguous(), losses, vocab),
        *(1 / temperature, temperature * (1 - ce_weight), temperature, ce_weight),
        *(jsd_beta, math.log(jsd_beta), math.log1p(-jsd_beta)),
        KIND=KINDS[loss],
        ENTROPY=ce_weight != 0,
        WARM=temperature != 1,
        STEPS=triton.cdiv(vocab, block),
        BLOCK=block,
        num_warps=max(1, WARPS * block // BLOCK),
    )
    return losses, student


@triton.jit
def _possible(log_share):  # type: ignore[no-untyped-def]
    """log 0 as ``qtrain.kernels.divergence.IMPOSSIBLE``; a NaN stays one."""
    return tl.where(log_share < -1e4, -1e4, log_share)


@triton.jit
def _mixed(log_p, log_q, log_beta, log_rest):  # type: ignore[no-untyped-def]
    """log(beta p + (1 - beta) q); a NaN of either stays one."""
    x, y = log_p + log_beta, log_q + log_rest
    high, low = tl.where(x > y, x, y), tl.where(x > y, y, x)
    return high + tl.log(1.0 + tl.exp(low - high))


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    student_ptr,
    teacher_ptr,
    target_ptr,
    losses_ptr,
    vocab,
    inverse,
    slope,
    temperature,
    ce_weight,
    beta,
    log_beta,
    log_rest,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    WARM: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * vocab
    teacher_ptr += row * vocab
    target = tl.load(target_ptr + row)
    counts = target >= 0
    picked = tl.load(student_ptr + tl.maximum(target, 0)).to(tl.float32)
    column = tl.arange(0, BLOCK)
    # Largest and sum so far in each lane, of q and p, and of q at T = 1, which cross-entropy is of.
    largest_q = tl.full([BLOCK], float("-inf"), tl.float32)
    largest_p = tl.full([BLOCK], float("-inf"), tl.float32)
    largest_1 = tl.full([BLOCK], float("-inf"), tl.float32)
    total_q = tl.zeros([BLOCK], tl.float32)
    total_p = tl.zeros([BLOCK], tl.float32)
    total_1 = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        here = step * BLOCK + column
        z = tl.load(student_ptr + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
        largest_q, total_q = _lanes(z * inverse, largest_q, total_q)
        largest_p, total_p = _lanes(t * inverse, largest_p, total_p)
        if ENTROPY and WARM:
            largest_1, total_1 = _lanes(z, largest_1, total_1)
    normal_q, normal_p = _log_sum(largest_q, total_q), _log_sum(largest_p, total_p)
    normal_1 = normal_q
    if ENTROPY and WARM:
        normal_1 = _log_sum(largest_1, total_1)
    # Of a divergence weighed by q: what its gradient takes off everywhere.
    mean = 0.0
    divergence = tl.zeros([BLOCK], tl.float32)
    if KIND != 0:
        means = tl.zeros([BLOCK], tl.float32)
        for step in range(STEPS):
            here = step * BLOCK + column
            z = tl.load(student_ptr + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
            t = tl.load(teacher_ptr + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
            log_q, log_p = _possible(z * inverse - normal_q), _possible(t * inverse - normal_p)
            against = log_p
            if KIND == 2:
                against = _mixed(log_p, log_q, log_beta, log_rest)
                divergence += beta * tl.exp(log_p) * (log_p - against)
            means += tl.exp(log_q) * (log_q - against)
        mean = tl.sum(means, axis=0)
    for step in range(STEPS):
        here = step * BLOCK + column
        z = tl.load(student_ptr + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
        log_q, log_p = _possible(z * inverse - normal_q), _possible(t * inverse - normal_p)
        q = tl.exp(log_q)
        if KIND == 0:
            p = tl.exp(log_p)
            divergence += p * (log_p - log_q)
            gradient = q - p
        elif KIND == 1:
            gradient = q * (log_q - log_p - mean)
        else:
            gradient = (1.0 - beta) * q * (log_q - _mixed(log_p, log_q, log_beta, log_rest) - mean)
        gradient *= slope
        if ENTROPY:
            gradient += ce_weight * (tl.exp(z - normal_1) - tl.where(here == target, 1.0, 0.0))
        gradient = tl.where(counts, gradient, 0.0)
        tl.store(student_ptr + here, _to(gradient, student_ptr.dtype.element_ty), mask=here < vocab)
    weighed = tl.sum(divergence, axis=0)
    if KIND == 1:
        weighed += mean
    if KIND == 2:
        weighed += (1.0 - beta) * mean
    loss = slope * temperature * weighed
    if ENTROPY:
        loss += ce_weight * (normal_1 - picked)
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))
