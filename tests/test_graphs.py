"""Recorded passes on a GPU: the gradients of the same packs without recording, whatever comes after one another."""

import functools
import random

import pytest
import torch

from stages.models import graphs
from stages.models.fused import fuse
from stages.models.graphs import MOST, Graphs, own_gradients, size_for, size_of
from stages.models.load import load_model, pack_loss
from stages.models.lora import add_adapters
from stages.models.packs import IGNORED, pack
from stages.params import Lora
from tests.conftest import LORA

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_largest_size_is_recorded_before_any_other_and_once_there_are_enough_the_next_larger_serves():
    recorded = {}
    assert size_for(300, False, 4096, recorded) == 512
    assert list(recorded) == [(4096, False), (512, False)]
    assert size_for(300, True, 4096, recorded) == 512
    for tokens in range(1, 4096, 256):
        size_for(tokens, False, 4096, recorded)
    assert len(recorded) == MOST
    assert size_for(1300, False, 4096, recorded) == 1536 and size_for(1300, True, 4096, recorded) == 4096
    assert size_for(5000, False, 4096, recorded) is None, "longer than what was said to be the largest"
    assert len(recorded) == MOST


def test_a_run_that_goes_on_pads_its_packs_as_if_nothing_had_happened():
    chance = random.Random(0)
    packs = [(chance.randint(1, 8192), chance.random() < 0.3) for _ in range(200)]
    undisturbed, recorded = {}, {}
    for tokens, shared in packs:
        assert size_for(tokens, shared, 8192, undisturbed) == size_for(tokens, shared, 8192, recorded)
        recorded = dict.fromkeys(recorded)


def _seen(found: dict[int, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return found.setdefault(x.data_ptr(), x)


def test_a_pass_that_is_not_recorded_keeps_what_goes_into_each_layer_and_gives_the_same_gradients(
    tiny_model, monkeypatch
):
    for name in ("graph_pool_handle", "is_current_stream_capturing"):  # which builds for a CPU lack
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    made, kept, gradients = rows(20, 0, random.Random(0)), [], []
    for recording in (False, True):
        base = load_model(tiny_model, "cpu", torch.float32)
        model = add_adapters(base, Lora(**LORA), seed=0).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        own_gradients(model)
        recorded = Graphs(base, made, 0).hidden if recording else lambda piece: None
        (piece,) = pack(made, 10_000)
        assert len(piece) > size_of(max(len(row["input_ids"]) for row in made)), "no graph fits it"
        by_address: dict[int, torch.Tensor] = {}
        keep = functools.partial(_seen, by_address)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = pack_loss(base, piece, recorded)
        kept.append(sum(x.nbytes for x in by_address.values() if not isinstance(x, torch.nn.Parameter)))
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert kept[1] < kept[0] / 4
    assert all(gradient.norm() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def rows(count: int, shared: int, chance: random.Random) -> list[dict]:
    beginning = [chance.randrange(6, 60) for _ in range(shared)]
    made = []
    for number in range(count):
        prompt = beginning + [chance.randrange(6, 60) for _ in range(chance.randint(8, 30))]
        answer = [chance.randrange(6, 60) for _ in range(chance.randint(2, 8))]
        labels = [IGNORED] * len(prompt) + answer
        made.append({"id": str(number), "input_ids": prompt + answer, "labels": labels, "prompt_tokens": len(prompt)})
    return made


@on_gpu
@pytest.mark.parametrize("sizes", [0, 1, MOST])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("shared", [(0, 0), (60, 60), (0, 60), (60, 0)], ids=str)
def test_several_packs_give_the_gradients_of_the_unrecorded_pass_whether_all_some_or_none_of_them_are_recorded(
    tiny_model, shared, quantize, dropout, sizes, monkeypatch
):
    monkeypatch.setattr(graphs, "MOST", sizes)
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
        recorded = (
            Graphs(base, rows(6, shared[0], random.Random(0)), 10_000).hidden if recording else lambda piece: None
        )
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


@on_gpu
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
    recorded = Graphs(base, made, 10_000).hidden
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
