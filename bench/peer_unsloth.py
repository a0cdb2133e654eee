"""Unsloth's own way, one script as its notebooks have it: a model and rows of text in, an adapter out.

    python -m bench.peer_unsloth BASE TEXTS.jsonl OUT [nf4]
    TOKENIZER=models/base python -m bench.peer_unsloth rate MODEL [nf4]

Written against unsloth 2026.10.9, for `bench.train_stage`; `rate` for `bench.train`: a shape of that, and rows of the
same lengths. Rows are text that it tokenizes itself, and the loss counts every token: this leaves on what makes it
fast, batches without padding, which it gives up for rows that are tokens already. No evaluation, no gradient
checkpointing. Prints one line, RESULT and JSON; its times are those of the clock, and `xformers` says whether it was
there, since Unsloth's attention goes by it where it can.
"""

import unsloth  # noqa: F401, I001 - before transformers and TRL, which it patches

import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.compute
import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from unsloth import FastModel

from bench.train import MODELS, PEERS_MEASURED, ROWS_A_STEP, SCRATCH, WARM, Marks, figures, folder_of, rows

LONGEST_TOKENS = 2048
XFORMERS = importlib.util.find_spec("xformers") is not None


class FirstStep(TrainerCallback):
    ended = None

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ended = time.time()


def adapted(base: str, nf4: bool):
    """The model with adapters, and its tokenizer."""
    model, tokenizer = FastModel.from_pretrained(
        model_name=base,
        max_seq_length=LONGEST_TOKENS,
        dtype=torch.bfloat16,
        load_in_4bit=nf4,
        full_finetuning=False,
        use_gradient_checkpointing=False,
    )
    model = FastModel.get_peft_model(
        model,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        random_state=0,
        use_gradient_checkpointing=False,
    )
    return model, tokenizer


def main(base: str, texts: str, out: str, *quantized: str) -> None:
    imported = time.time()
    model, tokenizer = adapted(base, quantized == ("nf4",))
    loaded = time.time()
    first = FirstStep()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=texts, split="train"),
        callbacks=[first],
        args=SFTConfig(
            dataset_text_field="text",
            max_length=LONGEST_TOKENS,
            per_device_train_batch_size=ROWS_A_STEP,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=True,
            logging_steps=0.05,  # of the steps
            save_strategy="no",
            report_to="none",
            output_dir=f"{out}-trainer",
            seed=0,
        ),
    )
    tokenized = time.time()
    trainer.train()
    trained = time.time()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = time.time()

    lengths = pyarrow.compute.list_value_length(trainer.train_dataset.data.column("input_ids"))
    points = [point for point in trainer.state.log_history if "loss" in point]
    found = {
        "rows": len(trainer.train_dataset),
        "tokens": pyarrow.compute.sum(lengths).as_py(),
        "steps": trainer.state.global_step,
        "first_step_seconds": round(first.ended - tokenized, 1),
        "loss": points[-1]["loss"],
        "gradient_norm": float(points[-1]["grad_norm"]),
        "xformers": XFORMERS,
        "padding_free": bool(getattr(trainer.args, "padding_free", False)),
        "ends": {"imports": imported, "load": loaded, "tokenize": tokenized, "train": trained, "save": saved},
    }
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["device"] = torch.cuda.get_device_name()
    print("RESULT " + json.dumps(found), flush=True)


class Counting:
    """A data collator that counts the tokens of each step."""

    def __init__(self, collator):
        self.collator, self.tokens = collator, []

    def __call__(self, batch):
        self.tokens.append(sum(len(row["input_ids"]) for row in batch))
        return self.collator(batch)

    def __getattr__(self, name):
        return getattr(self.collator, name)


def rate(shape: str, *quantized: str) -> None:
    base, files = SCRATCH / f"{shape}-words", Path(os.environ["TOKENIZER"])
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(folder_of(shape), base, copy_function=os.link)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (files / name).is_file():
            shutil.copyfile(files / name, base / name)
    spoken = AutoTokenizer.from_pretrained(base, local_files_only=True)
    words = [word for word in map(spoken.decode, range(1000, 60_000)) if word[1:].isascii() and word[1:].isalpha()]
    words = [word for word in words if word[0] == " " and len(word) > 4]  # one token each
    chance = random.Random(0)
    steps = WARM + PEERS_MEASURED
    made = rows(ROWS_A_STEP * steps, MODELS[shape].vocab_size)
    texts = ["".join(chance.choices(words, k=len(row["input_ids"]))) for row in made]
    model, tokenizer = adapted(str(base), quantized == ("nf4",))
    marks = Marks()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        callbacks=[marks],
        args=SFTConfig(
            dataset_text_field="text",
            max_length=LONGEST_TOKENS,
            per_device_train_batch_size=ROWS_A_STEP,
            max_steps=steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=True,
            logging_steps=steps // 2,
            save_strategy="no",
            report_to="none",
            output_dir=tempfile.mkdtemp(),
            seed=0,
        ),
    )
    trainer.data_collator = counting = Counting(trainer.data_collator)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    points = [point for point in trainer.state.log_history if "loss" in point]
    found = figures(marks, counting.tokens[:steps], shape)
    found |= {"loss": points[-1]["loss"], "gradient_norm": float(points[-1]["grad_norm"]), "xformers": XFORMERS}
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    rate(*sys.argv[2:]) if sys.argv[1] == "rate" else main(*sys.argv[1:])
