"""bitsandbytes directories read back byte by byte, and the adapter that lies beside the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError, QtrainError
from qtrain.export.bitsandbytes.header import Scheme, quantization_config, shared_scheme
from qtrain.export.bitsandbytes.layer import frozen_layers
from qtrain.export.bitsandbytes.load import ADAPTER
from qtrain.export.locations import ExportLocation
from qtrain.export.verify import adapter
from qtrain.export.verify.bitsandbytes_layer import Codes, compare_layer, scheme_of, stored_scheme
from qtrain.export.verify.companions import config_problems, generation_problems, tokenizer_problems
from qtrain.export.verify.compare import compare
from qtrain.export.verify.count import KINDS, counted
from qtrain.export.verify.files import file_problems
from qtrain.export.verify.stored import Stored
from qtrain.export.verify.verdict import Verdict
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.modules.deployed import DeployedModel

NONE = "-"


def check_bitsandbytes(
    export: ExportLocation, deployed: DeployedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Verdict:
    """Compare base, adapter and what lies beside them with the model that was trained.

    Columns: those of ``check_export``; scales are those of blocks and, with double quantization, of blocks of scales;
    adapter: its tensors and its config, bit by bit. Of a merged export codes and scales are not compared.
    """
    directory = export.directory
    verdict = Verdict(export.format, directory)
    verdict.merged = not (directory / ADAPTER).is_dir() if not export.facts else export.facts.get("codes") == "lossy"
    verdict.lossy = verdict.merged
    verdict.found("files", file_problems(directory))
    try:
        _compare(verdict, deployed, recorded=bool(export.facts))
    except QtrainError as error:
        verdict.cells |= {column: NONE for column in ("names", "layout", *KINDS, "tensors")}
        if verdict.passed:  # else it stumbled over the files that were told already
            verdict.found("layout", [error])
    if not verdict.merged and deployed.adapted is not None:
        adapter.look_at_adapter(verdict, directory / ADAPTER, deployed.adapted, "adapter")
        verdict.found("adapter", adapter.config_problems(directory / ADAPTER, deployed.adapted))
    problems = [*config_problems(directory, deployed.config, deployed.dtype)]
    verdict.found("config", [*problems, *generation_problems(directory, deployed.generation_config)])
    if tokenizer is not None:
        verdict.found("tokenizer", tokenizer_problems(directory, tokenizer))
    return verdict


def _compare(verdict: Verdict, deployed: DeployedModel, *, recorded: bool) -> None:
    tensors = TensorFiles(verdict.directory)
    live = {} if deployed.adapted is None else frozen_layers(deployed.adapted.get_base_model())
    shapes = {
        tensor.name.removesuffix(".weight"): tensor.shape
        for tensor in deployed.tensors()
        if (tensor.linear if verdict.merged else tensor.name.removesuffix(".weight") in live)
    }
    found = Codes()
    there = list(tensors)
    of_layers = set[str]()
    for name, shape in shapes.items():
        own = {key for key in there if key.startswith(f"{name}.") and key != f"{name}.bias"}
        of_layers |= own
        compare_layer(tensors, name, shape, own, None if verdict.merged else live[name], found)
    rest = {name: partial(tensors.get, name) for name in there if name not in of_layers}
    weights = {f"{name}.weight" for name in shapes}
    plain = replace(deployed, tensors=lambda: (it for it in deployed.tensors() if it.name not in weights))
    others = compare(Stored({}, rest, claimed=()), plain)
    alone = [_alone(verdict)] if verdict.merged and not recorded and _is_base(tensors, shapes, live) else []
    verdict.found("names", [*found.names, *others.names, *alone])
    layout = [*found.layout, *_header_problems(verdict, deployed, tensors, shapes, live)]
    verdict.found("layout", layout)
    for kind, count in found.counts.items():
        verdict.found(kind, count.problems(kind), "lossy" if verdict.lossy else "0")
        if count.differing:
            verdict.cells[kind] = f"{count.differing:,}"
    verdict.found("tensors", others.wrong)
    verdict.figures |= {"counts": counted(found.counts), "equal_tensors": others.tensors}
    if verdict.lossy:
        verdict.notes.append(
            f"lossy, by design: the codes of {len(shapes)} layers were chosen when the merged model was written"
        )


def _is_base(tensors: TensorFiles, shapes: Mapping[str, tuple[int, ...]], live: Mapping[str, nn.Module]) -> bool:
    """Whether all codes are those that the adapter was trained over."""
    for name, shape in shapes.items():
        found = Codes()
        if name not in live or stored_scheme(tensors, name) != scheme_of(live[name]):
            return False
        compare_layer(tensors, name, shape, (), live[name], found)
        if found.names or found.counts["codes"].differing:
            return False
    return True


def _alone(verdict: Verdict) -> ExportError:
    return ExportError(
        "no adapter lies beside them, and the codes are those of the base",
        where=str(verdict.directory),
        rule="what was trained is the base with its adapter",
    )


def _header_problems(
    verdict: Verdict,
    deployed: DeployedModel,
    tensors: TensorFiles,
    shapes: Mapping[str, Any],
    live: Mapping[str, nn.Module],
) -> Iterator[ExportError]:
    """``quantization_config`` against what the layers are, key by key."""
    where = str(verdict.directory / "config.json")
    header = read_header(verdict.directory) or {}
    if verdict.merged:
        kind, double_quant = stored_scheme(tensors, next(iter(shapes)))
        compute = getattr(torch, str(header.get("bnb_4bit_compute_dtype")), torch.float32)
        scheme = Scheme(kind) if kind == "int8" else Scheme(kind, double_quant, compute)
    else:
        scheme = shared_scheme(live.items())
    own = quantization_config(scheme, deployed.config, shapes)
    for key in sorted(header.keys() | own.keys()):
        one, other = (set(it[key]) if isinstance(it.get(key), list) else it.get(key) for it in (header, own))
        if one != other:
            yield ExportError(
                f"quantization_config.{key} is {header.get(key)!r} there, {own.get(key)!r} by its layers",
                where=where,
                rule="transformers makes a layer of codes of each linear that llm_int8_skip_modules leaves, by one "
                "header",
            )
