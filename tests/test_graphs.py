"""Recorded passes on a GPU: the gradients of the same packs without recording, whatever comes after one another."""

import contextlib
import functools
import gc
import itertools
import random
import sys
import types

import pytest
import torch

from stages.models import graphs
from stages.models.compiled import any_length, any_weight, compile_pieces
from stages.models.fused import _gated_lora_forward, _takes_part, fuse, group_projections
from stages.models.graphs import MOST, Graphs, _Decoder, chosen, layers_to_try, own_gradients, size_of
from stages.models.load import load_model, pack_loss
from stages.models.lora import add_adapters
from stages.models.packs import IGNORED, pack, sizes
from stages.models.ranks import ALONE, Ranks
from stages.params import Lora
from stages.train import Step, Trainer
from tests.conftest import LORA
from tests.test_packs import flash

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def without_a_gpu(monkeypatch):
    """What builds of PyTorch for a CPU lack; `recording` says whether what is computed now would be recorded."""
    recording = types.SimpleNamespace(now=False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording.now)
    monkeypatch.setattr("stages.models.attention.varlen_attn", flash)
    return recording


def adapted(folder, **more):
    base = load_model(folder, "cpu", torch.float32)
    model = add_adapters(base, Lora(**LORA | more), seed=0).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return base, model


def fuse_as_on_a_gpu(model, monkeypatch):
    base = model.get_base_model()
    modeling = sys.modules[type(base).__module__]  # which compile_pieces changes
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
    fuse(model)
    for module in model.modules():
        group_projections(module)
        if hasattr(module, "gate_proj") and all(map(_takes_part, (module.gate_proj, module.up_proj, module.down_proj))):
            module.forward = types.MethodType(_gated_lora_forward, module)
    compile_pieces(base)


def test_the_largest_size_of_both_kinds_is_recorded_and_others_where_they_save_more_than_recording_takes():
    coming = [(9000, False), (300, False), (700, True)]
    assert chosen(coming, 30_000) == [(9216, False), (768, True)], "one short pack is padded"
    many = [*coming, *[(300, False)] * 20, *[(500, False)] * 20, *[(5000, False)] * 30]
    found = chosen(many, 30_000)
    assert found == chosen(reversed(many), 30_000), "whatever comes first: a run that goes on must choose the same"
    assert found == [(512, False), (5120, False), (9216, False), (768, True)]
    assert chosen(many, 150_000) == [(512, False), (9216, False), (768, True)]
    assert chosen([], 1) == []
    all_sizes = chosen(((tokens, False) for tokens in range(1, 8192, 256)), 0)
    assert len(set(all_sizes)) == MOST and all_sizes[-1] == (8192, False)


def test_the_sizes_chosen_take_no_more_than_any_others(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    chance = random.Random(0)
    for _ in range(20):
        coming = [(chance.randrange(1, 2048), chance.random() < 0.5) for _ in range(8)]
        kinds = {(size_of(tokens), shared) for tokens, shared in coming}
        costs = {}
        for count in range(1, 4):
            for some in itertools.combinations(kinds, count):
                padded = [
                    min((s for s, also in some if also == shared and s >= tokens), default=None)
                    for tokens, shared in coming
                ]
                if None not in padded:
                    costs[frozenset(some)] = sum(padded) + 1000 * count
        assert costs[frozenset(chosen(coming, 1000))] == min(costs.values())


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [(None, 2), (["sliding"] * 5 + ["full"] + ["sliding"] * 2, 6), (["sliding", "full"] * 3, 3), (["full"], 1)],
)
def test_the_pass_before_a_recording_goes_through_a_layer_of_each_kind_beside_the_first(kinds, layers):
    config = types.SimpleNamespace(layer_types=kinds)
    made = [torch.nn.Linear(2, 2) for _ in kinds or range(8)]
    assert layers_to_try(types.SimpleNamespace(config=config, layers=made)) == layers
    made[-1].bias.requires_grad_(False)
    assert layers_to_try(types.SimpleNamespace(config=config, layers=made)) == len(made), "another one's adapters"


@pytest.mark.parametrize("shared", [0, 60])
def test_a_pack_takes_the_next_larger_size_and_the_largest_is_recorded_before_it(
    tiny_model, shared, without_a_gpu, monkeypatch
):
    base, _ = adapted(tiny_model)
    recorded = []

    def record(self, piece, size, shared):
        recorded.append((size, shared))
        self.recorded[size, shared] = lambda *inputs: (size, inputs[0].shape)

    monkeypatch.setattr(Graphs, "_record", record)
    monkeypatch.setattr(graphs, "MOST_RECORDING", 0)
    made = rows(20, shared, random.Random(0))
    coming = [(2048, bool(shared)), (1024, bool(shared)), (256, not shared)]
    passes = Graphs(base, made, coming)
    (piece,) = pack(made, 10_000)
    assert 256 < len(piece) < 1024
    assert passes.hidden(piece) == (1024, (1, 1024)) == passes.hidden(piece)
    assert recorded == [(2048, bool(shared)), (1024, bool(shared))]
    assert Graphs(base, made, [(256, bool(shared)), (2048, not shared)]).hidden(piece) is None, (
        "too small, another kind"
    )


