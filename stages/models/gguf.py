"""A GGUF file of Gemma 3 or SmolLM2 in; the folder of plain weights, configuration and tokenizer it was made from out.

transformers can read GGUF, but not well enough here: its tokenizers are the wrong ones, and Gemma needs 90 s.
"""

import contextlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGUFValueType, TokenType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import modeling_gguf_pytorch_utils as legacy
from transformers.integrations.gguf import read_gguf_metadata

from stages.outputs import refuse_without_room, write_json
from stages.refusal import Refusal

OPENED = {"gemma3": "llama", "llama": "smollm"}  # architectures, each with the kind of its vocabulary
END_OF_TURN = "<end_of_turn>"


def dequantize(gguf_file: Path, folder: Path) -> None:
    """Write the model of `gguf_file` into `folder` as bfloat16 safetensors; raises Refusal when it is another kind."""
    metadata, tokenizer = read(gguf_file)
    elements = sum(int(tensor.n_elements) for tensor in _ShortFields(gguf_file).tensors)
    refuse_without_room(folder.parent, 2 * elements)
    gemma = metadata["general.architecture"] == "gemma3"
    print(f"de-quantizing {gguf_file.name}: about 30 s, once", file=sys.stderr)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer.save_pretrained(folder)
    # transformers looks GGUFReader up anew each time, and its progress bar knows no switch
    with _instead(gguf, "GGUFReader", _ShortFields), _instead(legacy, "tqdm", lambda tensors, desc: tensors):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, *([tokenizer.convert_tokens_to_ids(END_OF_TURN)] if gemma else [])],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    _forget(folder / "config.json", "_model_name_or_path")
    _forget(folder / "generation_config.json", "_from_model_config")


def read(gguf_file: Path) -> tuple[dict[str, Any], transformers.PreTrainedTokenizerBase]:
    """What the file says of its model, and the tokenizer made of that; raises Refusal as `dequantize` does."""
    metadata = _metadata(gguf_file)
    try:
        gemma = metadata["general.architecture"] == "gemma3"
        return metadata, _gemma_tokenizer(metadata) if gemma else _smollm_tokenizer(metadata)
    except KeyError as error:
        raise Refusal(f"{gguf_file.name}: does not hold {error.args[0]}; fetch it again") from None


def _metadata(gguf_file: Path) -> dict[str, Any]:
    try:
        metadata, _ = read_gguf_metadata(str(gguf_file), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
        _ShortFields(gguf_file)  # reads to the last tensor
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, struct.error) as error:
        problem = str(error).replace(str(gguf_file), "it") or type(error).__name__
        raise Refusal(f"{gguf_file.name}: is not a whole GGUF file ({problem}); fetch it again") from None
    architecture, vocabulary = metadata["general.architecture"], metadata.get("tokenizer.ggml.model")
    if vocabulary == "gpt2":  # of which there are many, told apart by how they cut a text before it is merged
        vocabulary = metadata.get("tokenizer.ggml.pre")
    if OPENED.get(architecture) != vocabulary:
        raise Refusal(
            f"{gguf_file.name}: is a {architecture} model with a {vocabulary} tokenizer; GGUF is opened for "
            f"{' and '.join(f'{a} with {v}' for a, v in OPENED.items())} only: take the safetensors of this model"
        )
    if architecture == "gemma3" and END_OF_TURN not in metadata["tokenizer.ggml.tokens"]:
        raise Refusal(f"{gguf_file.name}: its vocabulary has no {END_OF_TURN}; take the safetensors of this model")
    return metadata


def _special(metadata: dict[str, Any]) -> dict[str, str]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    pieces = metadata["tokenizer.ggml.tokens"]
    return {f"{name}_token": pieces[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()}


def _smollm_tokenizer(metadata: dict[str, Any]) -> transformers.PreTrainedTokenizerBase:
    """SmolLM2's, byte-level byte-pair encoding in which every digit stands alone.

    transformers 5.17 takes Llama 3's for it, merges digits, and calls the beginning of a text its end.
    """
    pieces, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    made = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [tuple(m.split(" ")) for m in merges])
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    made.add_special_tokens([p for p, kind in zip(pieces, types, strict=True) if kind == TokenType.CONTROL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=metadata.get("tokenizer.chat_template"), **_special(metadata)
    )


def _gemma_tokenizer(metadata: dict[str, Any]) -> transformers.PreTrainedTokenizerBase:
    """The Gemma tokenizer, byte-pair encoding, from the vocabulary in the file.

    transformers 5.17 makes a Unigram tokenizer of it, which segments otherwise, and which when saved and loaded again
    has no merges and falls back to single characters (huggingface/transformers#41494). The merges are not in the file
    but follow from it: a SentencePiece vocabulary is in the order in which its pieces were merged. Of Gemma's 262,144
    pieces this makes the 514,906 merges of the tokenizer that Google publishes.
    """
    # llama.cpp writes pieces of blanks alone with blanks
    pieces = [piece.replace(" ", "▁") for piece in metadata["tokenizer.ggml.tokens"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = transformers.GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", True),  # as Google's does
        **_special(metadata),
    )
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_tokens(
        [
            transformers.AddedToken(piece, normalized=False, special=kind == TokenType.CONTROL)
            for piece, kind in zip(pieces, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    return tokenizer


class _ShortFields(gguf.GGUFReader):
    """GGUFReader, with all values of a long array standing for its first.

    The vocabulary is 786,432 values, and GGUFReader makes two to six numpy views of each: 13 s, and transformers 6 s
    more to parse them, twice for a model, which needs nothing of them but their number.
    """

    LONG = 10_000  # longer than a list with a value for each layer

    def _get(self, *arguments: Any, **options: Any) -> np.ndarray:
        # a slice of a memmap costs ten times one of the plain array over the same bytes
        return super()._get(*arguments, **options).view(np.ndarray)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
        if count < self.LONG:
            return super()._get_field_parts(orig_offs, raw_type)
        offset = orig_offs + 12
        size, parts, index, types = super()._get_field_parts(offset, kind)
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                offset += 8 + struct.unpack_from("<Q", self.data, offset)[0]
        else:
            offset += size * count
        return offset - orig_offs, parts, index * count, [GGUFValueType.ARRAY, *types]


@contextlib.contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give `owner` another attribute while the block runs."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _forget(path: Path, key: str) -> None:
    """Take a key that tells of the loading, not of the model, out of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop(key, None)
    write_json(path, values)
