"""Run with vLLM's CPU build, in an environment of its own: load directories, and hand out what they compute.

Each argument is DTYPE:DIRECTORY; DIRECTORY.json gets log probabilities of each prompt and 48 greedy tokens after it, or
the error.
"""

import gc
import json
import os
import sys

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

PROMPTS = [[*range(first, first + 20)] for first in (5, 30, 100, 200)]
WORDS = 512


def answer(directory: str, dtype: str) -> dict[str, object]:
    """What vLLM makes of one directory."""
    llm = LLM(
        directory,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=1,
        max_logprobs=WORDS,
    )
    greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False, prompt_logprobs=WORDS)
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    known = [
        [[position[token].logprob for token in range(WORDS)] for position in result.prompt_logprobs[1:]]
        for result in results
    ]
    return {"logprobs": known, "tokens": [list(result.outputs[0].token_ids) for result in results]}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        dtype, _, directory = argument.partition(":")
        try:
            found = answer(directory, dtype)
        except Exception as error:  # what it says is what is asked for
            found = {"error": f"{type(error).__name__}: {error}"}
        with open(f"{directory}.json", "w", encoding="utf-8") as file:
            json.dump(found, file)
        gc.collect()
        cleanup_dist_env_and_memory()
