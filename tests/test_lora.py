"""Embedding and head trained beside the adapters: whole or some rows, with the gradients of plain attention."""

import random

import pytest
import torch
import torch.nn.functional as F

from stages.models import loss
from stages.models.fused import fuse
from stages.models.load import load_model, pack_loss, row_losses
from stages.models.lora import add_adapters, embedding_trained, token_ids
from stages.models.packs import IGNORED, pack
from stages.params import Lora
from stages.refusal import Refusal
from tests import tiny_families
from tests.conftest import LORA, tiny_tokenizer


def rows(count: int) -> list[dict]:
    chance = random.Random(0)
    begun = [chance.randrange(6, 60) for _ in range(40)]
    made = []
    for number in range(count):
        prompt = begun + [chance.randrange(6, 60) for _ in range(chance.randint(2, 12))]
        answer = [chance.randrange(6, 60) for _ in range(chance.randint(2, 8))]
        labels = [IGNORED] * len(prompt) + answer
        made.append({"id": str(number), "input_ids": prompt + answer, "labels": labels, "prompt_tokens": len(prompt)})
    return made


def adapted(folder, attention: str, tokens=(), dtype=torch.float32, **changed):
    """The model with adapters none of which is zero."""
    model = add_adapters(load_model(folder, "cpu", dtype, attention), Lora(**LORA | changed), 0, tokens).train()
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=draw)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def plain_loss(model, rows: list[dict]) -> torch.Tensor:
    """As transformers computes it, one row at a time; its own head bounds the logits."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="sum")
    return total


TRAINED = {
    "both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"tokens": [7, 12, 30]},
}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3n", "llama2"])
def test_embedding_and_head_have_the_gradients_of_plain_attention(family, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(loss.TOKENS_AT_ONCE, "cpu", 7)  # the head takes several parts
    tiny_families.write(family, tmp_path)
    ours, plain = (adapted(tmp_path, attention, **TRAINED[trained]) for attention in ("packed", "eager"))
    fuse(ours)
    found = sum(pack_loss(ours.get_base_model(), piece) for piece in pack(rows(6), 200))
    expected = plain_loss(plain, rows(6))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    found, expected = gradients(ours), gradients(plain)
    tied = family != "llama2"
    beside = [name for name in found if "lora_" not in name]
    assert len(beside) == (1 if tied or trained in ("head", "embedding") else 2), beside
    for name, gradient in expected.items():
        assert name not in beside or gradient.norm() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_in_bfloat16_they_are_held_in_float32_and_computed_with_as_they_will_be_merged(tiny_model):
    model = adapted(tiny_model, "packed", dtype=torch.bfloat16, modules_to_save=["lm_head"])
    base = model.get_base_model()
    weight = base.get_input_embeddings().weight
    assert base.get_output_embeddings().weight is weight and weight.dtype == torch.float32
    before = row_losses(base, rows(3), 200)
    with torch.no_grad():
        weight *= 1 + 2**-12  # less than bfloat16 tells apart
    assert row_losses(base, rows(3), 200) == before
    with torch.no_grad():
        weight *= 1.1
    assert row_losses(base, rows(3), 200) != before
    (piece,) = pack(rows(3), 1000)
    pack_loss(base, piece).backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0


def test_a_model_whose_embedding_is_trained_is_known(tiny_model):
    assert not embedding_trained(adapted(tiny_model, "packed"))
    assert embedding_trained(adapted(tiny_model, "packed", modules_to_save=["lm_head"]))
    assert embedding_trained(adapted(tiny_model, "packed", tokens=[5]))


def test_tokens_are_named_as_the_vocabulary_has_them():
    tokenizer = tiny_tokenizer()
    assert token_ids(tokenizer, ["<end_of_turn>", "<bos>", "<end_of_turn>"]) == [2, 5]
    assert token_ids(tokenizer, []) == []
    said = r"^params.yaml: lora.trainable_tokens '<tool>' is no token of this model, but '<', .*; name those$"
    with pytest.raises(Refusal, match=said):
        token_ids(tokenizer, ["<bos>", "<tool>"])
