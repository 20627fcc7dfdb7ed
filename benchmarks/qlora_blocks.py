"""One layer of the Llama-2-7B shape with LoRA r 64 over a frozen base: as PEFT runs it, and as blocks.

    python benchmarks/qlora_blocks.py [OUT.md] [--tiny] [--bases nf4 int8 packed none] [--tokens 8192] [--liger]

Forward and backward of the whole layer and of its MLP alone, in bf16 under autocast on a GPU, in fp32 without; medians
of rounds in which all rows take turns. Saved are the bytes that autograd holds beyond inputs and parameters, peak what
the GPU's allocator held at most beyond what lay there before. --liger puts liger-kernel's norm, RoPE and SwiGLU under
both sides. Without a GPU times are those of all threads together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qtrain.models.fused import fuse_layers
from qtrain.modules.frozen_linear import linears, quantize_base
from qtrain.modules.fused_blocks import fuse_blocks
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
CONTEXT = partial(torch.autocast, DEVICE.type, dtype=torch.bfloat16, enabled=ON_GPU)


def layer_of(base: str, dropout: float, asked: str, arguments: argparse.Namespace) -> tuple[PreTrainedModel, str]:
    """A decoder of one layer, and what runs in it."""
    torch.manual_seed(0)
    shape = TINY if arguments.tiny else SHAPE
    with DEVICE:
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, vocab_size=256)).to(DTYPE)
    model.requires_grad_(False)
    if base == "packed":
        spec = QuantSpec("int4", True, "per_group", 64)
        for name, linear in list(linears(model)):
            qparams = choose_qparams(linear.weight.detach().float(), spec)
            codes = quantize(linear.weight.detach().float(), qparams, spec)
            packed = PackedLinear.from_record(LinearRecord(codes, qparams.scale, qparams.zero_point, spec))
            model.set_submodule(name, packed)
    elif base != "none":
        quantize_base(model, base, double_quant=True, compute_dtype=DTYPE, device=DEVICE)
    if arguments.liger:
        fuse_layers(model, DEVICE, "auto")
    rank = 8 if arguments.tiny else 64
    names = [name for name, _ in linears(model)]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=names))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    adapted.train()
    return model, fuse_blocks(model, CONTEXT, asked)


def saved_bytes(run: Callable[[], Tensor], model: nn.Module, x: Tensor) -> int:
    seen = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()  # held until all is counted: memory that is free again would be counted as the same
    del y
    return total


def timed(run: Callable[[], Tensor], upper: Tensor) -> float:
    """ms of a forward and backward."""
    if not ON_GPU:  # time of this process alone, whatever else the machine does
        begin = time.process_time()
        run().backward(upper)
        return 1e3 * (time.process_time() - begin)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run().backward(upper)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def peak_bytes(run: Callable[[], Tensor], upper: Tensor) -> int | None:
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run().backward(upper)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small layer of few tokens")
    parser.add_argument("--bases", nargs="+", default=["nf4"], choices=["nf4", "fp4", "int8", "packed", "none"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--liger", action="store_true")
    arguments = parser.parse_args()
    tokens = 256 if arguments.tiny else arguments.tokens
    length = min(2048, tokens)
    width = (TINY if arguments.tiny else SHAPE)["hidden_size"]
    x = torch.randn(tokens // length, length, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    upper = torch.randn_like(x)
    lines = [
        f"| {'base':<6} | {'dropout':>7} | {'part':<5} | {'as':<13} | {'ms':>9} | {'PEFT / it':>9} "
        f"| {'saved MiB':>9} | {'peak MiB':>8} |",
        f"|{'-' * 8}|{'-' * 9}|{'-' * 7}|{'-' * 15}|{'-' * 11}|{'-' * 11}|{'-' * 11}|{'-' * 10}|",
    ]
    notes: dict[str, None] = {}
    ways = {"PEFT": "none", "blocks": "auto"}
    for base in arguments.bases:
        for dropout in (0.0, 0.05):
            runs: dict[tuple[str, str], Callable[[], Tensor]] = {}
            models = {}
            for way, asked in ways.items():
                models[way], words = layer_of(base, dropout, asked, arguments)
                notes[f"{way}: {words}"] = None
                runs["layer", way] = partial(decoded, models[way], x)
                runs["MLP", way] = partial(mlp_of, models[way], x)
            times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
            for turn in range(arguments.rounds + 3):
                for key, run in runs.items():
                    taken = timed(run, upper)
                    if turn >= 3:  # the first compile, and fill the allocator
                        times[key].append(taken)
            for part in ("layer", "MLP"):
                for way in ways:
                    run, middle = runs[part, way], statistics.median(times[part, way])
                    saved, peak = saved_bytes(run, models[way], x), peak_bytes(run, upper)
                    ratio = statistics.median(times[part, "PEFT"]) / middle
                    lines.append(
                        f"| {base:<6} | {dropout:>7} | {part:<5} | {way:<13} | {middle:>9.3f} | {ratio:>9.2f} "
                        f"| {saved / 2**20:>9.2f} | {'-' if peak is None else f'{peak / 2**20:.1f}':>8} |"
                    )
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    lines += ["", f"{tokens} tokens, {where}, torch {torch.__version__}", *(f"- {note}" for note in notes)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def decoded(model: PreTrainedModel, x: Tensor) -> Tensor:
    with CONTEXT():
        y: Tensor = model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state
    return y


def mlp_of(model: PreTrainedModel, x: Tensor) -> Tensor:
    mlp = model.get_decoder().layers[0].mlp
    assert isinstance(mlp, nn.Module)
    with CONTEXT():
        y: Tensor = mlp(x)
    return y


if __name__ == "__main__":
    main()
