"""Packed rows: nothing lost, nothing seen across rows, the same loss and gradients as one row at a time."""

import dataclasses
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from stages.models.attention import seen, takes_flash
from stages.models.graphs import own_gradients, size_of
from stages.models.load import _hidden, mean_loss, pack_loss, packed_logits, row_losses
from stages.models.loss import head_loss
from stages.models.packs import IGNORED, SHARED_AT_LEAST, Sight, pack, padded, sight
from stages.models.schedule import schedule

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES = {
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=24, layer_types=["sliding_attention", "full_attention"])
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}


def row(prompt: list[int], answer: list[int]) -> dict:
    labels = [IGNORED] * len(prompt) + answer
    return {
        "id": str(prompt + answer),
        "input_ids": prompt + answer,
        "labels": labels,
        "prompt_tokens": len(prompt),
    }


def rows(seed: int = 0) -> list[dict]:
    """Rows of three schemas and some of their own, prompts 5 to 70 tokens, answers 1 to 9."""
    chance = random.Random(seed)
    tokens = lambda count: [chance.randrange(2, 97) for _ in range(count)]  # noqa: E731
    schemas = [tokens(45), tokens(60), tokens(SHARED_AT_LEAST - 10)]
    made = [
        row(schema + tokens(chance.randint(3, 10)), tokens(chance.randint(1, 9)))
        for schema in schemas
        for _ in range(4)
    ]
    made += [row(tokens(chance.randint(5, 40)), tokens(chance.randint(1, 9))) for _ in range(5)]
    chance.shuffle(made)
    return made


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    torch.manual_seed(0)
    made = FAMILIES[request.param]().eval()
    torch.nn.init.normal_(made.get_input_embeddings().weight, std=0.5)
    made.set_attn_implementation("packed")
    return made


def reference_loss(model, one: dict) -> torch.Tensor:
    """transformers' own way, eager and one row at a time."""
    model.set_attn_implementation("eager")
    logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0, :-1].float()
    model.set_attn_implementation("packed")
    return F.cross_entropy(logits, torch.tensor(one["labels"][1:]), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("tokens_per_pack", [1, 100, 10_000])
def test_packed_rows_have_the_loss_of_rows_one_by_one(model, tokens_per_pack):
    with torch.no_grad():
        expected = sum(reference_loss(model, one) for one in rows())
        found = sum(pack_loss(model, piece) for piece in pack(rows(), tokens_per_pack))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_rows_have_the_gradients_of_rows_one_by_one(model):
    model.get_output_embeddings().weight.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sum(reference_loss(model, one) for one in rows()), weights)
    found = torch.autograd.grad(sum(pack_loss(model, piece) for piece in pack(rows(), 150)), weights)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 2e-5 * theirs.norm()


def test_a_change_in_one_row_leaves_the_other_rows_logits(model):
    originals = rows()
    changed = [dict(one) for one in originals]
    changed[0]["input_ids"] = [(token + 1) % 97 for token in changed[0]["input_ids"]]
    with torch.no_grad():
        for number, (before, after) in enumerate(zip(originals, changed, strict=True)):
            one, other = (pack([piece], 1000)[0] for piece in (before, after))
            same = torch.equal(packed_logits(model, one, slice(None)), packed_logits(model, other, slice(None)))
            assert same == (number > 0)
        losses = [
            [float(pack_loss(model, piece)) for piece in pack([a, b], 1000)]
            for a, b in ((originals[0], originals[1]), (changed[0], originals[1]))
        ]
        alone = float(pack_loss(model, pack([originals[1]], 1000)[0]))
        for total, first in zip(losses, (originals[0], changed[0]), strict=True):
            assert sum(total) - float(pack_loss(model, pack([first], 1000)[0])) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(1, 1, None), (7, 7, 3), (5, 9, 3), (5, 9, None), (70, 97, 16)]
)
def test_a_mask_shows_a_query_the_keys_up_to_its_own_as_many_as_its_window_holds(queries, keys, window):
    place = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    expected = (place >= 0) & (place < (window or keys))
    assert torch.equal(seen(queries, keys, window, torch.device("cpu")), expected)


def test_masks_of_however_many_lengths_are_parts_of_a_few():
    masks = [seen(length, length, 16, torch.device("cpu")) for length in range(1, 601)]
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 11  # of 1, 2, 4, … 1,024 tokens


def test_every_supervised_token_is_laid_once_and_shared_beginnings_are_computed_once():
    packs = pack(rows(), 10_000)
    assert sum(piece.supervised for piece in packs) == sum(
        label != IGNORED for one in rows() for label in one["labels"]
    )
    assert sum(piece.row_tokens for piece in packs) == sum(len(one["input_ids"]) for one in rows())
    computed = sum(piece.input_ids.numel() for piece in packs)
    assert computed <= sum(len(one["input_ids"]) for one in rows()) - 3 * (45 + 60)


