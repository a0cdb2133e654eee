"""A model of each family, so small that a test takes no time, with its family's kind of tokenizer and peculiarities."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS = ["Quote: The only way to have a friend is to be one.", "Author: Aristotle", "What is asked? It is answered."]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def gemma(tokens: int):
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(vocab_size=tokens, **SIZES, **GEMMA))


def gemma2(tokens: int):
    """With scores bounded so low that passing the bound over is seen."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    bounds = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 15.0, "query_pre_attn_scalar": 16}
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=tokens, **SIZES, **GEMMA, **bounds, sliding_window=16, layer_types=TYPES)
    )


def gemma3_text(tokens: int):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=tokens, **SIZES, **GEMMA, sliding_window=16, layer_types=TYPES)
    )


def gemma3(tokens: int):
    """With an image tower whose layers are called q_proj and so on, as the language model's are."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = Gemma3TextConfig(vocab_size=tokens, **SIZES, **GEMMA, sliding_window=16, layer_types=TYPES)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=tokens - 1)
    )


def gemma3n(tokens: int):
    """With per-layer embeddings, AltUp, sparse activations, and two layers that take keys and values of others."""
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration

    from stages.models import towers

    text = SIZES | GEMMA | {"vocab_size": tokens, "vocab_size_per_layer_input": tokens, "num_hidden_layers": 5}
    text |= {"intermediate_size": [48] * 5, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0, 0.0]}
    text |= {"layer_types": [*TYPES[:2], *TYPES[:1] * 2, "full_attention"], "sliding_window": 16}
    text |= {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    sound = {"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_size": 4}
    sound |= {"sscp_conv_channel_size": [4, 4], "input_feat_size": 16, "vocab_offset": tokens + 4}
    image = {"hidden_size": 16, "label_names": ["a", "b"], "vocab_size": 4, "vocab_offset": tokens}
    config = Gemma3nConfig(text_config=text, audio_config=sound, vision_config=image)
    shapes = {"timm_model.conv_stem.conv.weight": [4, 3, 3, 3], "timm_model.blocks.0.0.attn.q_proj.weight": [4, 4]}
    with towers.instead(shapes):
        return Gemma3nForConditionalGeneration(config)


def llama(tokens: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=tokens, **SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=None))


def qwen2(tokens: int):
    """A family of which nothing is known here."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=tokens, **sizes, bos_token_id=None, eos_token_id=0))


def bytes_and_letters(first: list[str], tokenizer: Callable[..., Any]) -> Any:
    """Of the SentencePiece kind, blanks as ▁ and what is no letter as bytes; as Gemma's and Llama 2's."""
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")})
    merged = [("▁", "i"), ("i", "s"), ("t", "h"), ("th", "e"), ("▁", "the"), ("e", "r")]
    pieces += [a + b for a, b in merged]
    made = tokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges=merged)
    made.add_special_tokens({"additional_special_tokens": [one for one in first if "turn" in one]})
    return made


def gemma_tokenizer():
    from transformers import GemmaTokenizer

    turns = ["<start_of_turn>", "<end_of_turn>"]
    return bytes_and_letters(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns], GemmaTokenizer)


def llama2_tokenizer():
    from transformers import LlamaTokenizer

    return bytes_and_letters(["<unk>", "<s>", "</s>"], LlamaTokenizer)


def byte_level_tokenizer(special: list[str], bos: str | None, eos: str):
    """Of the kind that Llama 3 and Qwen have: no pad token but the end, which the models do not need."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    if bos:
        number = special.index(bos)
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos)


def llama3_tokenizer():
    special = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level_tokenizer(special, bos="<|begin_of_text|>", eos="<|end_of_text|>")


def qwen_tokenizer():
    made = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], bos=None, eos="<|endoftext|>")
    made.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return made


# what Google publishes with Gemma 1 and 2, in its essence: it refuses a system message
REFUSES_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# family: its model, its tokenizer, the template of stages/models/templates that it takes, or its own
FAMILIES = {
    "gemma": (gemma, gemma_tokenizer, None),
    "gemma2": (gemma2, gemma_tokenizer, "gemma3"),
    "gemma3_text": (gemma3_text, gemma_tokenizer, "gemma3"),
    "gemma3": (gemma3, gemma_tokenizer, "gemma3"),
    "gemma3n": (gemma3n, gemma_tokenizer, "gemma3"),
    "llama2": (llama, llama2_tokenizer, "llama2"),
    "llama3": (llama, llama3_tokenizer, "llama3"),
    "qwen2": (qwen2, qwen_tokenizer, None),
}


def write(family: str, folder: Path, dtype: str = "float32") -> str | None:
    """Random weights as they would be published, in bfloat16 or float32; gives the chat template to ask for."""
    import torch

    make, make_tokenizer, template = FAMILIES[family]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = make(len(tokenizer))
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape) * (0.05 if parameter.dim() == 1 or "altup" in name else 0.3)
        parameter.data = drawn + (parameter.data if parameter.dim() == 1 else 0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # as pretrained checkpoints have it
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if family == "gemma":
        tokenizer.chat_template = REFUSES_SYSTEM
    tokenizer.save_pretrained(folder)
    if family in ("gemma3", "gemma3n"):
        (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    return template
