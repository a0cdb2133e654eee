"""Tokens a second, memory and first step of LoRA training: this project's and its peers', each in its own process.

    python -m bench.train OUT.json MODEL VARIANT [VARIANT …]

Weights are random, since the arithmetic is the same: what is measured is speed. Rows have lognormal lengths, median
300, at most 2048, and the loss counts the last quarter of each. The first variant runs again at the end, to show drift.
axolotl and axolotl-nf4 are bench/peer_axolotl.py, with the packages of the folder AXOLOTL_SITE before others; unsloth
and unsloth-nf4 bench/peer_unsloth.py, with those of UNSLOTH_SITE, and TOKENIZER, a folder with Gemma 3's tokenizer.
"""

import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

SCRATCH = Path(tempfile.gettempdir()) / "lorepro-bench"
ROWS_A_STEP = 48
WARM = 12
MEASURED = {"gemma2-9b": 20, "gemma3-27b": 20}  # steps after the warm ones; of smaller models 100
PEERS_MEASURED = 20  # which record nothing
LONGEST_SECONDS = {"unsloth": 300, "unsloth-nf4": 300}  # that compiles for minutes
TOKENS_PER_PACK = {"ours-smaller-packs": 8192}
PEAK_TFLOPS = 790  # of an 8192³ product in bfloat16 on an H100 and an H200, read there

GEMMA3 = {"vocab_size": 262144, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512}
MODELS = {
    "tiny": Gemma3TextConfig(
        **{**GEMMA3, "vocab_size": 4096, "head_dim": 32},
        hidden_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=128,
    ),
    "tiniest": Gemma3TextConfig(
        **{**GEMMA3, "vocab_size": 4096, "head_dim": 32, "sliding_window": 64},
        hidden_size=64,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=128,
    ),
    "gemma3-270m": Gemma3TextConfig(
        **GEMMA3,
        hidden_size=640,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=2048,
    ),
    "gemma3-1b": Gemma3TextConfig(
        **GEMMA3,
        hidden_size=1152,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=6912,
    ),
    "gemma3-4b": Gemma3TextConfig(
        **{**GEMMA3, "sliding_window": 1024},
        hidden_size=2560,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=10240,
    ),
    "gemma3-27b": Gemma3TextConfig(
        **{**GEMMA3, "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024},
        hidden_size=5376,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        intermediate_size=21504,
    ),
    "gemma2-9b": Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        intermediate_size=14336,
        query_pre_attn_scalar=256,
    ),
}


def rows(count: int, vocabulary: int) -> list[dict]:
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(np.log(300), 0.6, count).astype(int), 32, 2048)
    made = []
    for number, length in enumerate(lengths.tolist()):
        ids = chance.integers(1000, vocabulary, length).tolist()
        prompt = length - length // 4
        labels = [-100] * prompt + ids[prompt:]
        made.append({"id": str(number), "input_ids": ids, "labels": labels, "prompt_tokens": prompt})
    return made


def steps_of(model: str) -> int:
    """That lorepro makes."""
    return WARM + MEASURED.get(model, 100)


def floor(config, row_lengths: list[int]) -> tuple[float, float]:
    """FLOP a token that training with frozen weights cannot do without, loss on a quarter of the tokens; and with the
    loss on every token, as field figures of peers count it."""
    attended = sum(n * n / 2 for n in row_lengths) / sum(row_lengths)
    h, i = config.hidden_size, config.intermediate_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = 4 * (2 * h * q + 2 * h * k + 3 * h * i)  # forward, and backward to the activations: 2 FLOP a weight each
    attention = 3.5 * 4 * q * attended
    head = 4 * config.vocab_size * h
    body = config.num_hidden_layers * (layer + attention)
    return body + head / 4, body + head