@pytest.mark.parametrize("device", [0, 1])
def test_the_sizes_of_packs_are_known_before_they_are_laid(device):
    chance = random.Random(0)
    steps = [rows(count, shared, chance) for count, shared in ((20, 0), (20, 60), (1, 0), (7, 40))]
    for step in (*steps, [row for one in steps for row in one]):
        own = Ranks(device, 2).share([{**row, "id": str(i)} for i, row in enumerate(step)], 300)
        laid = [(len(piece), any(one.shared_end for one in piece.segments)) for piece in pack(own, 300)]
        assert sizes(own, 300) == laid


# adapters on the third layer's MLP alone
THIRD = [f"2.mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("more", [{}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["up_proj"]},
                                  {"target_modules": ["q_proj", *THIRD]}, {"dropout": 0.3}], ids=str)  # fmt: skip
@pytest.mark.parametrize("alike", [True, False])
def test_what_is_compiled_for_a_recording_was_compiled_by_the_pass_before_it(
    tiny_model, more, alike, without_a_gpu, monkeypatch
):
    """By what the compiler distinguishes: a recording that must compile ends the training."""
    calls = {False: set(), True: set()}

    def any_length(function):
        def called(*arguments, **options):
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
            kinds = tuple((x.dim(), x.dtype, x.requires_grad, x.stride(-1) == 1) for x in tensors)
            calls[without_a_gpu.now].add((function, torch.is_grad_enabled(), kinds))
            return function(*arguments, **options)

        return called

    monkeypatch.setattr("stages.models.compiled.any_length", any_length)
    monkeypatch.setattr("stages.models.fused._of", lambda function, tensor, compiled=any_length: any_length(function))
    base, model = adapted(tiny_model, **more)
    if alike:
        base.config.layer_types = ["full_attention"] * len(base.get_decoder().layers)
    fuse_as_on_a_gpu(model, monkeypatch)
    own_gradients(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad += 1
    before = [parameter.grad for parameter in trained]
    made = rows(20, 0, random.Random(0))
    (piece,) = pack(made, 10_000)
    passes = Graphs(base, made, sizes(made, 10_000))
    inputs = passes._inputs(piece, 1024, False)
    decoder = _Decoder(base, passes.longest).train()
    passes._try(decoder, inputs)
    assert all(parameter.grad is one and (one == 1).all() for parameter, one in zip(trained, before, strict=True))
    without_a_gpu.now = True
    hidden = decoder(*inputs)
    torch.autograd.grad(hidden, trained, torch.ones_like(hidden), allow_unused=True)
    assert calls[True] and calls[True] <= calls[False]


@pytest.fixture
def asked(monkeypatch):
    """What a compiler is asked for, each with the sizes of what goes in; nothing is compiled."""
    found, really = [], torch.compile
    forget_compiled()

    def backend(module, inputs):
        shapes = [(tuple(map(str, x.shape)), tuple(map(str, x.stride()))) for x in inputs if torch.is_tensor(x)]
        found.append((module.code, *shapes))
        return module.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, options=None, **more: really(function, backend=backend, **more)
    )
    monkeypatch.setattr("stages.models.fused._of", lambda function, tensor, how=any_length: how(function))
    yield found
    forget_compiled()


def forget_compiled():
    any_length.cache_clear()
    any_weight.cache_clear()
    torch._dynamo.reset()


def test_the_compiler_is_asked_for_each_piece_once(tiny_model, asked, without_a_gpu, monkeypatch):
    base, model = adapted(tiny_model)
    fuse_as_on_a_gpu(model, monkeypatch)
    for count in (20, 7):
        (piece,) = pack(rows(count, 0, random.Random(0)), 10_000)
        pack_loss(base, piece).backward()
    assert asked
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_while_a_pass_is_recorded(tiny_model, fails, without_a_gpu, monkeypatch):
    base, model = adapted(tiny_model)
    own_gradients(model)
    collecting = []

    def record(decoder, inputs, **options):
        collecting.append(gc.isenabled())
        if fails:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: contextlib.nullcontext())
    made = rows(20, 0, random.Random(0))
    (piece,) = pack(made, 10_000)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        Graphs(base, made, sizes(made, 10_000))._record(piece, 1024, False)
    assert collecting == [False]
    assert gc.isenabled()


def adder(parameter: torch.nn.Parameter) -> torch.autograd.graph.Node:
    """What adds to the parameter's gradient: one while a pass lives that it is in, then another."""
    return torch.autograd.graph.get_gradient_edge(parameter).node


