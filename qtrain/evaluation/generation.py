"""Text from a model: greedy, beam search or sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qtrain.errors import DataError, ModelError
from qtrain.evaluation.config import GenerateSection
from qtrain.evaluation.inference import device_of, evaluating
from qtrain.evaluation.progress import progress
from qtrain.modules.growing_keys import growing_keys
from qtrain.modules.kv.cache import quantized_cache
from qtrain.modules.kv.prepare import kv_quantizers


@dataclass(frozen=True)
class Generation:
    """One answer: ``tokens`` are the new ids without the ending one; ``finished`` if the model ended by itself."""

    prompt: str
    text: str
    tokens: list[int]
    finished: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    section: GenerateSection,
    *,
    batch_size: int = 16,
) -> list[Generation]:
    """Continue or answer each prompt as ``section`` says, in the order given.

    A model with quantized keys and values decodes with a cache of their codes.
    The same seed gives the same text, and nothing is left behind: the state of the global random generators, the
    model's modes and its generation config are as before. ``section.prompt`` is not read.

    Args:
        model: causal LM of transformers or PEFT.
        tokenizer: its tokenizer.
        prompts: plain texts; each becomes a user's turn where the chat template applies.
        section: strategy and its settings; the checkpoint's own sampling defaults do not leak in.
        batch_size: prompts decoded together, padded on the left.

    Raises:
        ModelError: ``section.chat`` is true and the tokenizer has no template.
        DataError: a prompt has no token.
    """
    encoded = [_encode(tokenizer, prompt, section.chat) for prompt in prompts]
    answers = generate_ids(model, tokenizer, encoded, section, batch_size=batch_size)
    return [replace(answer, prompt=prompt) for answer, prompt in zip(answers, prompts, strict=True)]


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[list[int]],
    section: GenerateSection,
    *,
    batch_size: int = 16,
) -> list[Generation]:
    """The same for prompts that are token ids already; ``Generation.prompt`` is their text."""
    # The penalty also counts the padding's token, which for many models is the one that ends a text: alone, no padding.
    size = 1 if section.repetition_penalty != 1 else batch_size
    batches = [range(begin, min(begin + size, len(encoded))) for begin in range(0, len(encoded), size)]
    ends = _ending_tokens(model, tokenizer)
    config = decoding(section, ends, _padding_token(tokenizer, ends))
    generations = []
    with evaluating(model), _seeded(section.seed, device_of(model)), _only(config, model):
        for batch in progress(batches, "generating"):
            ids, mask = _left_padded([encoded[i] for i in batch], config.pad_token_id, device_of(model))
            with _cache(model) as cache, growing_keys():
                output = model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, generation_config=config, **cache
                )
            for i, new in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(new) if token in ends), None)
                text = tokenizer.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                prompt = str(tokenizer.decode(encoded[i]))
                generations.append(Generation(prompt, str(text), new[:end], end is not None))
    return generations


def decoding(section: GenerateSection, ends: Sequence[int], pad: int) -> GenerationConfig:
    """The transformers config for a section: only the keys of the chosen strategy are set."""
    settings: dict[str, Any] = {
        "max_new_tokens": section.max_new_tokens,
        "repetition_penalty": section.repetition_penalty,
        "do_sample": section.strategy == "sample",
        "num_beams": section.num_beams if section.strategy == "beam" else 1,
        "eos_token_id": list(ends) or None,
        "pad_token_id": pad,
        "use_cache": True,
    }
    if section.strategy == "sample":
        settings |= {"temperature": section.temperature, "top_k": section.top_k, "top_p": section.top_p}
    return GenerationConfig(**settings)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> list[int]:
    """Ids of a prompt, as a user's turn that awaits its answer where the chat template applies."""
    if chat and not tokenizer.chat_template:
        raise ModelError(
            "generate.chat=true, and the tokenizer has no chat template",
            fix="generate.chat=false to continue the bare text, or a tokenizer with a template",
        )
    ids: list[int]
    if chat or (chat is None and tokenizer.chat_template):
        turn = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no token", fix="a prompt with text")
    return ids


def _ending_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the checkpoint's (chat models name several) and the tokenizer's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if named is None else [named] if isinstance(named, int) else list(named)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def _padding_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """Any id will do where attention is masked and output is cut at the first ending token."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if ends else 0


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B, longest row]; padding on the left, so that all rows go on at the same column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@contextmanager
def _cache(model: nn.Module) -> Iterator[dict[str, Cache]]:
    """A cache of codes as ``generate`` takes it, where keys or values are quantized; else transformers' own."""
    if not any(quantizer.enabled for _, quantizer in kv_quantizers(model)):
        yield {}
        return
    with quantized_cache(model) as cache:
        yield {"past_key_values": cache}


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The random generators of the CPU and of ``device`` at ``seed``; afterwards as they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # torch.manual_seed would also seed the devices that are not put back.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _only(config: GenerationConfig, model: nn.Module) -> Iterator[None]:
    """Let ``config`` stand alone: transformers fills what it leaves open from the checkpoint's own defaults."""
    held = {module: module.generation_config for module in model.modules() if "generation_config" in vars(module)}
    try:
        for module in held:
            module.generation_config = config  # type: ignore[assignment]
        yield
    finally:
        for module, own in held.items():
            module.generation_config = own