@pytest.mark.parametrize("budget", [60, 128, 300])
def test_packs_stay_in_the_budget_unless_one_row_alone_exceeds_it(budget):
    for piece in pack(rows(), budget):
        assert piece.input_ids.numel() <= budget or len(piece.segments) == 1


def test_a_supervised_beginning_is_never_shared():
    answer = list(range(2, 60))
    twins = [{"id": "a", "input_ids": [1, *answer], "labels": [IGNORED, *answer], "prompt_tokens": 1}] * 2
    (piece,) = pack(twins, 1000)
    assert piece.supervised == 2 * len(answer)


def test_the_head_loss_is_that_of_double_precision_with_and_without_a_softcap():
    torch.manual_seed(1)
    head = torch.nn.Linear(16, 301, bias=False).requires_grad_(False)
    targets = torch.randint(301, (150,))
    for softcap in (None, 1.5):
        hidden = torch.randn(150, 16, requires_grad=True)
        exact = hidden.detach().double().requires_grad_()
        logits = exact @ head.weight.double().T
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        expected = F.cross_entropy(logits, targets, reduction="sum")
        expected.backward()
        found = head_loss(hidden, head, targets, softcap).sum()
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        assert float((hidden.grad - exact.grad).norm() / exact.grad.norm()) < 1e-6


def test_a_head_that_is_trained_gets_gradients():
    head = torch.nn.Linear(8, 20, bias=False)
    head_loss(torch.randn(5, 8), head, torch.randint(20, (5,))).sum().backward()
    assert head.weight.grad.norm() > 0


def test_the_mean_loss_does_not_depend_on_the_budget(model):
    with torch.no_grad():
        few, many = (mean_loss(row_losses(model, rows(), budget).values()) for budget in (40, 4000))
        assert few == pytest.approx(many, rel=1e-5)


def test_each_rows_loss_is_its_own_whatever_it_is_packed_with(model):
    together = row_losses(model, rows(), 4000)
    for row in rows():
        alone = row_losses(model, [row], 4000)[row["id"]]
        assert together[row["id"]] == (pytest.approx(alone[0], rel=1e-5), alone[1])
        assert alone[1] == sum(label != IGNORED for label in row["labels"])


