"""The codes of one layer after the other: those of the training, or chosen here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from qtrain.errors import ExportError, ModelError
from qtrain.export.integers.config import IntegerOptions
from qtrain.export.integers.plan import Plan, module_name
from qtrain.export.writer import Progress
from qtrain.modules.deployed import DeployedTensor
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import FLOAT_DTYPES, QParams, choose_qparams, quantize
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.row_parts import over_rows
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.activation_stats import Calibration
from qtrain.ptq.gptq import gptq_codes


def records(
    plan: Plan,
    options: IntegerOptions,
    calibration: Calibration | None,
    tensors: Sequence[DeployedTensor],
    progress: Progress | None = None,
) -> Iterator[tuple[DeployedTensor, LinearRecord | None]]:
    """Each tensor with its record, None for those that stay as they are; one layer is held at a time.

    Args:
        tensors: the plan's, or those that are left of them.

    Raises:
        ExportError: a weight that is not finite, or weights beside the codes.
    """
    chosen = [name for tensor in tensors if (name := module_name(tensor.name)) in plan.specs and not plan.trained]
    moments = _input_moments(chosen, options, calibration)
    for tensor in progress(tensors, len(tensors)) if progress else tensors:
        spec = plan.specs.get(module_name(tensor.name))
        if spec is None:
            yield tensor, None
        elif tensor.record is not None:
            yield tensor, codes_alone(tensor.name, tensor.record())
        else:
            yield tensor, quantize_linear(tensor, spec, options.scales, next(moments)[1])


def quantize_linear(
    tensor: DeployedTensor, spec: QuantSpec, scales: str = "mse", moment: Tensor | None = None
) -> LinearRecord:
    """Compute the weight and decide its codes.

    Args:
        scales: mse or absmax.
        moment: of the layer's input: E[x_j^2] [in] weighs the scale search; E[x x^T] [in, in] does that with its
            diagonal and has the codes decided by GPTQ; None: all columns alike, the nearest codes.

    Raises:
        ExportError: the weight is not finite, or beyond what scales reach.
    """
    hessian = moment if moment is not None and moment.ndim == 2 else None
    importance = moment if hessian is None else hessian.diagonal()

    def ranges(weight: Tensor) -> QParams:
        return search_qparams(weight, spec, importance) if scales == "mse" else choose_qparams(weight, spec)

    try:
        if hessian is not None or spec.rows_share_scales:
            weight = tensor.value().detach()
            qparams = ranges(weight)
            codes = quantize(weight, qparams, spec) if hessian is None else gptq_codes(weight, qparams, hessian, spec)
        else:
            codes, qparams = _by_rows(tensor, spec, ranges)
    except ModelError as error:
        raise ExportError(
            error.what,
            where=tensor.name,
            rule=error.rule,
            fix=f"export.ignore=[{module_name(tensor.name)}] leaves this layer in 16 bits",
        ) from error
    return LinearRecord(codes, *qparams, spec)


def _by_rows(tensor: DeployedTensor, spec: QuantSpec, ranges: Callable[[Tensor], QParams]) -> tuple[Tensor, QParams]:
    """Nearest codes and ranges of rows that share none: each part of them computed, looked through and quantized while
    it is in a core's cache (AMD EPYC, two cores: 0.9 GB/s of 16-bit weights; a layer at a time 0.44).
    """
    rows_of = tensor.rows() if tensor.rows is not None else tensor.value().detach().__getitem__
    codes = rows_of(slice(0, 1)).new_empty(tensor.shape, dtype=FLOAT_DTYPES.get(spec.format, torch.int8))

    def quantized(rows: slice) -> QParams:
        weight = rows_of(rows)
        qparams = ranges(weight)
        codes[rows] = quantize(weight, qparams, spec)
        return qparams

    try:
        found = over_rows(quantized, codes)
    except ModelError:
        choose_qparams(tensor.value().detach(), spec)  # counts the rows of the whole weight, not of a part
        raise
    points = [one.zero_point for one in found if one.zero_point is not None]
    return codes, QParams(torch.cat([one.scale for one in found]), torch.cat(points) if points else None)


def codes_alone(name: str, record: LinearRecord) -> LinearRecord:
    """``record``, of which a format holds codes, scales and zero points.

    Raises:
        ExportError: some weights lie beside the codes.
    """
    if record.outliers is not None and record.outliers.index.numel():
        raise ExportError(
            f"{record.outliers.index.numel()} of {record.codes.numel()} weights lie beside the codes, in 16 bits",
            where=name,
            rule="integer kernels have codes and scales alone; SpQR's outliers have no place",
            fix="export.format=merged, or the 16-bit model with method.init=gptq, which needs no outliers",
        )
    return record


def _input_moments(
    names: Sequence[str], options: IntegerOptions, calibration: Calibration | None
) -> Iterator[tuple[str, Tensor | None]]:
    """Each layer with what its quantization wants to know of its inputs, in this order."""
    if calibration is not None and names and options.rounding == "gptq":
        return calibration.hessians(names)
    if calibration is not None and names and options.scales == "mse":
        return iter(calibration.second_moments(names).items())
    return zip(names, repeat(None))