def test_nothing_of_a_pack_that_was_not_recorded_lives_while_the_next_one_is(tiny_model, without_a_gpu, monkeypatch):
    base, model = adapted(tiny_model)
    own_gradients(model)
    made = rows(27, 200, random.Random(0))
    packs = pack(made, 700)
    passes = Graphs(base, made, sizes(made, 700))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recorded, living = [], []

    def record(decoder, inputs, **options):
        recorded.append(inputs)
        living.extend(parameter for parameter in trained if "earlier" in adder(parameter).metadata)
        return decoder

    def backward(loss):
        for parameter in trained:
            adder(parameter).metadata["earlier"] = True
        loss.backward()

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: contextlib.nullcontext())
    fits = [passes._inputs(piece, 768, True) is not None for piece in packs]
    trainer = types.SimpleNamespace(
        ranks=ALONE,
        args=types.SimpleNamespace(seed=0, device="cpu"),
        state=types.SimpleNamespace(global_step=0),
        accelerator=types.SimpleNamespace(backward=backward),
        graphs=passes,
        adapters=trained,
        pod=None,
        _passes=lambda *_, **__: contextlib.nullcontext(),
    )
    Trainer.training_step(trainer, model, Step(packs, 1, 1, []))
    assert fits[0] is False and recorded, "the first has no graph, a later one has"
    assert not living


def _seen(found: dict[int, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return found.setdefault(x.data_ptr(), x)


def test_a_pass_that_is_not_recorded_keeps_what_goes_into_each_layer_and_gives_the_same_gradients(
    tiny_model, without_a_gpu
):
    made, kept, gradients = rows(20, 0, random.Random(0)), [], []
    for recording in (False, True):
        base, model = adapted(tiny_model)
        own_gradients(model)
        recorded = Graphs(base, made, []).hidden if recording else lambda piece: None
        (piece,) = pack(made, 10_000)
        by_address: dict[int, torch.Tensor] = {}
        keep = functools.partial(_seen, by_address)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = pack_loss(base, piece, recorded)
        kept.append(sum(x.nbytes for x in by_address.values() if not isinstance(x, torch.nn.Parameter)))
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    layers = len(base.get_decoder().layers)
    assert kept[1] < kept[0] * 1.4 / layers
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
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_every_mlp_is_made_one_and_nothing_is_compiled_to_find_out(tiny_model, quantize):
    forget_compiled()
    model = add_adapters(load_model(tiny_model, "cuda", torch.bfloat16, quantize=quantize), Lora(**LORA), seed=0)
    fuse(model)
    mlps = [module for module in model.modules() if hasattr(module, "gate_proj")]
    assert mlps and all(mlp.forward.__func__ is _gated_lora_forward for mlp in mlps)
    assert any_length.cache_info().currsize == any_weight.cache_info().currsize == 0


@on_gpu
@pytest.mark.parametrize("known", [0, 1, 4])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("shared", [(0, 0), (60, 60), (0, 60), (60, 0)], ids=str)
def test_several_packs_give_the_gradients_of_pefts_own_lines_whether_all_some_or_none_of_them_are_recorded(
    tiny_model, shared, quantize, dropout, known
):
    lora = Lora(**LORA | {"quantize": quantize, "dropout": dropout})
    chance = random.Random(0)
    packs = [pack(rows(6, count, chance), 10_000)[0] for count in shared * 2]
    found = []
    for fused, recording in ((False, False), (True, False), (True, True)):
        base = load_model(tiny_model, "cuda", torch.bfloat16, quantize=quantize)
        model = add_adapters(base, lora, seed=0).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator("cuda").manual_seed(0))
        if fused:
            fuse(model)
        own_gradients(model)
        coming = [(len(piece), any(one.shared_end for one in piece.segments)) for piece in packs[:known]]
        of = rows(6, shared[0], random.Random(0))
        recorded = Graphs(base, of, coming).hidden if recording else lambda piece: None
        losses = []
        for piece in packs:
            loss = pack_loss(base, piece, recorded)
            loss.backward()
            losses.append(loss.item())
        found.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    (plain_losses, plain), (fused_losses, unrecorded), (losses, gradients) = found
    assert losses == pytest.approx(plain_losses, rel=0.01) and losses == pytest.approx(fused_losses, rel=0.01)
    # on int8 PEFT's lines and these differ by 5 to 6.5%, read on an H200: bfloat16's rounding alone puts the one up to
    # 4% and the other 3 to 6.5% beside float32's gradients, read on a CPU
    within = 0.1 if quantize == "int8" else 0.05
    for name, gradient in plain.items():
        assert gradient.norm() > 0 and gradient.dtype == torch.float32, name
        assert (gradients[name] - gradient).norm() < within * gradient.norm(), name
        assert (gradients[name] - unrecorded[name]).norm() < 0.05 * unrecorded[name].norm(), name


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
    recorded = Graphs(base, made, sizes(made, 10_000)).hidden
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
