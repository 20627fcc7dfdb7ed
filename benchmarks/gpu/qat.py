"""QAT of a 1B Llama and of layers of the 7B's width, against bf16 fine-tuning of all weights with liger-kernel.

    python -m benchmarks.gpu.qat CASE [--tiny] [--work DIR]

CASE is SHAPE:WHAT. All under the Trainer of `qtrain fit`, on 4 x 2048 random ids, fused AdamW, gradients clipped at 1,
nothing recomputed. "bf16" trains weights kept in bf16 ("fp32": kept in fp32 and multiplied in bf16, as QAT's are);
":bf16" behind a spec keeps QAT's weights, and both of Adam's moments, in bf16 too (8 bytes a weight with its gradient,
as "bf16" has them), rounded by chance; the peer rounds to nearest.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaForCausalLM

from benchmarks.gpu.measure import Case, Figures, NotHere, quiet, run, shape_of, sizes
from benchmarks.gpu.models import DTYPE, ON_GPU, random_model
from benchmarks.gpu.shapes import LAYERS_7B, LLAMA_1B, Shape
from benchmarks.gpu.training import train, train_ours
from qtrain.config.compose import load_recipe
from qtrain.config.schema import Config

SHAPES = {"1b": LLAMA_1B, "7b-layers": LAYERS_7B}
W8A8 = ("method.weight.format=int8", "method.activation.format=int8")
W4A8 = ("method.weight.format=int4", "method.activation.format=int8")
W4_G32 = ("method.weight.format=int4", "method.weight.group_size=32")
INT8, GRAPHS = "method.kernels=int8", "run.cuda_graphs=true"
SPECS: dict[str, tuple[str, ...]] = {
    "w8a8-triton": (*W8A8, "method.kernels=triton"),
    "w8a8-int8": (*W8A8, INT8),
    "w8a8-int8-gradient": (*W8A8, INT8, "method.input_gradient=int8"),
    "w8a8-int8-graphs": (*W8A8, INT8, GRAPHS),
    "w8a8-int8-gradient-graphs": (*W8A8, INT8, "method.input_gradient=int8", GRAPHS),
    "w4a8-triton": (*W4A8, "method.kernels=triton"),
    "w4a8-int8": (*W4A8, INT8),
    "w4a8-int8-gradient": (*W4A8, INT8, "method.input_gradient=int8"),
    "w4a8-int8-graphs": (*W4A8, INT8, GRAPHS),
    "w4a8-int8-gradient-graphs": (*W4A8, INT8, "method.input_gradient=int8", GRAPHS),
    "w4g32": W4_G32,
    "8da4w": (*W4_G32, "method.activation.format=int8", "method.activation.symmetric=false"),
}
IN_BF16 = ("method.weight_storage=bf16", "method.compute_dtype=bf16", "optimizer.name=adamw_16bit")
TRAINING = ("optimizer.name=adamw", "optimizer.lr=1e-5", "trainer.gradient_clip_val=1.0", "data.packing=false")


class FineTuning(L.LightningModule):
    """All weights by fused AdamW; norm, RoPE, SwiGLU and head with cross-entropy by liger-kernel."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model.train()
        self.liger = "transformers' own layers: no GPU"
        if ON_GPU:
            try:
                from liger_kernel.transformers import _apply_liger_kernel_to_instance
            except ImportError as error:
                raise NotHere(f"liger-kernel: {error}") from None
            _apply_liger_kernel_to_instance(model=model)
            self.liger = "norm, RoPE, SwiGLU, linear cross-entropy of liger-kernel"

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        assert isinstance(loss, Tensor)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By norm; Lightning refuses to for a fused AdamW under autocast."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), float(gradient_clip_val or 1.0))

    def configure_optimizers(self) -> Optimizer:
        """AdamW as QAT has it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5, weight_decay=0.0, fused=ON_GPU)


def fine_tuning(asked: argparse.Namespace, *, shape: Shape, precision: str) -> Figures:
    """The peer."""
    shape, size = shape_of(shape, asked), sizes(asked)
    config = load_recipe(None, *TRAINING)
    assert isinstance(config, Config)
    kept = DTYPE if precision == "bf16-true" else torch.float32
    chosen: dict[str, Any] = {"precision": precision if ON_GPU else "32-true"}
    module = FineTuning(random_model(shape, kept))
    found = train(module, config, shape, size, trains=True, **chosen)
    found.said = [module.liger, f"precision {chosen['precision']}"]
    return found


def quantized(asked: argparse.Namespace, *, shape: Shape, spec: str, bf16: bool) -> Figures:
    """Ours."""
    shape = shape_of(shape, asked)
    words = ["method.name=qat", *TRAINING, *SPECS[spec], *(IN_BF16 if bf16 else ())]
    return train_ours(random_model(shape), words, shape, sizes(asked))


CASES: dict[str, Case] = {}
for _name, _shape in SHAPES.items():
    CASES[f"{_name}:bf16"] = partial(fine_tuning, shape=_shape, precision="bf16-true")
    CASES[f"{_name}:fp32"] = partial(fine_tuning, shape=_shape, precision="bf16-mixed")
    for _spec in SPECS:
        CASES[f"{_name}:{_spec}"] = partial(quantized, shape=_shape, spec=_spec, bf16=False)
        CASES[f"{_name}:{_spec}:bf16"] = partial(quantized, shape=_shape, spec=_spec, bf16=True)

if __name__ == "__main__":
    quiet()
    run(__doc__, CASES)
