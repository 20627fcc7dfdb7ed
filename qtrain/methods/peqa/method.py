"""PEQA: parameter-efficient, quantization-aware adaptation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from qtrain.files import atomic_directory
from qtrain.methods.method import Context, Progress, Text
from qtrain.methods.packed.method import PackedMethod
from qtrain.methods.peqa.config import PeqaOptions
from qtrain.methods.streamed import RunFiles
from qtrain.models.quantized.header import read_header
from qtrain.modules.fused_packed import fuse_packed
from qtrain.modules.packed_identity import packed_layers
from qtrain.modules.scales import Scales, check_fit, load_scales, save_scales, switch


class Peqa(PackedMethod[PeqaOptions]):
    """y = x ((q - z) (s0 + ds))^T: q and z frozen in a few bits, one scale a row or group trained.

    Kim 2023 (arXiv 2305.14152); after a start by block_ap it is EfficientQAT's second half, E2E-QP (Chen 2024,
    arXiv 2407.11062).
    """

    artifact: ClassVar[str] = "scales"

    @property
    def keeps_outputs(self) -> bool:
        """Where a row has one scale, whose gradient is read off them; there is none beside zero points that train."""
        return not self.options.zero_points

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
        """Pack the linear layers, then let their scales train."""
        packed = super().prepare(
            model, compute_dtype=compute_dtype, device=device, progress=progress, text=text, scratch=scratch
        )
        for layer in packed_layers(packed).values():
            layer.train_ranges(zero_points=self.options.zero_points)
        return packed

    def fuse(self, model: nn.Module, context: Context) -> str:
        """Gated MLPs, which keep less."""
        return fuse_packed(self.plain_model(model), context)

    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Scales, and zero points with their own rate; both without weight decay, which would pull scales to 0."""
        layers = packed_layers(model).values()
        zeros = [layer.zero for layer in layers if layer.zero is not None]
        groups: list[dict[str, Any]] = [{"params": [layer.scale for layer in layers], "lr": lr, "weight_decay": 0.0}]
        if zeros:
            groups.append({"params": zeros, "lr": self.options.zero_point_lr or lr, "weight_decay": 0.0})
        return groups

    def save(self, model: nn.Module, directory: Path) -> None:
        """The task: scales.safetensors, with the identity of the packed base."""
        with atomic_directory(directory) as temporary:
            save_scales(model, temporary)

    def restore(self, model: nn.Module, directory: Path) -> None:
        """Switch to the saved task; an error where it belongs to another base."""
        switch(model, load_scales(directory))

    def trained_scales(self, model: nn.Module, files: RunFiles) -> Scales:
        """The saved task; an error where it belongs to another base."""
        assert files.packed is not None
        scales = load_scales(files.trained)
        header = read_header(files.packed) or {}
        check_fit(scales, str(header.get("identity")), packed_layers(model))
        return scales

    def lines(self, model: nn.Module) -> list[str]:
        """What is packed, and what trains."""
        trained = [p for p in model.parameters() if p.requires_grad]
        count, size = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
        what = "scales and zero points" if self.options.zero_points else "scales"
        return [*super().lines(model), f"trained     {count:,} {what}, {size / 1e6:.1f} MB"]
