"""Quantization-aware training of a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import ConfigError, ExportError, ModelError
from qtrain.files import atomic_directory, read_json, write_json
from qtrain.methods.method import Context, Method, Progress, Text
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.deployed import deployed_cache, deployed_tensors
from qtrain.methods.qat.lines import described, start_line
from qtrain.methods.qat.serving import serving_notes
from qtrain.methods.qat.start import begin_at, calibration_rows, copied_parameters, moved_since, with_parameters
from qtrain.methods.qat.storage import keep_in_bf16, stored_line
from qtrain.methods.qat.streamed import TrainedLayers
from qtrain.methods.streamed import RunFiles, Streamed
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.models.stored import stored_weights
from qtrain.models.trained_tensors import read_tensors
from qtrain.modules.calibrate import calibrate
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.fused_int8 import fuse_int8
from qtrain.modules.kernel_choice import kernel_lines, use_kernels
from qtrain.modules.kernel_keys import AUTO, AUTO_ON_GPU, PRODUCTS
from qtrain.modules.kv.prepare import has_cache_scales, kv_quantizers, prepare_kv
from qtrain.modules.prepare import Prepared, prepare_modules
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizers import full_precision, quantizers, round_to_nearest
from qtrain.modules.schedule import QuantizationSchedule
from qtrain.ptq.activation_stats import Calibration
from qtrain.ptq.key_smoothing import Smoothed, smooth_keys


class Qat(Method[QatOptions]):
    """y = fq(x) fq(W)^T: weights, layer inputs and the KV cache on the levels of their deployment, gradients straight
    through (Jacob 2018, arXiv 1712.05877; LLM-QAT, Liu 2023, arXiv 2305.17888).
    """

    artifact: ClassVar[str] = "weights"

    def __init__(self, options: QatOptions) -> None:
        super().__init__(options)
        self._prepared = Prepared({})
        self._kv: list[str] = []
        self._smoothed: list[Smoothed] = []
        self._begun: list[str] | None = None  # layers that begin at the codes of ``init``
        self._before_start: dict[str, Tensor] | None = None  # parameters that it moved

    def prepare(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        text: Text | None = None,
        scratch: Path | None = None,
        restoring: bool = False,
    ) -> nn.Module:
        """Swap linears (and the embedding) for their fake-quantized twins; all of it trains, or adapters and ranges.

        What trains is kept in fp32 whatever it was stored in: in bf16 an update below 0.4 % is lost, but on average it
        is not where it is rounded by chance, as for ``weight_storage=bf16``. Weights are kept so where products are
        made in bf16, and so are weights that are frozen under adapters, if they were stored so. With ``init`` the
        weights move to the codes of a starting point, unless they are about to be restored.

        Raises:
            ConfigError: ``input_gradient=int8`` where ``kernels=auto`` is no products of bytes.
        """
        options, stored = self.options, model.dtype
        if not restoring:
            _check_input_gradient(device, options)
        as_stored = options.lora is not None and compute_dtype == torch.bfloat16
        model.to(device=device, dtype=None if as_stored else torch.float32)  # type: ignore[call-arg]
        bf16 = compute_dtype == torch.bfloat16
        context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)
        if options.kv_cache is not None and options.kv_cache.smooth and not restoring:
            rows = calibration_rows("method.kv_cache.smooth=true", options.calibration_rows, text)
            self._smoothed = smooth_keys(model, options.kv_cache, rows, context=context, progress=progress)
        if any((options.weight, options.activation, options.embedding, options.rules)):
            self._prepared = prepare_modules(
                model,
                weight=options.weight,
                activation=options.activation,
                embedding=options.embedding,
                rules=options.rules,
                skip=options.skip,
                first_last=options.first_last,
                head=options.head,
            )
            use_kernels(model, options.kernels, options.input_gradient)
        if options.init is not None and not restoring:
            before = copied_parameters(model, stored)
            self._begun = begin_at(model, options, text=text, context=context, progress=progress)
            self._before_start = moved_since(model, before)
        if options.weight_storage == "bf16" and bf16:
            keep_in_bf16(model, self._begun or ())
        if options.kv_cache is not None:
            self._kv = prepare_kv(model, options.kv_cache)
        model.requires_grad_(True)
        if options.lora is not None:
            self._add_adapters(model)
        return model

    def fuse(self, model: nn.Module, context: Context) -> str | None:
        """Layers of bytes that share an input, and gated MLPs of them."""
        plain = self.plain_model(model)
        if not any(isinstance(layer, QuantLinear) and layer.kernels in PRODUCTS for layer in plain.modules()):
            return None
        return fuse_int8(plain, context)

    def calibrate(self, model: nn.Module, rows: Sequence[Tensor], context: Context, progress: Progress) -> None:
        """Weigh the search of weight ranges by the inputs' E[x^2], then observe what static ranges have to hold."""
        plain = self.plain_model(model)
        if self.options.init is None:
            self._weigh_ranges(plain, rows, context, progress)
        device = next(model.parameters()).device
        calibrate(model, rows, lambda ids: _run(plain, ids.to(device), context))

    @property
    def schedule(self) -> QuantizationSchedule:
        """Of ``start_step``, ``freeze_ranges_step`` and ``bits_schedule``."""
        options = self.options
        return QuantizationSchedule(options.start_step, options.freeze_ranges_step, options.bits_schedule)

    def baselines(self, model: nn.Module) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """The model before quantization, and the same spec by absmax and rounding to nearest, or as ``init`` chose.

        After ``drop_baselines``, or where a start's weights were restored, what was before the start is not known.
        """
        if self.options.init is None:
            return {"full": partial(full_precision, model), "ptq": partial(round_to_nearest, model)}
        if self._before_start is None:
            return {}
        return {
            "full": partial(_before, model, self._before_start),
            "ptq": partial(round_to_nearest, model, weights=False),
        }

    def drop_baselines(self) -> None:
        """Let go of the weights before ``init``."""
        self._before_start = None

    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Weights, and the learned ranges with their own lr and without weight decay."""
        ranges = {id(p) for _, quantizer in quantizers(model) for p in quantizer.parameters(recurse=False)}
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in ranges], "lr": lr}]
        own = [p for p in trained if id(p) in ranges]
        if own:
            groups.append({"params": own, "lr": self.options.scale_lr or lr, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def save(self, model: nn.Module, directory: Path) -> None:
        """What trained with the ranges of the quantizers (safetensors), the architecture's config, the specs.

        With adapters that is all: the frozen base comes from ``model.path``.
        """
        plain = self.plain_model(model)
        specs = {name: quantizer.spec.to_dict() for name, quantizer in quantizers(model)}
        with atomic_directory(directory) as temporary:
            own = {name: tensor.cpu().contiguous() for name, tensor in _own_tensors(plain).items()}
            save_file(own, str(temporary / "model.safetensors"), metadata={"format": "pt"})
            plain.config.save_pretrained(temporary)
            write_json(temporary / "quantizers.json", specs)

    def restore(self, model: nn.Module, directory: Path) -> None:
        """Load weights and ranges.

        Raises:
            ModelError: names, shapes or specs that are not those of ``model``.
        """
        plain = self.plain_model(model)
        saved = read_tensors(directory / "model.safetensors")
        self._check_fit(plain, directory, {name: tuple(tensor.shape) for name, tensor in saved.items()})
        plain.load_state_dict(saved, strict=False)

    def _check_fit(self, model: PreTrainedModel, directory: Path, there: Mapping[str, tuple[int, ...]]) -> None:
        own = {name: tuple(tensor.shape) for name, tensor in _own_tensors(model).items()}
        specs = {name: quantizer.spec.to_dict() for name, quantizer in quantizers(model)}
        known = read_json(directory / "quantizers.json")
        different = sorted(there.items() ^ own.items()) or sorted(
            (name, ()) for name in known.keys() | specs.keys() if known.get(name) != specs.get(name)
        )
        if different:
            name = different[0][0]
            one, other = (there, own) if name in there or name in own else (_words(known), _words(specs))
            raise ModelError(
                f"the weights do not fit this model: {name} is {one.get(name, 'absent')} there, "
                f"{other.get(name, 'absent')} here",
                where=str(directory),
                rule="method.weight, method.activation, method.kv_cache and model.path must be those of the training",
                fix="leave those keys out: RUN/config.yaml has them",
            )

    def plain_model(self, model: nn.Module) -> PreTrainedModel:
        """The model itself: its layers were swapped, not wrapped."""
        assert isinstance(model, PreTrainedModel)
        return model

    def deployed(
        self, model: nn.Module, *, dtype: torch.dtype, base: Mapping[str, torch.Tensor] | None = None
    ) -> DeployedModel:
        """Each quantized layer with the codes of its last training step.

        Raises:
            ExportError: ``base`` is given; there is nothing to merge into it.
        """
        if base is not None:
            raise ExportError(
                "export.base=original merges an adapter into other weights, and method.name=qat trains the weights",
                fix="leave export.base out",
            )
        plain = self.plain_model(model)
        return DeployedModel(
            config=_plain_config(plain),
            generation_config=plain.generation_config,
            tensors=lambda: deployed_tensors(plain),
            dtype=dtype,
            trained_codes=True,
            notes=serving_notes(self.options),
            cache=deployed_cache(plain, self.options.kv_cache),
        )

    def streamed(self, files: RunFiles) -> Streamed | None:
        """Each layer from what was saved of it, and from ``model.path`` where the base is frozen under adapters."""
        stored = stored_weights(files.model, files.storage)
        if stored is None:
            return None
        skeleton, base = stored
        self.prepare(skeleton, compute_dtype=files.compute, device=torch.device("meta"), restoring=True)
        layers = TrainedLayers(skeleton, TensorFiles(files.trained), base, files.device)
        self._check_fit(skeleton, files.trained, layers.saved)
        layers.fill_caches()
        live = partial(self.deployed, skeleton)

        def deployed(dtype: torch.dtype) -> DeployedModel:
            return replace(live(dtype=dtype), tensors=lambda: layers.tensors(deployed_tensors(skeleton)))

        return Streamed(skeleton, deployed)

    def serve(self, model: nn.Module, exported: PreTrainedModel) -> None:
        """Keys and values on the levels of the training, unless a checkpoint's own scales do that."""
        if self.options.kv_cache is not None and not has_cache_scales(exported):
            prepare_kv(exported, self.options.kv_cache)
            trained = dict(kv_quantizers(self.plain_model(model)))
            for name, quantizer in kv_quantizers(exported):
                quantizer.load_state_dict(trained[name].state_dict())

    def lines(self, model: nn.Module) -> list[str]:
        """What is quantized to what, and what trains."""
        options = self.options
        lines = [
            f"{name:<12}{words}"
            for name, words in (
                ("weights", described(options.weight, weight=True)),
                ("inputs", described(options.activation, weight=False)),
                ("embedding", described(options.embedding, weight=True)),
            )
            if words
        ]
        lines.append(f"quantized   {len(self._prepared)} layers, {len(self._prepared.skipped)} stay as they are")
        lines += [f"note        {note}" for note in self._prepared.notes]
        if self.options.kv_cache is not None:
            section = self.options.kv_cache
            kind = "symmetric" if section.symmetric else "asymmetric"
            words = f"{section.format} {kind}, {section.shared}, {section.site}"
            lines.append(f"KV cache    {words}, {len(self._kv)} layers")
        if self._smoothed:
            before, after = (sum(getattr(it, key) for it in self._smoothed) for key in ("before", "after"))
            lines.append(
                f"smoothed    keys of {len(self._smoothed)} blocks, whose error falls by {1 - after / before:.0%}"
            )
        if self.options.init is not None:
            lines.append(start_line(self.options.init, model, self._begun))
        lines += kernel_lines(model)
        ranges = sum(p.numel() for _, q in quantizers(model) for p in q.parameters(recurse=False) if p.requires_grad)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines.append(f"trained     {trained:,} parameters" + (f", {ranges:,} of them ranges" if ranges else ""))
        return [*lines, *stored_line(model, options.weight_storage)]

    def _weigh_ranges(
        self, model: PreTrainedModel, rows: Sequence[Tensor], context: Context, progress: Progress
    ) -> None:
        searched = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, QuantLinear)
            and layer.weight_quantizer is not None
            and layer.weight_quantizer.section.range in ("learned", "static")
            and layer.weight_quantizer.section.calibrate == "mse"
        }
        if searched and rows:
            # Unweighted searches are worse than absmax on SmolLM2 (perplexity 63.9 against 60.5; weighted 39.3).
            with full_precision(model):
                moments = Calibration(model, rows, context).second_moments(list(searched))
            for name, layer in progress(iter(searched.items()), len(searched)):
                assert layer.weight_quantizer is not None
                layer.weight_quantizer.start(layer.merged_weight().detach(), moments[name])

    def _add_adapters(self, model: nn.Module) -> None:
        lora = self.options.lora
        assert lora is not None
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, QuantLinear) and module.weight_quantizer is not None:
                module.add_adapter(lora.r, lora.lora_alpha)
        for _, quantizer in quantizers(model):
            quantizer.requires_grad_(True)


