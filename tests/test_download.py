"""The stage from params to a folder: on tiny files, and on a tiny Gemma 3 in the GGUF form, really de-quantized."""

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_tokenizer
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from stages import download, params
from stages.models import gguf as opened
from stages.refusal import Refusal

ROOT = Path(__file__).parent.parent
TEXTS = ["<start_of_turn>user\nthe that<end_of_turn>\n", "hat  the\n\n", "tea é", "a   b"]
MERGED = ["th", "he", "▁t", "the", "at", "▁the", "▁that", "hat", "that"]
WIDTH, HEADS, HEAD_DIM, HIDDEN = 64, 2, 32, 96


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Gemma's in small, as llama.cpp writes it: control tokens, user's tokens with blanks, bytes, pieces, letters."""
    kinds = gguf.TokenType
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    rows = [(token, -1000.0, kinds.CONTROL) for token in control]
    rows += [(token, -1000.0, kinds.USER_DEFINED) for token in ["\n", "\n\n", "  ", "   "]]
    rows += [(f"<0x{byte:02X}>", 0.0, kinds.BYTE) for byte in range(256)]
    rows += [(piece, -float(rank), kinds.NORMAL) for rank, piece in enumerate([*MERGED, *"▁abehtuser"])]
    rows += [(f"<unused{n}>", -1000.0, kinds.CONTROL) for n in range(40)]
    tokens, scores, types = zip(*{row[0]: row for row in rows}.values(), strict=True)
    return list(tokens), list(scores), list(types)


def write_gguf(file: Path, architecture: str = "gemma3", tokens: list[str] | None = None) -> None:
    known, scores, types = vocabulary()
    tokens = tokens or known
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Toy")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    for name, number in {"pad": 0, "eos": 1, "bos": 2, "unk": 3}.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(True)
    random = np.random.default_rng(0)
    quantized = {
        "token_embd": (len(tokens), WIDTH),
        "blk.0.attn_q": (HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_k": (HEAD_DIM, WIDTH),
        "blk.0.attn_v": (HEAD_DIM, WIDTH),
        "blk.0.attn_output": (WIDTH, HEADS * HEAD_DIM),
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    for name, shape in quantized.items():
        blocks = gguf.quantize(random.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    norms = ["output_norm"] + [f"blk.0.{n}_norm" for n in ("attn", "post_attention", "ffn", "post_ffw")]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q_norm", "attn_k_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(HEAD_DIM, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_of(path: str, chat_template: str | None = "gemma3") -> params.Model:
    fetch = {"source": "path", "path": path, "sha256": None}
    return params.Model.model_validate({"fetch": fetch, "chat_template": chat_template})


def made(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def top(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/own", "models/own", "models/base"):
        Path(folder).mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The folders that two runs made of one GGUF file, from two places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.models.gguf._ShortFields.LONG", 10)  # the toy's vocabulary is short
        folders = []
        for name in ("first", "a-longer-name"):
            place = tmp_path_factory.mktemp(name)
            patch.chdir(place)
            Path("models/own").mkdir(parents=True)
            Path("models/base").mkdir()
            write_gguf(Path("models/own/toy.gguf"))
            download.model(model_of("models/own/toy.gguf"), Path("models/base"))
            folders.append(place / "models/base")
        return folders


@pytest.fixture(scope="module")
def tokenizer(twice):
    return transformers.AutoTokenizer.from_pretrained(twice[0])


def test_two_runs_write_the_same_bytes(twice):
    assert made(twice[0]) == made(twice[1])


def test_a_gguf_file_becomes_weights_a_tokenizer_a_template_and_their_provenance(twice):
    names = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert set(made(twice[0])) == names | {"provenance.json"}
    provenance = json.loads((twice[0] / "provenance.json").read_text())
    assert provenance["origin"] == ["models/own/toy.gguf"] and set(provenance["files"]) == {"toy.gguf"}
    assert provenance["produced"] == {name: made(twice[0])[name] for name in sorted(names)}


def test_the_weights_are_those_that_transformers_reads_the_slow_way(twice, tmp_path):
    write_gguf(tmp_path / "toy.gguf")
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="toy.gguf",
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(twice[0])
    assert ours.config.vocab_size == plain.config.vocab_size == len(vocabulary()[0])
    expected, found = plain.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_the_reader_of_gguf_is_the_original_again_afterwards(twice):
    assert gguf.GGUFReader.__module__ == "gguf.gguf_reader"


def sentencepiece(text: str) -> list[str]:
    """The definition: tokens of control and user first, the longest; then the best pair merged until there is none."""
    tokens, scores, types = vocabulary()
    score = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == gguf.TokenType.NORMAL}
    whole = [t.replace(" ", "▁") for t, k in zip(tokens, types, strict=True) if k in (3, 4)]
    text = text.replace(" ", "▁")
    pieces: list[str] = []
    while text:
        found = max((token for token in whole if text.startswith(token)), key=len, default=text[0])
        pieces.append(found)
        text = text[len(found) :]
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in score]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    known = set(tokens) | set(whole)
    return [p for x in pieces for p in ([x] if x in known else [f"<0x{byte:02X}>" for byte in x.encode()])]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_segments_as_sentencepiece_does_and_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == sentencepiece(text)
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_begins_with_bos_as_the_published_one_does(tokenizer):
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id == 2


def test_a_conversation_has_one_bos_and_whole_turn_tokens(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    assert tokens[:2] == ["<bos>", "<start_of_turn>"] and tokens[-2:] == ["<end_of_turn>", "\n"]
    assert tokens.count("<bos>") == 1


def test_generation_ends_at_the_end_of_a_turn_and_the_settings_can_be_saved(twice, tokenizer, tmp_path):
    settings = transformers.GenerationConfig.from_pretrained(twice[0])
    assert settings.eos_token_id == [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    assert settings.pad_token_id == 0
    settings.save_pretrained(tmp_path)


def test_nothing_tells_of_the_place_where_it_was_made(twice):
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "provenance.json"):
        text = (twice[0] / name).read_text()
        assert str(twice[0].parents[1]) not in text
        assert not {"_name_or_path", "_model_name_or_path", "local_files_only", "is_local"} & set(json.loads(text))


def refused(call, *arguments) -> str:
    with pytest.raises(Refusal) as refusal:
        call(*arguments)
    assert "\n" not in refusal.value.args[0]
    return str(refusal.value)


def test_a_gguf_file_of_another_family_is_refused(top):
    write_gguf(Path("models/own/toy.gguf"), architecture="llama")
    line = refused(download.model, model_of("models/own/toy.gguf"), Path("models/base"))
    assert "toy.gguf: is a llama model" in line and "safetensors" in line


def test_a_gguf_file_without_the_token_that_ends_a_turn_is_refused(top):
    tokens = [token.replace("<end_of_turn>", "<other>") for token in vocabulary()[0]]
    write_gguf(Path("models/own/toy.gguf"), tokens=tokens)
    assert "no <end_of_turn>" in refused(download.model, model_of("models/own/toy.gguf"), Path("models/base"))


def test_the_tokenizer_of_smollm_keeps_digits_apart_and_knows_the_end_of_a_turn():
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "Ġ t", "Ġt h"]
    tokens = [*control, *letters, *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    found = opened._smollm_tokenizer(metadata)
    ids = found("a 12 the<|im_end|>").input_ids
    assert found.convert_ids_to_tokens(ids) == ["a", "Ġ", "1", "2", "Ġth", "e", "<|im_end|>"]
    assert found.decode(ids) == "a 12 the<|im_end|>"
    assert (found.bos_token, found.eos_token, found.chat_template) == ("<|im_start|>", "<|im_end|>", "{{ messages }}")


@pytest.mark.parametrize("kept", [0, 3, 100, 4000, -1])
def test_a_gguf_file_cut_short_is_refused(top, kept):
    file = Path("models/own/toy.gguf")
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:kept])
    assert "toy.gguf: is not a whole GGUF" in refused(download.model, model_of(str(file)), Path("models/base"))


def own_model(**tokenizer_config) -> None:
    toy = Path("models/own/toy")
    toy.mkdir()
    (toy / "config.json").write_text("{}")
    save_file({"weight": np.zeros(1)}, toy / "model.safetensors")
    (toy / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def test_a_model_without_a_chat_template_is_refused_and_told_those_there_are(top):
    own_model()
    line = refused(download.model, model_of("models/own/toy", None), Path("models/base"))
    assert "no chat template" in line and "gemma3" in line


def test_a_model_keeps_its_own_chat_template_where_none_is_asked_for(top):
    own_model(chat_template="{{ messages }}")
    tiny_tokenizer().backend_tokenizer.save("models/own/toy/tokenizer.json")
    download.model(model_of("models/own/toy", None), Path("models/base"))
    assert not Path("models/base/chat_template.jinja").exists()


def test_a_model_without_a_tokenizer_is_refused(top):
    own_model()
    line = refused(download.model, model_of("models/own/toy"), Path("models/base"))
    assert "tokenizer cannot be opened" in line and "bring its tokenizer.json" in line


def ends_answers(after: str, **settings) -> list[int] | None:
    """The eos_token_id of generation_config.json, of a model whose template writes that after an answer."""
    own_model(chat_template="{{ messages[-1]['content'] }}" + after, tokenizer_class="PreTrainedTokenizerFast")
    tiny_tokenizer().backend_tokenizer.save("models/own/toy/tokenizer.json")
    if settings:
        Path("models/own/toy/generation_config.json").write_text(json.dumps(settings))
    download.model(model_of("models/own/toy", None), Path("models/base"))
    file = Path("models/base/generation_config.json")
    if not file.exists():
        return None
    written = json.loads(file.read_text())
    assert written | settings | {"eos_token_id": 0} == written | {"eos_token_id": 0}
    return written["eos_token_id"]


@pytest.mark.parametrize(
    ("after", "settings", "stops"),
    [
        ("<end_of_turn>\n", {"eos_token_id": 1, "top_k": 64}, [1, 5]),
        ("<end_of_turn>\n<eos>", {"eos_token_id": [1, 4]}, [1, 4, 5]),
        (" <eos>", {"eos_token_id": 1}, 1),  # nothing to add: the file stays as it was
        (" <eos>", {}, [1]),
        ("<end_of_turn>\n", {}, [5]),
        (".", {}, None),  # encode will say what is missing
    ],
)
def test_the_token_that_the_template_ends_an_answer_with_is_one_that_ends_generation(top, after, settings, stops):
    assert ends_answers(after, **settings) == stops


def test_a_chat_template_that_is_not_there_is_refused_before_anything_is_fetched(top):
    line = refused(download.model, model_of("models/own/absent", "gemma9"), Path("models/base"))
    assert "'gemma9'" in line and "gemma3" in line


def test_rows_in_place_of_a_model_are_refused(top):
    Path("data/own/mine.jsonl").write_text("{}\n")
    line = refused(download.model, model_of("data/own/mine.jsonl"), Path("models/base"))
    assert "mine.jsonl: is no model" in line


def data_of(path: str) -> params.Data:
    return params.Data.model_validate({"fetch": {"source": "path", "path": path, "sha256": None}, "license": "CC0"})


def test_data_brings_its_licence_and_its_checksums(top):
    Path("data/own/mine.jsonl").write_text("{}\n")
    download.data(data_of("data/own/mine.jsonl"), Path("models/base"))
    assert json.loads(Path("models/base/provenance.json").read_text()) == {
        "source": "path",
        "origin": ["data/own/mine.jsonl"],
        "files": {"mine.jsonl": hashlib.sha256(b"{}\n").hexdigest()},
        "license": "CC0",
    }


def test_data_with_a_file_called_as_the_provenance_is_refused(top):
    Path("data/own/provenance.json").write_text("[]")
    assert "provenance.json" in refused(download.data, data_of("data/own/provenance.json"), Path("models/base"))


def test_a_refusal_keeps_the_folder_that_was_there(top, monkeypatch):
    monkeypatch.setattr(params, "load", lambda: params.Params.model_construct(data=data_of("data/own/absent.jsonl")))
    Path("data/raw").mkdir()
    Path("data/raw/old").write_text("kept")
    assert "absent.jsonl" in refused(download.main, ["data", "data/raw"])
    assert Path("data/raw/old").read_text() == "kept"
    assert sorted(p.name for p in Path("data").iterdir()) == ["own", "raw"]


@pytest.mark.parametrize("arguments", [[], ["data"], ["dates", "data/raw"], ["data", "data/raw", "more"]])
def test_other_arguments_are_answered_with_the_usage(arguments):
    assert "usage: python -m stages.download" in refused(download.main, arguments)


def test_data_is_fetched_without_loading_torch():
    sources = ", ".join(f"stages.sources.{p.stem}" for p in (ROOT / "stages/sources").glob("[!_]*.py"))
    heavy = "{'torch', 'transformers', 'gguf'} & set(sys.modules)"
    code = f"import sys, stages.download, {sources}; sys.exit(bool({heavy}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
