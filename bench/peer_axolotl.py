"""axolotl's own trainer on the rows of `bench.train`: its fused LoRA kernels, Liger's, and PyTorch's attention under a
mask of blocks, since it leaves varlen attention out for models with sliding windows.

    python -m bench.peer_axolotl MODEL [nf4]

Written against axolotl 0.19.0, which pins other versions than requirements.txt: `bench.train` runs it with
AXOLOTL_SITE, a folder of its packages, before its own. Rows come as tokens, as `trl` gets them, in packs of 2,048, the
longest row's and TRL's, since the masks of longer ones would cost most; as many a step as make about a step of
lorepro's. No evaluation, no gradient checkpointing. Prints one line, RESULT and JSON.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.integrations.base import BasePlugin

from bench.train import MODELS, PEERS_MEASURED, ROWS_A_STEP, WARM, Marks, figures, folder_of, rows, tokenizer

TOKENS_PER_PACK, PACKS_A_STEP = 2048, 8
PADDING = 0
marks = Marks()
tokens: list[torch.Tensor] = []  # of each step, those that are no padding
losses: list[dict] = []


class Read(BasePlugin):
    """Counts a step's tokens and reads what the trainer logs."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        plain = trainer.training_step

        def counted(model, inputs, *more, **options):
            if len(tokens) == len(marks.times):
                tokens.append(0)
            tokens[-1] = tokens[-1] + (inputs["input_ids"] != PADDING).sum()
            return plain(model, inputs, *more, **options)

        trainer.training_step = counted
        marks.on_log = lambda args, state, control, logs=None, **_: losses.append(logs)
        return [marks]


def settings(model: str, nf4: bool, scratch: Path) -> dict:
    on_gpu = torch.cuda.is_available()
    folder = folder_of(model)
    tokenizer().save_pretrained(scratch / "tokenizer")
    with (scratch / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows(4 * ROWS_A_STEP * (WARM + PEERS_MEASURED), MODELS[model].vocab_size):
            kept = {key: row[key] for key in ("input_ids", "labels")}
            file.write(json.dumps(kept | {"attention_mask": [1] * len(row["input_ids"])}) + "\n")
    kernels = {f"lora_{name}_kernel": on_gpu for name in ("mlp", "qkv", "o")}
    liger = {f"liger_{name}": True for name in ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")}
    plugins = ["bench.peer_axolotl.Read", *(["axolotl.integrations.liger.LigerPlugin"] if on_gpu else [])]
    return {
        "base_model": str(folder),
        "tokenizer_config": str(scratch / "tokenizer"),
        "datasets": [{"path": str(scratch / "rows.jsonl"), "ds_type": "json"}],
        "dataset_prepared_path": str(scratch / "prepared"),
        "output_dir": str(scratch / "out"),
        "adapter": "qlora" if nf4 else "lora",
        "load_in_4bit": nf4,
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "lora_target_linear": True,
        **kernels,
        **(liger if on_gpu else {}),
        "plugins": plugins,
        "attn_implementation": "sdpa",
        "sequence_len": TOKENS_PER_PACK,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "micro_batch_size": PACKS_A_STEP if on_gpu else 1,
        "gradient_accumulation_steps": 1,
        "max_steps": WARM + PEERS_MEASURED,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch_fused",
        "bf16": on_gpu,
        "gradient_checkpointing": False,
        "logging_steps": (WARM + PEERS_MEASURED) // 2,
        "save_strategy": "no",
        "val_set_size": 0,
        "special_tokens": {"pad_token": "<pad>"},
    }


def main(model: str, *quantized: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "config.yaml").write_text(json.dumps(settings(model, quantized == ("nf4",), scratch)))
        do_train(load_cfg(str(scratch / "config.yaml")), TrainerCliArgs())
    last = {key: value for log in losses if "loss" in log for key, value in log.items()}
    found = figures(marks, [int(count) for count in tokens], model)
    found.pop("peak_gib", None)  # axolotl sets PyTorch's count back whenever it logs
    print("RESULT " + json.dumps(found | {"loss": float(last["loss"]), "gradient_norm": float(last["grad_norm"])}))


if __name__ == "__main__":
    # under this name, since the plugin is found by it, and what it counts must be what is printed here
    from bench import peer_axolotl

    peer_axolotl.main(*sys.argv[1:])
