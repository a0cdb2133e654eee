"""Recorded passes on a GPU: the gradients of the same packs without recording, whatever comes after one another."""

import random

import pytest
import torch

from stages.models.fused import fuse
from stages.models.graphs import Graphs, own_gradients
from stages.models.load import load_model, pack_loss
from stages.models.lora import add_adapters
from stages.models.packs import IGNORED, pack
from stages.params import Lora
from tests.conftest import LORA

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def rows(count: int, shared: int, chance: random.Random) -> list[dict]:
    beginning = [chance.randrange(6, 60) for _ in range(shared)]
    made = []
    for number in range(count):
        prompt = beginning + [chance.randrange(6, 60) for _ in range(chance.randint(8, 30))]
        answer = [chance.randrange(6, 60) for _ in range(chance.randint(2, 8))]
        labels = [IGNORED] * len(prompt) + answer
        made.append({"id": str(number), "input_ids": prompt + answer, "labels": labels, "prompt_tokens": len(prompt)})
    return made


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("shared", [(0, 0), (60, 60), (0, 60), (60, 0)], ids=str)
def test_several_packs_of_one_size_give_the_gradients_of_the_unrecorded_pass(tiny_model, shared, quantize, dropout):
    lora = Lora(**LORA | {"quantize": quantize, "dropout": dropout})
    chance = random.Random(0)
    packs = [pack(rows(6, count, chance), 10_000)[0] for count in shared * 2]
    found = []
    for recording in (False, True):
        base = load_model(tiny_model, "cuda", torch.bfloat16, quantize=quantize)
        model = add_adapters(base, lora, seed=0).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator("cuda").manual_seed(0))
        fuse(model)
        own_gradients(model)
        recorded = Graphs(base, rows(6, shared[0], random.Random(0))).hidden if recording else lambda piece: None
        losses = []
        for piece in packs:
            loss = pack_loss(base, piece, recorded)
            loss.backward()
            losses.append(loss.item())
        found.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    (plain_losses, plain), (losses, gradients) = found
    assert losses == pytest.approx(plain_losses, rel=0.01)
    for name, gradient in plain.items():
        assert gradient.norm() > 0 and gradient.dtype == torch.float32, name
        assert (gradients[name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_each_replay_drops_others_and_the_seed_decides_which(tiny_model, quantize):
    base = load_model(tiny_model, "cuda", torch.bfloat16, quantize=quantize)
    model = add_adapters(base, Lora(**LORA | {"quantize": quantize, "dropout": 0.3}), seed=0).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator("cuda").manual_seed(0))
    fuse(model)
    own_gradients(model)
    made = rows(6, 0, random.Random(0))
    (piece,) = pack(made, 10_000)
    recorded = Graphs(base, made).hidden
    pack_loss(base, piece, recorded).backward()
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        losses = []
        for _ in range(3):
            model.zero_grad()
            loss = pack_loss(base, piece, recorded)
            loss.backward()
            losses.append(loss.item())
        runs.append((losses, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    (first, gradients), (again, others) = runs
    assert len(set(first)) == 3 and first == again
    assert all(torch.allclose(one, other, rtol=1e-2, atol=1e-4) for one, other in zip(gradients, others, strict=True))
