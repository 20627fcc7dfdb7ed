"""QLoRA and LoRA: PEFT's adapters over the frozen base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedModel

from qtrain.errors import ExportError, ModelError
from qtrain.files import atomic_directory
from qtrain.methods.config import KEPT
from qtrain.methods.method import Context, Method, Progress, Text
from qtrain.methods.packed.lines import kernel_line, packed_lines
from qtrain.methods.packed.pack import layers_to_pack, pack_layers, reads_weights_alone, use_tiles
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.methods.qlora.deployed import deployed_tensors
from qtrain.methods.qlora.layers import check_dora, linear_layers, target_names
from qtrain.methods.qlora.neftune import add_neftune
from qtrain.methods.qlora.orthogonal import start_orthogonal
from qtrain.methods.qlora.streamed import frozen_base
from qtrain.methods.streamed import RunFiles, Streamed
from qtrain.models.stored import stored_weights
from qtrain.models.trained_tensors import read_tensors
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.frozen_linear import frozen_kind, linears, quantize_base
from qtrain.modules.fused_blocks import fuse_blocks
from qtrain.modules.packed_identity import packed_layers

ADAPTER = "default"
FOLDING = ("awq", "smoothquant")
"""Starting points that scale a layer's input in the layer before it."""


class QLora(Method[QLoraOptions]):
    """y = x deq(W)^T + (lora_alpha / r) dropout(x) A^T B^T, W frozen, A [r, in] and B [out, r] trained in fp32.

    Dettmers 2023 (arXiv 2305.14314); Hu 2021 (arXiv 2106.09685) where ``base=none``.
    """

    @property
    def keeps_base(self) -> bool:
        """Where a starting point chose the codes: another device, or other text, would choose others."""
        return self.options.base == "packed"

    @property
    def quantizes_alone(self) -> bool:
        """But for starting points that look at text."""
        packed = self.options.packed
        return self.options.base not in ("none", KEPT) if packed is None else reads_weights_alone(packed)

    def quantized_alone(self, model: PreTrainedModel) -> Collection[str]:
        """All that the base quantizes."""
        packed = self.options.packed
        return [name for name, _ in linears(model)] if packed is None else layers_to_pack(model, packed)

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
    ) -> PeftModel:
        """Freeze and quantize the base, layer by layer, then add the adapters.

        Embeddings, norms and lm_head keep their dtype: PEFT's own preparation upcasts them to fp32, and with
        them everything between the layers (81 against 63 GB in bitsandbytes #1569). The adapters are fp32: in bf16 an
        update below 0.4 % of a weight is lost.
        """
        options = self.options
        targets = target_names(model, options.target_modules)
        model.requires_grad_(False)
        if options.packed is not None:
            bf16 = compute_dtype == torch.bfloat16
            context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)
            pack_layers(
                model,
                options.packed,
                device=device,
                text=text,
                context=context,
                progress=progress,
                scratch=scratch,
            )
        elif options.base in ("none", KEPT):
            self._check_kept(model, targets, to_train=not restoring, device=device)
            use_tiles(model, self._kernels, device)
            model.to(device)  # type: ignore[arg-type]
        else:
            quantize_base(
                model,
                options.base,
                double_quant=options.double_quant,
                compute_dtype=compute_dtype,
                device=device,
                progress=progress,
            )
        if options.dora:
            check_dora(model, targets)
        config = LoraConfig(
            r=options.r,
            lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
            lora_dropout=options.lora_dropout,
            target_modules=targets,
            use_rslora=options.rslora,
            use_dora=options.dora,
            init_lora_weights="gaussian" if options.lora_init == "gaussian" else True,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
        assert isinstance(adapted, PeftModel)
        if options.lora_init == "orthogonal":
            for module in adapted.modules():
                if isinstance(module, LoraLayer):
                    start_orthogonal(module, ADAPTER)
        if options.neftune_alpha is not None:
            add_neftune(model, options.neftune_alpha)
        return adapted

    def fuse(self, model: nn.Module, context: Context) -> str:
        """Adapters that share an input, and gated MLPs."""
        fp8 = self.options.compute_dtype == "fp8"
        return fuse_blocks(self.plain_model(model), context, self.options.fused_blocks, fp8=fp8)

    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """One group, or A and B apart with B's rate ``loraplus_ratio`` times A's (Hayou 2024, arXiv 2402.12354)."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        ratio = self.options.loraplus_ratio
        if ratio is None:
            return [{"params": list(trained.values()), "lr": lr}]
        b = [p for name, p in trained.items() if ".lora_B." in name]
        rest = [p for name, p in trained.items() if ".lora_B." not in name]
        return [{"params": rest, "lr": lr}, {"params": b, "lr": lr * ratio}]

    def save(self, model: nn.Module, directory: Path) -> None:
        """``adapter_model.safetensors`` and ``adapter_config.json``, as PeftModel.from_pretrained reads them."""
        assert isinstance(model, PeftModel)
        with atomic_directory(directory) as temporary:
            model.save_pretrained(str(temporary), save_embedding_layers=False)

    def restore(self, model: nn.Module, directory: Path) -> None:
        """Load the adapter's weights.

        Raises:
            CheckpointError: they cannot be read.
            ModelError: names or shapes that are not those of ``model``.
        """
        weights = read_tensors(directory / SAFETENSORS_WEIGHTS_NAME)
        saved = {name: tuple(value.shape) for name, value in weights.items()}
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        wanted = {name: tuple(value.shape) for name, value in own.items()}
        if saved != wanted:
            name = sorted(saved.items() ^ wanted.items())[0][0]
            raise ModelError(
                f"the adapter does not fit this model: {name} is {saved.get(name, 'absent')} there, "
                f"{wanted.get(name, 'absent')} here",
                where=str(directory),
                rule="method.r, method.target_modules and model.path must be those of the training",
                fix="leave those keys out: RUN/config.yaml has them",
            )
        set_peft_model_state_dict(model, weights)

    def plain_model(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model that holds the adapters."""
        if not isinstance(model, PeftModel):
            assert isinstance(model, PreTrainedModel)
            return model
        inner = model.get_base_model()
        assert isinstance(inner, PreTrainedModel)
        return inner

    def deployed(
        self, model: nn.Module, *, dtype: torch.dtype, base: Mapping[str, torch.Tensor] | None = None
    ) -> DeployedModel:
        """Each adapted linear as W + (lora_alpha / r) B A in fp32, W dequantized, or taken from ``base``.

        Raises:
            ExportError: codes that only their own kernels read (AQLM), or a ``base`` that the adapter does not fit.
        """
        inner = self.plain_model(model)
        if foreign := [kind for kind in map(frozen_kind, linear_layers(inner).values()) if kind == "AQLM"]:
            raise ExportError(
                f"{len(foreign)} layers hold AQLM's codes, and an adapter is merged into numbers",
                rule="their kernels alone read them",
                fix="export.format=adapter",
            )
        if base is not None and (reason := self.why_no_original()):
            raise ExportError(reason, fix="export.base=dequantized")
        return self._merged_into(model, base or {}, dtype)

    def streamed(self, files: RunFiles) -> Streamed | None:
        """Adapters in memory, the base in its files, each layer quantized anew where the base is."""
        found = frozen_base(self.options, files)
        if found is None:
            return None
        skeleton, weights = found
        if files.original:
            stored = stored_weights(files.model, torch.float32)
            if stored is None:
                return None
            weights = stored[1]
        model = self.prepare(skeleton, compute_dtype=files.compute, device=torch.device("meta"), restoring=True)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                    part.to_empty(device=files.device)
        self.restore(model, files.trained)
        return Streamed(model, partial(self._merged_into, model, weights))

    def _merged_into(self, model: nn.Module, base: Mapping[str, torch.Tensor], dtype: torch.dtype) -> DeployedModel:
        inner = self.plain_model(model)
        return DeployedModel(
            config=inner.config,
            generation_config=inner.generation_config,
            tensors=lambda: deployed_tensors(inner, base),
            dtype=dtype,
            notes=self._notes(inner),
            adapted=model if isinstance(model, PeftModel) else None,
        )

    def why_no_original(self) -> str | None:
        """Where ``model.path`` holds codes, or a start scaled what the adapters see."""
        if self.options.base == KEPT:
            return "model.path holds the codes that the adapter was trained over, and no other weights"
        if self.options.packed is not None and self.options.packed.init in FOLDING:
            return f"{self.options.packed.init} scaled the layers' inputs, and the adapter learned on those"
        return None

    def lines(self, model: nn.Module) -> list[str]:
        """Base, adapters and what trains."""
        options = self.options
        layers = sum(isinstance(module, LoraLayer) for module in model.modules())
        return [
            f"base        {self._base_in_words()}",
            *self._codes(model),
            f"adapters    r {options.r}, alpha {options.lora_alpha:g}, on {layers} linear layers",
            *super().lines(model),
        ]

    @property
    def _kernels(self) -> str:
        """Of packed integers; no key chooses them for those of a checkpoint."""
        return "auto" if self.options.packed is None else self.options.packed.kernels

    def _base_in_words(self) -> str:
        options = self.options
        if options.packed is not None:
            return f"packed, by {options.packed.init}"
        kept = {"none": "as stored", KEPT: "codes of model.path"}
        nested = " + double quantization" if options.double_quant and options.base in ("nf4", "fp4") else ""
        return kept.get(options.base, options.base + nested)

    def _codes(self, model: nn.Module) -> list[str]:
        """What the base lies in, where ``base`` does not say it."""
        packed = packed_layers(model)
        if packed:
            return [*packed_lines(packed.values()), kernel_line(packed.values(), self._kernels)]
        if self.options.base != KEPT:
            return []
        kinds = Counter(frozen_kind(layer) for layer in linear_layers(self.plain_model(model)).values())
        return [f"codes       {count} layers, {kind}" for kind, count in kinds.items() if kind is not None]

    def _check_kept(
        self, model: PreTrainedModel, targets: Sequence[str], *, to_train: bool, device: torch.device
    ) -> None:
        """Raise unless the linear layers are what ``base`` says, and PEFT can adapt them as asked."""
        kinds = {name: frozen_kind(layer) for name, layer in linear_layers(model).items()}
        if self.options.base == KEPT and not any(kinds.values()):
            raise ModelError(
                f"method.base={KEPT} keeps the codes of a quantized checkpoint, and this model has 16-bit weights",
                fix="a quantized directory as model.path, or method.base=nf4",
            )
        over_aqlm = any(kinds[name] == "AQLM" for name in targets)
        if over_aqlm and to_train and device.type == "cpu":
            raise ModelError(
                "adapters over AQLM's codes, to be trained on a CPU",
                rule="the package's backward pass (aqlm 1.1.7) takes its scales the wrong way round there",
                fix="a GPU",
            )
        if over_aqlm and self.options.dora:
            raise ModelError(
                "method.dora=true over AQLM's codes",
                rule="DoRA needs the norm of each row, and no kernel gives AQLM's weights",
                fix="method.dora=false",
            )

    def _notes(self, inner: PreTrainedModel) -> tuple[str, ...]:
        if self.options.base not in ("packed", KEPT):
            return ()
        packed = packed_layers(inner).values()
        notes = [
            f"adapters are merged into the numbers that method.base={self.options.base} stands for: a format of codes "
            "quantizes the sum anew"
        ]
        if any(layer.input_quantizer is not None for layer in packed):
            notes.append("the base quantized its layers' inputs in training, and nothing quantizes them here")
        return tuple(notes)
