"""What methods over packed integers share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import ExportError
from qtrain.methods.method import Context, Method, Progress, Text
from qtrain.methods.packed.config import PackedOptions
from qtrain.methods.packed.deployed import deployed_tensors
from qtrain.methods.packed.lines import kernel_line, packed_lines
from qtrain.methods.packed.pack import layers_to_pack, pack_layers, reads_weights_alone
from qtrain.methods.packed.streamed import StoredLayers
from qtrain.methods.streamed import RunFiles, Streamed
from qtrain.models.packed import packed_skeleton
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.packed_identity import packed_layers
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.scales import Scales

Options = TypeVar("Options", bound=PackedOptions)


class PackedMethod(Method[Options]):
    """A method over a frozen base of packed integers, which RUN/base keeps: a start need not be repeatable."""

    @property
    def keeps_base(self) -> bool:
        """Always."""
        return True

    @property
    def quantizes_alone(self) -> bool:
        """But for starting points that look at text."""
        return reads_weights_alone(self.options)

    def quantized_alone(self, model: PreTrainedModel) -> Collection[str]:
        """All that is packed."""
        return layers_to_pack(model, self.options)

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
        """Pack the linear layers as the starting point says, unless they are packed; freeze all of it."""
        context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=compute_dtype == torch.bfloat16)
        pack_layers(model, self.options, device=device, text=text, context=context, progress=progress, scratch=scratch)
        return model

    def plain_model(self, model: nn.Module) -> PreTrainedModel:
        """The model itself: its layers were replaced, not wrapped."""
        assert isinstance(model, PreTrainedModel)
        return model

    def deployed(
        self, model: nn.Module, *, dtype: torch.dtype, base: Mapping[str, Tensor] | None = None
    ) -> DeployedModel:
        """Each packed layer with its codes, and the scales of now.

        Raises:
            ExportError: ``base`` is given; codes are merged into nothing.
        """
        if base is not None:
            raise ExportError(str(self.why_no_original()), fix="leave export.base out")
        plain = self.plain_model(model)
        return DeployedModel(
            config=plain.config,
            generation_config=plain.generation_config,
            tensors=lambda: deployed_tensors(plain),
            dtype=dtype,
            trained_codes=True,
        )

    def streamed(self, files: RunFiles) -> Streamed | None:
        """Codes and ranges in RUN/base; what trained is put over them layer by layer."""
        assert files.packed is not None  # kept always
        found = packed_skeleton(files.packed, files.storage, attention=files.model.attention)
        if found is None:
            return None
        skeleton, checkpoint, others = found
        model = self.prepare(skeleton, compute_dtype=files.compute, device=torch.device("meta"), restoring=True)
        scales = self.trained_scales(model, files)
        live = partial(self.deployed, model)

        def deployed(dtype: torch.dtype) -> DeployedModel:
            layers = StoredLayers(checkpoint, others, scales, files.device)
            return replace(live(dtype=dtype), tensors=lambda: layers.tensors(deployed_tensors(skeleton)))

        return Streamed(model, deployed)

    def trained_scales(self, model: nn.Module, files: RunFiles) -> Scales | None:
        """What trained; None where that is nothing."""
        return None

    def lines(self, model: nn.Module) -> list[str]:
        """What is packed to how many bytes, by which start, and whose kernels unpack it."""
        layers, options = packed_layers(model).values(), self.options
        return [*packed_lines(layers), f"start       {options.init}", kernel_line(layers, options.kernels)]

    @staticmethod
    def run(plain: PreTrainedModel, ids: Tensor, context: Context) -> None:
        """One pass for those who look on; the head runs only where it is packed."""
        whole = isinstance(plain.get_output_embeddings(), PackedLinear)
        with context():
            (plain if whole else plain.get_decoder())(input_ids=ids, use_cache=False)