def _check_input_gradient(device: torch.device, options: QatOptions) -> None:
    kernels = AUTO_ON_GPU if device.type == "cuda" else AUTO
    if options.kernels == "auto" and options.input_gradient == "int8" and kernels != "int8":
        raise ConfigError(
            f"method.kernels=auto is {kernels} on this device ({device.type})",
            where="method.input_gradient=int8",
            rule="it is for layers whose products are of bytes",
            fix="method.kernels=int8, method.input_gradient=full, or a GPU",
        )


@contextmanager
def _before(model: nn.Module, moved: Mapping[str, Tensor]) -> Iterator[None]:
    """The full-precision model that a start was given."""
    with with_parameters(model, moved), full_precision(model):
        yield


def _run(model: PreTrainedModel, ids: Tensor, context: Context) -> None:
    run = model if isinstance(model.get_output_embeddings(), QuantLinear) else model.get_decoder()
    with context():
        run(input_ids=ids, use_cache=False)


def _words(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Specs as ``format=int4 symmetric=True ...``."""
    return {
        name: " ".join(f"{key}={value}" for key, value in spec.items() if value is not None)
        for name, spec in specs.items()
    }


def _plain_config(model: PreTrainedModel) -> Any:
    """The architecture's config without the attention of the training."""
    return type(model.config).from_dict(model.config.to_dict())


def _own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict less a frozen base and tied duplicates."""
    ranges = {id(parameter) for _, quantizer in quantizers(model) for parameter in quantizer.parameters(recurse=False)}
    every = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in every if not parameter.requires_grad and id(parameter) not in ranges}
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in frozen or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        kept[name] = tensor.detach()
    return kept
