"""A tiny model of each family through the whole pipeline, and what must be true of it afterwards."""

import json
from dataclasses import dataclass
from pathlib import Path

import peft
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stages import download, encode, evaluate, merge, prepare, train, validation
from stages.models import load, packs, towers
from stages.models.attention import _softcapped
from stages.models.families import FAMILIES, adaptable, family, recordable
from stages.models.generate import attention_for_generation, generate
from stages.models.load import load_model, packed_logits
from stages.models.lora import add_adapters
from stages.models.packs import pack
from stages.params import Lora
from stages.params import load as load_params
from stages.refusal import Refusal
from tests import tiny_families
from tests.conftest import LORA, write_params

TOPICS = ("birds", "ships", "stones", "clouds", "rivers", "roads", "songs", "trees")
TERMINATOR = {"llama2": "</s>", "llama3": "<|eot_id|>", "qwen2": "<|im_end|>"}


def rows() -> list[dict]:
    """Conversations that open with a system message, every other one, and all have one answer."""
    made = []
    for number in range(48):
        system = [{"role": "system", "content": f"Be brief {number}."}] if number % 2 else []
        asked = {"role": "user", "content": f"What of {TOPICS[number % 8]}, asked {number} times?"}
        made.append({"messages": [*system, asked, {"role": "assistant", "content": "It is answered."}]})
    return made


@dataclass
class Ran:
    """A family, and the folder in which the pipeline ran on it."""

    name: str
    folder: Path

    def read(self, path: str) -> dict:
        return json.loads((self.folder / path).read_text())

    def tokens(self, side: str) -> list[dict]:
        return pyarrow.parquet.read_table(self.folder / f"data/tokens/{side}.parquet").to_pylist()

    def plain(self, model: str):
        """The model as transformers alone opens it, Gemma 3n without the code of its image tower."""
        path = self.folder / "models" / model
        with towers.unseen(path, AutoConfig.from_pretrained(path)):
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=sorted(tiny_families.FAMILIES))
def ran(request, tmp_path_factory):
    return run(request.param, tmp_path_factory.mktemp(request.param))