def folder_of(name: str) -> Path:
    folder = SCRATCH / name
    if not (folder / "config.json").exists():
        config = MODELS[name]
        kind = Gemma2ForCausalLM if isinstance(config, Gemma2Config) else Gemma3ForCausalLM
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = kind(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
    return folder


def drawn(name: str, device: str, dtype: torch.dtype, quantize: str | None, ranks):
    """A model of that shape, whose layers the processes share. Each weight is drawn by its name, so that all draw the
    same; what 27 billion take on a disk is not needed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from stages.models.attention import PACKED
    from stages.models.sharded import Sharded

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(MODELS[name], dtype=dtype, attn_implementation=PACKED)
    model.tie_weights()  # init_empty_weights has made two of one
    for path, buffer in list(model.named_buffers()):
        module, _, leaf = path.rpartition(".")
        model.get_submodule(module).register_buffer(leaf, buffer.to(device), persistent=False)

    def read(path: str) -> torch.Tensor:
        draw = torch.Generator(device).manual_seed(zlib.crc32(path.encode()))
        return torch.randn(model.get_parameter(path).shape, generator=draw, device=device, dtype=dtype) * 0.02

    return model.eval(), Sharded(model, read, quantize, ranks)


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 3}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>")


class Marks(TrainerCallback):
    """When each step ended, as the processor saw it: while the GPU is what it waits for, as the GPU did."""

    def __init__(self):
        self.began = time.monotonic()
        self.times = []

    def on_train_begin(self, args, state, control, **_):
        self.began = time.monotonic()  # the model is drawn, written and loaded before

    def on_step_end(self, args, state, control, **_):
        if state.global_step in (1, state.max_steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())

    def rate(self, tokens: list[int]) -> float:
        """Tokens a second of the median step after the warm ones; tokens: of each step."""
        warm = min(WARM, len(tokens) // 2)
        pairs = zip(tokens[warm:], self.times[warm - 1 :], self.times[warm:], strict=False)
        return statistics.median(count / (end - start) for count, start, end in pairs)


def ours(
    model: str,
    quantize: str | None = None,
    tokens_per_pack: int | str = "auto",
    profiled: bool = False,
    rows_a_step: int = ROWS_A_STEP,
    ranks=None,
    shard_base: bool = False,
    deterministic: bool = False,
    dropout: float = 0.0,
    optimizer: str = "adamw",
) -> dict:
    """shard_base: the processes of `ranks` share the base, whose weights are drawn as they are asked for.
    deterministic: as machine.deterministic; `adapter` in the result tells whether two runs gave the same bytes."""
    from stages import train
    from stages.models.checkpoints import Run
    from stages.models.compiled import compile_pieces
    from stages.models.fused import fuse
    from stages.models.load import load_model
    from stages.models.lora import add_adapters
    from stages.models.machine import add_in_one_order, resolve
    from stages.models.ranks import ALONE
    from stages.params import load

    if deterministic:
        add_in_one_order()
    marks = Marks()
    params = load()
    there = {"dtype": "bfloat16", "device": "auto", "devices": 1, "tokens_per_pack": tokens_per_pack}
    machine = resolve(params.machine.model_copy(update=there))
    lora = params.lora.model_copy(update={"r": 16, "alpha": 16.0, "dropout": dropout, "quantize": quantize})
    layers = None
    if shard_base:
        base, layers = drawn(model, machine.device, machine.dtype, quantize, ranks)
    else:
        base = load_model(folder_of(model), machine.device, machine.dtype, quantize=quantize)
    adapted = add_adapters(base, lora, 0)
    fuse(adapted)
    if machine.device == "cuda":
        compile_pieces(adapted.get_base_model())
    made = rows(rows_a_step * steps_of(model), MODELS[model].vocab_size)
    once = {"epochs": 1.0, "batch_size": rows_a_step, "order": "shuffled", "validations": 1}
    plain = {
        "optimizer": optimizer,
        "learning_rate": 1e-4,
        "lora_plus_ratio": 1.0,
        "schedule": "constant",
        "warmup_ratio": 0.0,
    }
    settings = params.train.model_copy(update=once | plain)
    scratch = tempfile.mkdtemp()
    run = Run(Path(scratch) / "checkpoints", 10**6)
    trainer = train.Trainer(
        adapted, tokenizer(), settings, machine, made, made[:2], scratch, run, None, ranks or ALONE, layers
    )
    trainer.add_callback(marks)
    if profiled:
        trainer.add_callback(Profile())
    trainer.train()
    counted = [sum(len(made[i]["input_ids"]) for i in one["rows"]) for one in trainer.train_dataset]
    return figures(marks, counted, model) | {
        "loss": [round(point["loss"], 4) for point in trainer.history if "loss" in point][-1],
        "gradient_norm": [point["gradient_norm"] for point in trainer.history if "loss" in point][-1],
        "adapter": hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in trainer.adapters)).hexdigest(),
    }


class Profile(TrainerCallback):
    """Where two steps spend the GPU's time, printed, and as a trace, in the folder that PROFILE names."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == WARM + 14:
            torch.cuda.synchronize()
            kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profile = torch.profiler.profile(activities=kinds)
            self.profile.__enter__()
            self.began = time.monotonic()
        if state.global_step == WARM + 16:
            torch.cuda.synchronize()
            print(f"two steps: {time.monotonic() - self.began:.3f} s", file=sys.stderr)
            self.profile.__exit__(None, None, None)
            self.profile.export_chrome_trace(os.environ.get("PROFILE", str(SCRATCH)) + "/trace.json.gz")
            table = self.profile.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=32, max_name_column_width=70
            )
            for line in table.splitlines():
                print(line[:72] + line[-75:] if len(line) > 150 else line, file=sys.stderr)


