"""A model's folder and prompts in; greedy answers out by vLLM, which fills the place of an answer that ends at once.

vLLM is no requirement of this project: machine.engine names it where somebody has installed it.
"""

import os
from collections.abc import Callable
from pathlib import Path

from stages.models.generate import Answer


def answer(
    folder: Path,
    device: str,
    dtype: str,
    prompts: list[list[int]],
    stops: set[int],
    max_new_tokens: int,
    complete: Callable[[list[int]], bool],
) -> list[Answer]:
    """What `generate` gives, to rounding; to be called in a process of its own, whose settings it changes and whose
    end frees the memory. `device` is cpu or cuda:N; `dtype` a name that torch knows."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # it would start one more process, whose end it waits for
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device.startswith("cuda:"):
        # read at torch's first call of CUDA, of which this process has made none
        number = int(device.removeprefix("cuda:"))
        there = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = there.split(",")[number] if there else str(number)
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(
        str(folder),
        dtype=dtype,
        seed=0,
        max_model_len=max(map(len, prompts)) + max_new_tokens,
        generation_config="vllm",  # and not the folder's, which may sample
        trust_remote_code=False,
        disable_log_stats=True,
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=max_new_tokens, stop_token_ids=sorted(stops), ignore_eos=True, detokenize=False
    )
    found = model.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], greedy, use_tqdm=False)
    return [ended(list(one.outputs[0].token_ids), stops, complete) for one in found]


def ended(tokens: list[int], stops: set[int], complete: Callable[[list[int]], bool]) -> Answer:
    """The answer as `generate` would have left it: without its terminator, cut where it is complete."""
    stopped = bool(tokens) and tokens[-1] in stops
    if stopped:
        tokens = tokens[:-1]
    for end in range(1, len(tokens) + 1):
        if complete(tokens[:end]):
            return Answer(tokens[:end], False)
    return Answer(tokens, stopped)
