"""A loss that is not finite in one of two processes ends both, with the process and the layer named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def test_nan_in_one_process_ends_both(
    words: Callable[..., tuple[str, ...]],
    methods: dict[str, tuple[str, ...]],
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """A 7 is first met in row 7, which is of the second step and the second process."""
    broken, run = tmp_path / "broken", tmp_path / "run"
    with torch.no_grad():
        tiny_llama.get_input_embeddings().weight[tiny_tokenizer.convert_tokens_to_ids("7")] = torch.nan
    tiny_llama.save_pretrained(broken)
    tiny_tokenizer.save_pretrained(broken)
    more = ("data.shuffle=false", "run.save_every=1", "trainer.devices=2", "trainer.strategy=ddp")
    line = words(run, *methods["lora"], *more, f"model.path={broken}")
    command = [sys.executable, "-W", "ignore", "-m", "qtrain", "fit", *line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-4000:]
    found = "error process 1: the loss is nan at step 1 (epoch 0, batch 1); first output that is not finite: "
    assert found in done.stderr and "Traceback" not in done.stderr, done.stderr[-4000:]
    assert "embed_tokens (nan), whose weight is not finite either" in done.stderr
    good = run / "checkpoints" / "step-000001.ckpt"
    assert good.exists() and f"the last good checkpoint is {good}" in done.stderr
    assert not (run / "fit.json").exists()