def trl(model: str, quantized: bool, **settings) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    attention = settings.pop("attention")
    steps = settings.pop("steps", WARM + PEERS_MEASURED)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    folder = folder_of(model)
    marks = Marks()
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        attn_implementation=attention,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=nf4 if quantized else None,
    )
    made = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
        for row in rows(1200, MODELS[model].vocab_size)
    ]
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        bf16=True,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        max_steps=steps,
        logging_steps=steps // 2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = SFTTrainer(
        model=loaded,
        args=arguments,
        train_dataset=Dataset.from_list(made),
        processing_class=tokenizer(),
        callbacks=[marks, counter := Counter()],
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    counter.trainer = trainer
    trainer.train()
    log = trainer.state.log_history
    counted = [after - before for before, after in itertools.pairwise([0, *counter.seen])]
    return figures(marks, counted, model) | {
        "loss": [point["loss"] for point in log if "loss" in point][-1],
        "gradient_norm": [point["grad_norm"] for point in log if "grad_norm" in point][-1],
    }


class Counter(TrainerCallback):
    """Tokens that TRL has counted by the end of each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **_):
        self.seen.append(int(self.trainer._total_train_tokens))


def figures(marks: Marks, tokens: list[int], model: str) -> dict:
    lengths = [len(row["input_ids"]) for row in rows(1000, 2000)]
    needed, every = floor(MODELS[model], lengths)
    rate = marks.rate(tokens)
    warm = min(WARM, len(tokens) // 2)
    whole = sum(tokens[warm:]) / (marks.times[-1] - marks.times[warm - 1])
    found = {
        "tokens_per_second": round(rate),
        "tokens_per_second_with_recording": round(whole),
        "first_step_seconds": round(marks.times[0] - marks.began, 1),
        "tflops": round(rate * needed / 1e12, 1),
        "tflops_loss_on_all": round(rate * every / 1e12, 1),
    }
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["mfu"] = round(rate * every / 1e12 / PEAK_TFLOPS, 3)
        found["device"] = torch.cuda.get_device_name()
    return found


VARIANTS = {
    "ours": lambda model: ours(model),
    "ours-nf4": lambda model: ours(model, quantize="nf4"),
    **{name: partial(ours, tokens_per_pack=tokens) for name, tokens in TOKENS_PER_PACK.items()},
    "ours-int8": lambda model: ours(model, quantize="int8", optimizer="adamw_8bit"),
    "ours-dropout": lambda model: ours(model, dropout=0.05),
    "ours-deterministic": lambda model: ours(model, deterministic=True),
    "ours-profiled": lambda model: ours(model, profiled=True),
    "trl": lambda model: trl(
        model,
        False,
        attention="sdpa",
        per_device_train_batch_size=4,
        max_length=2048,
        packing=True,
        gradient_checkpointing=False,
    ),
    # Gemma 2's bounded scores: torch's own attention leaves the bound out, and rows of a pack see each other
    **{
        name: partial(
            trl,
            quantized=False,
            attention="eager",
            per_device_train_batch_size=rows_at_once,
            max_length=2048,
            gradient_checkpointing=checkpointing,
        )
        for name, rows_at_once, checkpointing in (("trl-eager", 1, False), ("trl-eager-checkpointed", 4, True))
    },
    "trl-nf4": lambda model: trl(
        model,
        True,
        attention="sdpa",
        per_device_train_batch_size=4,
        max_length=2048,
        packing=True,
        gradient_checkpointing=True,
    ),
    "tutorial": lambda model: trl(
        model,
        True,
        attention="eager",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        steps=12,
        max_length=512,
        packing=True,
        gradient_checkpointing=True,
    ),
}
# peers that pin other versions, with the variable that names their packages' folder
APART = {
    "axolotl": ("AXOLOTL_SITE", ["bench.peer_axolotl"], []),
    "axolotl-nf4": ("AXOLOTL_SITE", ["bench.peer_axolotl"], ["nf4"]),
    "unsloth": ("UNSLOTH_SITE", ["bench.peer_unsloth", "rate"], []),
    "unsloth-nf4": ("UNSLOTH_SITE", ["bench.peer_unsloth", "rate"], ["nf4"]),
}


def main(arguments: list[str]) -> None:
    if arguments[0] == "one":
        random.seed(0)
        print("RESULT " + json.dumps(VARIANTS[arguments[2]](arguments[1])))
        return
    from stages.outputs import write_json

    out, model, *names = arguments
    found = []
    for name in [*names, names[0]] if len(names) > 1 else names:
        asked, there = ["bench.train", "one", model, name], dict(os.environ)
        if name in APART:
            site, module, options = APART[name]
            asked = [*module, model, *options]
            paths = [os.environ.get(site), os.environ.get("PYTHONPATH")]
            silent = {"AXOLOTL_DO_NOT_TRACK": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
            there |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **silent}
        began = time.monotonic()
        command = ["timeout", str(LONGEST_SECONDS.get(name, 150)), sys.executable, "-m", *asked]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=there)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        missing = {"missing": f"exit status {done.returncode}: {done.stderr[-1500:]}"}
        result = json.loads(lines[0][7:]) if lines else missing
        found.append({"variant": name, "model": model, **result})
        print(json.dumps(found[-1]), f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        write_json(Path(out), found)


if __name__ == "__main__":
    main(sys.argv[1:])
