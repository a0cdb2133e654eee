"""How much faster test rows are answered than the tutorials do it: one call of transformers' pipeline a row.

    python -m bench.generation models/merged data/tokens/test.parquet          on a CPU, a real model
    python -m bench.generation gemma3-1b                                       on a GPU, random weights of that shape

Both in the same format, each answer to its end or to 80 tokens, the pipeline's again at the end; adds
rows_per_minute_ratio_cpu or _gpu to bench/results/evaluation.json. The pipeline answers a sample of the rows: its time
is the same for each. Random weights do not stop, so there both write all 80 tokens.
"""

import importlib.util
import json
import multiprocessing
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from stages.answers import stops_of
from stages.models import vllm_engine
from stages.models.generate import attention_for_generation, generate
from stages.models.load import load_model
from stages.models.machine import resolve
from stages.outputs import write_json
from stages.params import load

RESULTS = Path("bench/results/evaluation.json")
NEW = 80
SAMPLE = {"cpu": 16, "cuda": 12}
SHAPES = {"gemma3-1b": {"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912}}


def random_model(name: str, folder: Path) -> None:
    """Weights drawn at random in the shape, and a tokenizer that writes a token as its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = Gemma3TextConfig(
        vocab_size=262144,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        **SHAPES[name],
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Gemma3ForCausalLM(config).bfloat16()
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    vocabulary = [*special.values(), *(f"t{number}" for number in range(4, 262144))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def ours(folder: Path, machine, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Rows a minute, and the answers' tokens; the model is loaded and warm."""
    model = load_model(folder, machine.device, machine.dtype)
    model.set_attn_implementation(attention_for_generation(model))
    stops = stops_of(folder)
    generate(model, prompts[:2], stops, 4, machine.rows_per_batch)
    began = time.monotonic()
    found = generate(model, prompts, stops, NEW, machine.rows_per_batch)
    return 60 * len(prompts) / (time.monotonic() - began), [answer.tokens for answer in found]


def theirs(folder: Path, machine, texts: list[str]) -> tuple[float, list[str]]:
    """Rows a minute of one pipeline call a row, and the answers."""
    model = load_model(folder, machine.device, machine.dtype, attention="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False, "add_special_tokens": False}
    write(texts[0], **{**options, "max_new_tokens": 4})
    began = time.monotonic()
    answers = [write(text, **options)[0]["generated_text"] for text in texts]
    return 60 * len(texts) / (time.monotonic() - began), answers


def continuous(folder: Path, machine, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Rows a minute of transformers' continuous batching, and the answers' tokens in the order of the prompts."""
    model = load_model(folder, machine.device, machine.dtype, attention="sdpa")
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0
    )
    model.generate_batch(prompts[:2], generation_config=config, max_new_tokens=4)
    began = time.monotonic()
    found = model.generate_batch(prompts, generation_config=config)
    rate = 60 * len(prompts) / (time.monotonic() - began)
    by_number = sorted(found.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[1]))
    return rate, [list(one.generated_tokens) for one in by_number]


def by_vllm(folder: Path, machine, prompts: list[list[int]]) -> dict[str, float | list]:
    """vLLM from its start, which compiles, again from what it kept, and with all prompts; {} where it is missing."""
    if importlib.util.find_spec("vllm") is None:
        return {}
    device = machine.devices[0]
    seconds = []
    for some in (prompts[:2], prompts[:2], prompts):
        began = time.monotonic()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            dtype = str(machine.dtype).removeprefix("torch.")
            found = pool.submit(vllm_engine.answer, folder, device, dtype, some, stops_of(folder), NEW, never).result()
        seconds.append(time.monotonic() - began)
    first, again, whole = seconds
    return {
        "vllm_start_seconds": [round(first, 1), round(again, 1)],
        "vllm_rows_per_minute": round(60 * len(prompts) / (whole - again), 1),
        "tokens": [answer.tokens for answer in found],
    }


def never(tokens: list[int]) -> bool:
    return False


def main(arguments: list[str]) -> None:
    machine = resolve(load().machine.model_copy(update={"devices": 1}))
    with tempfile.TemporaryDirectory() as scratch:
        if arguments[0] in SHAPES:
            folder = Path(scratch)
            random_model(arguments[0], folder)
            chance = random.Random(0)
            prompts = [
                [2, *(chance.randrange(1000, 200_000) for _ in range(chance.randint(60, 300)))] for _ in range(512)
            ]
        else:
            folder = Path(arguments[0])
            rows = pyarrow.parquet.read_table(arguments[1]).to_pylist()
            prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        sample = random.Random(1).sample(range(len(prompts)), SAMPLE[machine.device])
        texts = [tokenizer.decode(prompts[i]) for i in sample]
        assert [tokenizer(text, add_special_tokens=False).input_ids for text in texts] == [prompts[i] for i in sample]
        first, answers = theirs(folder, machine, texts)
        rate, tokens = ours(folder, machine, prompts)
        last, _ = theirs(folder, machine, texts)
        batched, batched_tokens = continuous(folder, machine, prompts)
        vllm = by_vllm(folder, machine, prompts)
        stops = stops_of(folder)
        mine = [tokenizer.decode(tokens[i], skip_special_tokens=True) for i in sample]
    same = sum(a.strip() == b.strip() for a, b in zip(mine, answers, strict=True))
    alike = sum(set(a[len(b) :]) <= stops and a[: len(b)] == b for a, b in zip(batched_tokens, tokens, strict=True))
    if vllm:
        vllm["vllm_same_answers"] = sum(a == b for a, b in zip(vllm.pop("tokens"), tokens, strict=True))
    found = {
        f"rows_per_minute_ratio_{machine.device.replace('cuda', 'gpu')}": round(rate / max(first, last), 1),
        f"generation_{machine.device.replace('cuda', 'gpu')}": {
            "model": arguments[0] if arguments[0] in SHAPES else "Gemma 3 270M, tuned",
            "device": torch.cuda.get_device_name() if machine.device == "cuda" else f"{torch.get_num_threads()} cores",
            "format": str(machine.dtype).removeprefix("torch."),
            "rows": len(prompts),
            "rows_per_minute": round(rate, 1),
            "pipeline_rows": len(sample),
            "pipeline_rows_per_minute": [round(first, 1), round(last, 1)],
            "same_answers_of_the_sample": same,
            "continuous_batching_rows_per_minute": round(batched, 1),
            "continuous_batching_same_answers": alike,
            **vllm,
        },
    }
    print(json.dumps(found, indent=2))
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    write_json(RESULTS, {**known, **found})


if __name__ == "__main__":
    main(sys.argv[1:])