def run(name: str, folder: Path, **overrides) -> Ran:
    """Every stage, in `folder`, from a published checkpoint to the tuned model's answers."""
    for path in ("models/own/toy", "data/raw", "data/own"):
        (folder / path).mkdir(parents=True)
    template = tiny_families.write(name, folder / "models/own/toy")
    (folder / "data/raw/mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows()))
    write_params(
        folder,
        **{
            "model.fetch": {"source": "path", "path": "models/own/toy", "sha256": None},
            "model.chat_template": template,
            "task": {"name": "chat", "rows": "mine.jsonl"},
            "prepare.group_by": "opening",
            "prepare.test": 0.3,
            "prepare.validation": 0.1,
            "lora.r": 4,
            "train.epochs": 6.0,
            "train.learning_rate": 0.01,
            "train.validations": 1,
            "merge.max_kl": 1e-3,
            "evaluate.max_new_tokens": 24,
            "machine.device": "cpu",
            "machine.dtype": "float32",
            "machine.tokens_per_pack": 600,
            "machine.rows_per_batch": 8,
        }
        | overrides,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("models/base").mkdir()
        download.model(load_params().model, Path("models/base"))
        prepare.main(["data/raw", "data/conversations", "metrics/data.json"])
        encode.main(["models/base", "data/conversations", "data/tokens", "metrics/tokens.json"])
        tokens = ["data/tokens/train.parquet", "data/tokens/validation.parquet"]
        validation.main(["data/conversations", "data/validation"])
        train.main(
            ["models/base", *tokens, "data/validation", "models/adapter", "metrics/train.json", "metrics/loss.csv"]
        )
        merge.main(["models/base", "models/adapter", "data/tokens/test.parquet", "models/merged", "metrics/merge.json"])
        asked = ["data/conversations/test.jsonl", "data/conversations/learned.jsonl", "data/tokens/test.parquet"]
        for model, answers in (("base", "base"), ("merged", "tuned")):
            evaluate.main([f"models/{model}", *asked, f"data/answers/{answers}.jsonl", f"metrics/{answers}.json"])
    return Ran(name, folder)


def test_the_model_learns_to_answer_and_to_stop(ran):
    base, tuned = ran.read("metrics/base.json"), ran.read("metrics/tuned.json")
    assert tuned["loss"] < 0.5 < 5 < base["loss"]
    assert (tuned["stop_rate"], tuned["exact_match"]) == (1.0, 1.0)
    assert base["stop_rate"] < 0.5


def test_the_answer_and_the_end_of_its_turn_are_supervised_and_a_system_message_is_in_the_prompt(ran):
    tokenizer = AutoTokenizer.from_pretrained(ran.folder / "models/base")
    terminator = TERMINATOR.get(ran.name, "<end_of_turn>")
    opened = 0
    for row in ran.tokens("train"):
        answer = [label for label in row["labels"] if label != encode.IGNORED]
        # Llama 2 puts a blank before it
        assert tokenizer.decode(answer).replace(" </s>", "</s>") == f"It is answered.{terminator}"
        prompt = tokenizer.decode(row["input_ids"][: row["prompt_tokens"]])
        assert prompt.count("What of") == 1
        opened += "Be brief" in prompt
        if tokenizer.bos_token:
            assert row["input_ids"].count(tokenizer.bos_token_id) == 1 and prompt.startswith(tokenizer.bos_token)
    assert 0.3 < opened / len(ran.tokens("train")) < 0.7


def test_only_the_language_models_layers_are_adapted_and_all_of_them(ran):
    model = ran.plain("base")
    weights = load_file(ran.folder / "models/adapter/adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in weights}
    assert adapted == set(adaptable(model))
    layers = model.get_decoder().layers
    for layer in layers:
        own = {name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        assert {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"} <= own
    prefix = "model.language_model.layers." if ran.name in ("gemma3", "gemma3n") else "model.layers."
    seven = [name for name in adapted if name.startswith(prefix) and name.endswith("_proj")]
    shared = 2 * 2 if ran.name == "gemma3n" else 0  # its last two layers have no keys and values of their own
    assert len(seven) == 7 * len(layers) - shared
    assert not any(word in name for name in adapted for word in ("vision", "audio", "multi_modal", "altup", "lm_head"))


def test_packed_rows_have_the_logits_of_plain_attention_one_row_at_a_time(ran, monkeypatch):
    monkeypatch.setattr(packs, "SHARED_AT_LEAST", 2)  # these rows are short
    rows = ran.tokens("test")
    ours, plain = load_model(ran.folder / "models/merged", "cpu", torch.float32), ran.plain("merged")
    (piece,) = pack(rows, 10_000)
    assert any(segment.shared_end for segment in piece.segments)
    by_id = {row["id"]: row for row in rows}
    with torch.inference_mode():
        packed = packed_logits(ours, piece, slice(None))
        for name, start, end in piece.rows:
            expected = plain(input_ids=torch.tensor([by_id[name]["input_ids"]])).logits[0, start - end :]
            torch.testing.assert_close(packed[start:end], expected, rtol=1e-3, atol=1e-3)


def test_generation_says_what_transformers_own_says(ran):
    ours, plain = load_model(ran.folder / "models/base", "cpu", torch.float32), ran.plain("base")
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in ran.tokens("test")[:4]]
    ours.set_attn_implementation(attention_for_generation(ours))
    found = generate(ours, prompts, set(), 12, 4)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert answer.tokens == expected[0, len(prompt) :].tolist()


def test_a_change_in_one_row_leaves_the_logits_of_the_others_in_its_pack(ran):
    rows = ran.tokens("test")[:5]
    model = load_model(ran.folder / "models/merged", "cpu", torch.float32)

    def logits(rows: list[dict]) -> dict[str, torch.Tensor]:
        (piece,) = pack(rows, 10_000)
        with torch.inference_mode():
            found = packed_logits(model, piece, slice(None))
        return {name: found[start:end] for name, start, end in piece.rows}

    before = logits(rows)
    last = rows[0]["input_ids"][-1]
    changed = [*rows[0]["input_ids"][:-1], last - 1 if last else 1]
    after = logits([rows[0] | {"input_ids": changed}, *rows[1:]])
    assert not torch.equal(before[rows[0]["id"]][-1], after[rows[0]["id"]][-1])
    for row in rows[1:]:
        assert torch.equal(before[row["id"]], after[row["id"]])


def test_the_merged_model_opens_in_transformers_under_its_own_class_and_agrees_with_base_and_adapter(ran):
    assert ran.read("metrics/merge.json")["max_kl"] < 1e-3
    published = AutoConfig.from_pretrained(ran.folder / "models/own/toy")
    base, merged = ran.plain("base"), ran.plain("merged")
    assert type(merged).__name__ == type(base).__name__ == published.architectures[0]
    tuned = peft.PeftModel.from_pretrained(base, ran.folder / "models/adapter").eval()
    ids = torch.tensor([ran.tokens("test")[0]["input_ids"]])
    with torch.inference_mode():
        found, expected = merged(input_ids=ids).logits, tuned(input_ids=ids).logits
        plain = ran.plain("base")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (plain - expected).abs().mean() > 0.1


def test_what_is_not_adapted_is_published_again_to_the_last_bit(ran):
    old = load_file(ran.folder / "models/own/toy/model.safetensors")
    new = load_file(ran.folder / "models/merged/model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == len(adaptable(ran.plain("base")))
    assert not any(word in name for name in changed for word in ("vision", "audio", "multi_modal", "embed", "altup"))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        if (ran.folder / "models/own/toy" / name).exists():
            assert (ran.folder / "models/merged" / name).exists()


def test_4_bit_values_are_the_language_models_alone(ran):
    base = ran.folder / "models/base"
    plain, rounded = (load_model(base, "cpu", torch.float32, quantize=q).state_dict() for q in (None, "nf4"))
    changed = {name.removesuffix(".weight") for name in plain if not torch.equal(plain[name], rounded[name])}
    assert changed == set(adaptable(ran.plain("base")))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("gemma3", {"lora.method": "dora", "lora.dropout": 0.1}),
        ("gemma2", {"lora.method": "rslora", "lora.init": "gaussian"}),
        ("gemma3n", {"lora.init": "pissa"}),
        ("llama2", {"lora.init": "olora"}),
        ("llama3", {"lora.quantize": "int8"}),
    ],
)
def test_other_methods_and_beginnings_of_lora_are_trained_and_merged(name, changed, tmp_path):
    ran = run(name, tmp_path, **changed)
    assert ran.read("metrics/merge.json")["max_kl"] < 1e-3
    assert ran.read("metrics/tuned.json")["loss"] < 0.5 * ran.read("metrics/base.json")["loss"]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("gemma2", {"lora.trainable_tokens": ["<end_of_turn>", "<start_of_turn>"]}),
        ("gemma3", {"lora.modules_to_save": ["lm_head", "embed_tokens"], "lora.quantize": "nf4"}),
        ("gemma3n", {"lora.modules_to_save": ["lm_head"]}),
        ("gemma3n", {"lora.trainable_tokens": ["<end_of_turn>"]}),
        ("llama2", {"lora.modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama2", {"lora.modules_to_save": ["lm_head"], "train.keep": "best", "train.validations": 3}),
        ("llama3", {"lora.trainable_tokens": ["<|eot_id|>"], "lora.method": "dora"}),
    ],
)
def test_embedding_and_head_are_trained_and_merged_and_stay_one_matrix_where_they_were(name, changed, tmp_path):
    ran = run(name, tmp_path, **changed)
    assert ran.read("metrics/merge.json")["max_kl"] < 1e-3
    assert ran.read("metrics/tuned.json")["loss"] < 0.5 * ran.read("metrics/base.json")["loss"]
    base, merged = ran.plain("base"), ran.plain("merged")
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert tied == (name not in ("llama2", "llama3"))
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    assert merged.config.tie_word_embeddings == base.config.tie_word_embeddings
    old, new = (load_file(ran.folder / path / "model.safetensors") for path in ("models/own/toy", "models/merged"))
    assert old.keys() == new.keys()
    tokenizer = AutoTokenizer.from_pretrained(ran.folder / "models/base")
    tokens = tokenizer.convert_tokens_to_ids(changed.get("lora.trainable_tokens", []))
    for place in ("embed_tokens", "lm_head"):
        before, after = (
            (one.get_input_embeddings() if place == "embed_tokens" else one.get_output_embeddings()).weight
            for one in (base, merged)
        )
        rows = {row for row in range(len(before)) if not torch.equal(before[row], after[row])}
        if tokens:
            assert rows == set(tokens)
        else:
            assert bool(rows) == (tied or place in changed["lora.modules_to_save"])


# what no test tries, and what is left out of targets


def test_targets_that_stand_in_the_image_tower_too_are_adapted_in_the_language_model_alone(tmp_path):
    tiny_families.write("gemma3", tmp_path)
    model = load_model(tmp_path, "cpu", torch.float32)
    lora = Lora(**LORA | {"target_modules": ["q_proj", "v_proj"]})
    names = [name for name, _ in add_adapters(model, lora, 0).named_parameters() if "lora_A" in name]
    assert len(names) == 6 and all(".language_model.layers." in name for name in names)


@pytest.mark.parametrize("wanted", [["q_proj", "w_proj"], ["out_proj"], ["altup.modality_router"]])
def test_a_target_that_is_not_in_the_language_model_is_refused_by_name(wanted, tmp_path):
    tiny_families.write("gemma3n", tmp_path)
    model = load_model(tmp_path, "cpu", torch.float32)
    lora = Lora(**LORA | {"target_modules": wanted})
    with pytest.raises(
        Refusal, match=rf"target_modules '{wanted[-1]}' matches nothing; there are: down_proj, gate_proj"
    ):
        add_adapters(model, lora, 0)


def test_a_family_that_no_test_tries_is_warned_of_in_one_line(tmp_path, capfd):
    tiny_families.write("qwen2", tmp_path)
    capfd.readouterr()
    for quantize in (None, "nf4"):
        load_model(tmp_path, "cpu", torch.float32, quantize=quantize)
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
        assert "qwen2 is not a family that the tests try; packed rows are right in it" in line
    assert not family(load_model(tmp_path, "cpu", torch.float32)).recorded


class Waits(TorchDispatchMode):
    """Counts what asks the device for a number, which a CUDA graph cannot hold."""

    count = 0

    def __torch_dispatch__(self, function, types, given=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*given, **(options or {}))


ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 2.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_model_whose_rotary_embedding_waits_for_the_device_is_not_recorded(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, rope_parameters=rope, max_position_embeddings=128))
    with Waits() as waits, torch.no_grad():
        model.get_decoder().rotary_emb(torch.ones(1, 16, 32), torch.arange(16)[None])
    assert recordable(model) == (waits.count == 0)
    assert recordable(model) == (kind not in ("dynamic", "longrope"))


def test_a_model_whose_kinds_of_layers_have_rotary_embeddings_of_their_own_is_recorded(tmp_path):
    tiny_families.write("gemma3", tmp_path)
    model = load_model(tmp_path, "cpu", torch.float32)
    assert isinstance(model.get_decoder().rotary_emb.rope_type, dict) and recordable(model)
    model.get_decoder().rotary_emb.rope_type["full_attention"] = "dynamic"
    assert not recordable(model)


SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ODD = {
    "cohere": SMALL | HEADS,  # scales what its head makes
    "gpt_oss": SMALL | HEADS | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks in attention
    "mamba": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},  # a state, no attention
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 2},  # scores that lean on the distance
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in ODD), ("cohere", torch.bfloat16), ("gpt_oss", torch.bfloat16)],
)
def test_a_family_in_which_packed_rows_are_not_right_is_refused(kind, dtype, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ODD[kind]))
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape) + (parameter.data if parameter.dim() == 1 else 0)
    model.save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=rf"^{kind} is not a family .* packed rows are not right in it: .* gemma3n, "):
        load_model(tmp_path, "cpu", dtype)


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_rounding_is_not_taken_for_a_family_in_which_packed_rows_are_not_right(name, tmp_path, monkeypatch, capfd):
    tiny_families.write(name, tmp_path, dtype="bfloat16")
    monkeypatch.setattr(load, "FAMILIES", {})
    load_model(tmp_path, "cpu", torch.bfloat16)
    assert "packed rows are right in it" in capfd.readouterr().err


def test_a_bound_on_the_scores_that_is_passed_over_is_seen(tmp_path, monkeypatch):
    tiny_families.write("gemma2", tmp_path)
    monkeypatch.setattr(load, "FAMILIES", {})
    monkeypatch.setattr(
        "stages.models.attention._softcapped", lambda *args, softcap, **more: _softcapped(*args, softcap=1e9, **more)
    )
    with pytest.raises(Refusal, match="packed rows are not right in it"):
        load_model(tmp_path, "cpu", torch.float32)


def test_every_family_of_the_table_is_tried():
    assert {*FAMILIES} == {*tiny_families.FAMILIES, "llama", "gemma3n_text"} - {"llama2", "llama3", "qwen2"}
