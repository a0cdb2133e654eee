"""A Gemma 3 so small that a test takes no time, and the repository's own params.yaml with a few values changed."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ruamel.yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on weights this small, more threads only wait for one another

ROOT = Path(__file__).parent.parent
collect_ignore = [] if importlib.util.find_spec("torch_xla") else ["tpu"]  # make test-tpu
TEMPLATE = ROOT / "stages/models/templates/gemma3.jinja"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
TEXTS = [
    "Quote: The only way to have a friend is to be one.\nAuthor: Ralph Waldo Emerson",
    "Quote: What we have to learn to do, we learn by doing.\nAuthor: Aristotle",
    "singer(singer_id, name, country)\n\nHow many singers are there? SELECT COUNT(*) FROM singer",
]
LORA = {
    "r": 4,
    "alpha": 8.0,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "method": "lora",
    "init": "default",
    "quantize": None,
    "trainable_tokens": [],
    "modules_to_save": [],
}


def write_params(folder: Path, **overrides: Any) -> Path:
    """Write `folder`/params.yaml, the repository's with `overrides`, keys by their dots: **{"lora.r": 4}."""
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    values = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["machine"]["report_to"] = []  # whoever is told of real runs
    for key, value in overrides.items():
        *sections, name = key.split(".")
        holder = values
        for section in sections:
            holder = holder[section]
        holder[name] = value
    path = folder / "params.yaml"
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(values, file)
    return path


CHAT = {"task": {"name": "chat", "rows": "rows.jsonl"}}


def write_asked(folder: Path, tokens: Path, tokenizer: Path) -> None:
    """Let training answer the rows of `tokens`, as the validation stage prepares it with train.metric: score."""
    import pyarrow.parquet
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).decode
    lines = []
    for row in pyarrow.parquet.read_table(tokens).to_pylist():
        prompt, answer = row["input_ids"][: row["prompt_tokens"]], row["input_ids"][row["prompt_tokens"] :]
        turns = [{"role": role, "content": decode(ids)} for role, ids in (("user", prompt), ("assistant", answer))]
        lines.append({"id": row["id"], "where": row["id"], "messages": turns, "groups": {}, "context": {}})
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "learned.jsonl").write_text('"a learned answer"\n')
    (folder / "scoring.json").write_text("{}")


@pytest.fixture
def params_file() -> Callable[..., Path]:
    return write_params


def tiny_tokenizer():
    """Byte-level pieces, so that every text can be written; BOS in front, as Gemma's own puts it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
    )


def write_tiny_model(folder: Path, seed: int = 0, sliding_window: int = 16) -> Path:
    """Random weights in Gemma 3's form: three layers, two of them with a window; bfloat16 safetensors."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    tokenizer = tiny_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(config)
    # the layers large beside the embeddings, or every answer would be its prompt's last token again and again
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05 if "embed" in name else 0.3)
    model.generation_config = GenerationConfig(eos_token_id=[1, 5], pad_token_id=0, bos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as stages.download leaves it in models/base. No test may write into it."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "base")
