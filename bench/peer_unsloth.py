"""Unsloth's own way, one script as its notebooks have it: a model and rows of text in, an adapter out.

    python -m bench.peer_unsloth BASE TEXTS.jsonl OUT [nf4]

Written against unsloth 2026.10.9, for `bench.train_stage`. Rows are text that it tokenizes itself, and the loss counts
every token: this leaves on what makes it fast, batches without padding, which it gives up for rows that are tokens
already. No evaluation, no gradient checkpointing. Prints one line, RESULT and JSON; its times are those of the clock.
"""

import unsloth  # noqa: F401, I001 - before transformers and TRL, which it patches

import json
import sys
import time

import pyarrow.compute
import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from unsloth import FastModel

LONGEST_TOKENS = 2048
ROWS_A_STEP = 48


class FirstStep(TrainerCallback):
    ended = None

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ended = time.time()


def main(base: str, texts: str, out: str, *quantized: str) -> None:
    imported = time.time()
    model, tokenizer = FastModel.from_pretrained(
        model_name=base,
        max_seq_length=LONGEST_TOKENS,
        dtype=torch.bfloat16,
        load_in_4bit=quantized == ("nf4",),
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
        "padding_free": bool(getattr(trainer.args, "padding_free", False)),
        "ends": {"imports": imported, "load": loaded, "tokenize": tokenized, "train": trained, "save": saved},
    }
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["device"] = torch.cuda.get_device_name()
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
