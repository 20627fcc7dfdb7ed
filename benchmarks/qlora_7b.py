"""QLoRA of a 7B Llama shape: `qtrain fit recipe=qlora_llama` beside transformers + peft + bitsandbytes, in one run.

    python benchmarks/qlora_7b.py DIR TEXT [tiny]

Random weights (speed and memory do not depend on them), made once in DIR; micro-batches of 4 x 2048 tokens, r 64 on
every linear, dropout 0.1 on both sides, paged 8-bit AdamW, full recomputation on both sides. Prints a JSON line each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, WARM = 14, 4


def make(directory: str, text: str, tiny: bool) -> None:
    """A random-weight checkpoint with a small byte-level tokenizer trained on the text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([text], trainers.BpeTrainer(vocab_size=4000, special_tokens=["</s>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(directory)
    config = LlamaConfig(**(TINY if tiny else SHAPE), vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory, max_shard_size="4GB")


def peer(directory: str, text: str, length: int) -> None:
    """The same work as most people write it today."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    place = {"": 0 if on_gpu else "cpu"}
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        directory, device_map=place, dtype=dtype, quantization_config=quantization
    )
    loaded = time.perf_counter() - begin
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, target_modules=TARGETS))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(trained, lr=2e-4)
    times = []
    device = "cuda" if on_gpu else "cpu"
    for step in range(STEPS):
        ids = torch.randint(0, 4000, (4, length), device=device)
        synchronize(on_gpu)
        begin = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=on_gpu):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(on_gpu)
        times.append(time.perf_counter() - begin)
        if step == WARM - 1 and on_gpu:
            torch.cuda.reset_peak_memory_stats()
    median = sorted(times[WARM:])[len(times[WARM:]) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    print(
        "RESULT",
        json.dumps(
            {
                "case": "transformers + peft + bitsandbytes",
                "tokens_per_second": round(4 * length / median),
                "peak_gib": peak,
                "load_s": round(loaded, 1),
            }
        ),
        flush=True,
    )


def ours(directory: str, text: str, length: int) -> None:
    """The command a user types; the figures are its own, of fit.json."""
    words = [
        *("fit", "recipe=qlora_llama", f"model.path={directory}", f"data.train={text}", "data.validation=null"),
        *(f"data.max_length={length}", "trainer.accumulate_grad_batches=1", f"trainer.max_steps={STEPS}"),
        *("run.dir=runs/qlora_7b", "run.overwrite=true", "run.save_every=0"),
    ]
    print("$ qtrain", *words, flush=True)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qtrain", *words], check=True)
    fit = json.loads(Path("runs/qlora_7b/fit.json").read_text())
    keep = {key: fit[key] for key in ("tokens_per_second", "peak_gib", "mfu", "train_seconds", "device")}
    print(
        "RESULT", json.dumps({"case": "qtrain fit", **keep, "seconds": round(time.perf_counter() - begin)}), flush=True
    )


def synchronize(on_gpu: bool) -> None:
    """Wait for the device."""
    if on_gpu:
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] in ("make", "peer"):
        case, directory, text, *rest = arguments
        tiny = "tiny" in rest
        make(directory, text, tiny) if case == "make" else peer(directory, text, 64 if tiny else 2048)
    else:
        directory, text, *rest = arguments
        for case in ("make", "peer"):
            subprocess.run([sys.executable, __file__, case, directory, text, *rest], check=True)
        ours(directory, text, 64 if rest else 2048)
        subprocess.run([sys.executable, __file__, "peer", directory, text, *rest], check=True)