@pytest.mark.parametrize("order", ["shuffled", "shared"])
def test_an_epoch_takes_every_row_once(order):
    planned = schedule(rows(), 4, 2.0, 0, order)
    first, second = planned[: len(planned) // 2], planned[len(planned) // 2 :]
    for epoch in (first, second):
        assert sorted(number for step in epoch for number in step) == list(range(len(rows())))
    assert first != second


def test_part_of_an_epoch_takes_its_share_of_the_steps():
    assert len(schedule(rows(), 4, 0.5, 0, "shuffled")) == 3
    assert len(schedule(rows(), 4, 1.2, 0, "shuffled")) == 6
    assert len(schedule(rows(), 4, 0.001, 0, "shuffled")) == 1


def test_the_schedule_follows_the_seed_alone():
    assert schedule(rows(), 4, 1.0, 3, "shared") == schedule(rows(), 4, 1.0, 3, "shared")
    assert schedule(rows(), 4, 1.0, 3, "shared") != schedule(rows(), 4, 1.0, 4, "shared")


def test_shared_order_puts_rows_that_begin_alike_into_one_step():
    def computed(order):
        steps = schedule(rows(), 4, 1.0, 0, order)
        return sum(p.input_ids.numel() for step in steps for p in pack([rows()[i] for i in step], 10_000))

    assert computed("shared") < computed("shuffled")


def flash(query, key, value, queries, keys, *_most, scale=None, window_size=(-1, 0), **_):
    """What varlen_attn computes on a GPU, segment by segment. query: [T, H, D]; key, value: [K, G, D]."""
    out = torch.zeros_like(query)
    pairs = (itertools.pairwise(x.tolist()) for x in (queries, keys))
    for (q_start, q_end), (k_start, k_end) in zip(*pairs, strict=True):
        q, k, v = query[q_start:q_end], key[k_start:k_end], value[k_start:k_end]
        ahead = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (ahead >= 0) & ((ahead <= window_size[0]) | (window_size[0] < 0))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        made = F.scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=scale, enable_gqa=True)
        out[q_start:q_end] = made[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("family", ["gemma3", "llama"])
@pytest.mark.parametrize("tokens", [80, 10_000])
def test_packs_as_a_gpus_attention_takes_them_give_the_same_hidden_states(family, tokens, monkeypatch):
    monkeypatch.setattr("stages.models.attention.varlen_attn", flash)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation("packed")
    for piece in pack(rows(), tokens):
        expected = packed_logits(model, piece, slice(None))
        found = packed_logits(model, dataclasses.replace(piece, sight=sight(piece.segments)), slice(None))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_pack_padded_to_a_fixed_size_gives_the_same_hidden_states(monkeypatch):
    monkeypatch.setattr("stages.models.attention.varlen_attn", flash)
    model = FAMILIES["gemma3"]().eval()
    model.set_attn_implementation("packed")
    for piece in pack(rows(), 400):
        longest = max(segment.end - segment.start + segment.shared_end for segment in piece.segments)
        ids, positions, *bounds = padded(piece, 512, 60, 2048, longest)
        assert ids.shape == positions.shape == (1, 512)
        assert [len(x) for x in bounds] == [61, 61, 2048][: len(bounds)]
        laid = Sight(*bounds[:2], bounds[2] if len(bounds) == 3 else None, longest, longest)
        whole = dataclasses.replace(piece, input_ids=ids, position_ids=positions, sight=laid)
        found = packed_logits(model, whole, slice(0, len(piece)))
        torch.testing.assert_close(found, packed_logits(model, piece, slice(None)), rtol=1e-4, atol=1e-5)


def test_a_pack_says_that_it_shares_exactly_where_there_are_keys_to_gather():
    """By which graphs.py knows the tensors of one recorded pass from those of another."""
    apart = [{**row, "input_ids": [number, *row["input_ids"]]} for number, row in enumerate(rows())]
    apart = [{**row, "labels": [IGNORED, *row["labels"]]} for row in apart]
    for given, shares in ((apart, False), (rows(), True)):
        (piece,) = pack(given, 10_000)
        assert len(piece.segments) > 2
        assert any(segment.shared_end for segment in piece.segments) is shares
        assert (sight(piece.segments).index is not None) is shares


class _Leave(torch.autograd.Function):
    """The keys as they are, and a gradient that is not a number for those that no segment sees: the GPU's kernel
    leaves that memory as it finds it."""

    @staticmethod
    def forward(ctx, keys, seen: int):
        ctx.seen = seen
        return keys.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[ctx.seen :] = float("nan")
        return gradient, None


def test_padding_gives_no_gradient_whatever_the_kernel_leaves_behind(monkeypatch):
    def leaving(query, key, value, queries, keys, *more, **options):
        key, value = (_Leave.apply(x, int(keys[-1])) for x in (key, value))
        return flash(query, key, value, queries, keys, *more, **options)

    monkeypatch.setattr("stages.models.attention.varlen_attn", leaving)
    model = FAMILIES["gemma3"]()
    model.set_attn_implementation("packed")
    (piece,) = pack(rows()[:8], 10_000)
    assert any(segment.shared_end for segment in piece.segments)
    longest = max(segment.end - segment.start + segment.shared_end for segment in piece.segments)
    ids, positions, queries, keys, index = padded(piece, 1024, 60, 4096, longest)
    laid = Sight(queries, keys, index, longest, longest)
    gradients = []
    for one in (piece, dataclasses.replace(piece, input_ids=ids, position_ids=positions, sight=laid)):
        model.zero_grad()
        pack_loss(model, piece, lambda _, one=one: _hidden(model, one)).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_are_added_to_tensors_that_stay_the_same():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    own_gradients(layer)
    held = layer.weight.grad
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is held and held.sum() == 6
    layer.zero_grad()
    assert layer.weight.grad is held and held.sum() == 0
    assert layer.bias.grad is None


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_a_processor_does_not_take_the_kernel_of_a_gpu(family):
    assert not takes_flash(FAMILIES[family]())


def test_a_pack_that_does_not_fit_the_fixed_size_is_not_padded():
    (piece,) = pack(rows(), 10_000)
    shared = sum(segment.end - segment.start + segment.shared_end - segment.shared_start for segment in piece.segments)
    longest = max(segment.end for segment in piece.segments)
    assert padded(piece, 2048, len(piece.segments) - 1, 10_000, longest) is None
    assert padded(piece, 2048, 100, shared - 1, longest) is None
    assert padded(piece, 2048, 100, 10_000, 20) is None
    assert padded(piece, 2048, 100, 10_000, longest) is not None


def test_sizes_grow_by_an_eighth_at_most_where_packs_are_large():
    sizes = sorted({size_of(tokens) for tokens in range(1, 40_000)})
    assert sizes[:4] == [256, 512, 768, 1024]
    assert all(size_of(size) == size for size in sizes)
    assert all(size_of(tokens) >= tokens for tokens in range(1, 40_000))
    assert all(after <= before * 1.125 for before, after in itertools.pairwise(sizes) if before >= 2048)
