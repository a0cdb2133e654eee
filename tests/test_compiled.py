"""Norms and rotary embedding as a GPU's kernels want them laid out: the same numbers, here uncompiled."""

import functools
import importlib
import random
import sys
import threading
import types

import pytest
import torch
import transformers

from stages.models import compiled
from stages.models.load import load_model, pack_loss
from stages.models.lora import add_adapters
from stages.models.packs import pack
from stages.params import Lora
from tests import tiny_families
from tests.conftest import LORA
from tests.test_graphs import rows

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def made(kind: str) -> transformers.PreTrainedModel:
    """Tiny, with adapters that are no longer zero."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind.replace('Gemma3', 'Gemma3Text')}Config")(**SIZES)
    model = add_adapters(getattr(transformers, f"{kind}ForCausalLM")(config), Lora(**LORA), seed=0).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name or name.endswith("norm.weight"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture
def pieces(monkeypatch):
    """compile_pieces without a compiler; what it changes of transformers ends with the test."""
    monkeypatch.setattr(compiled, "any_length", lambda function: function)

    def change(model):
        modeling = sys.modules[type(model).__module__]
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
        compiled.compile_pieces(model)

    return change


# Gemma 3 and Qwen 3 have norms of queries and keys too
@pytest.mark.parametrize("kind", ["Gemma2", "Gemma3", "Llama", "Qwen3"])
def test_a_model_whose_norms_and_rotary_embedding_are_laid_out_anew_has_the_gradients_that_it_had(kind, pieces):
    ids = torch.randint(1, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for change in (lambda model: None, pieces):
        model = made(kind)
        change(model.get_base_model())
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain_loss, plain), (loss, gradients) = found
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


def own_gradient(norm: torch.nn.Module, x: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    norm(x).backward(outer)
    return x.grad


@pytest.mark.parametrize("kind", ["gemma3.modeling_gemma3.Gemma3RMSNorm", "llama.modeling_llama.LlamaRMSNorm"])
@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_the_gradient_through_a_norm_is_that_of_float64(kind, dtype, within, pieces):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    module, name = kind.rsplit(".", 1)
    model = torch.nn.Module()
    model.config = transformers.LlamaConfig()
    model.norm = getattr(importlib.import_module(f"transformers.models.{module}"), name)(32, eps=1e-3).to(dtype)
    model.norm.weight = torch.nn.Parameter(draw(32).to(dtype), requires_grad=False)
    x, outer = draw(2, 5, 32).to(dtype), draw(2, 5, 32).to(dtype)
    x[0, 0] = 0  # where ε is all there is
    exact, weight = x.double().requires_grad_(), model.norm.weight.double() + ("gemma" in kind)
    (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-3) * weight).backward(outer.double())
    compiled.compile_pieces(model)
    assert type(model.norm(x.clone().requires_grad_()).grad_fn).__name__ == "NormBackward"
    found = own_gradient(model.norm, x, outer).double()
    assert (found - exact.grad).norm() < within * exact.grad.norm()


class TwiceRMSNorm(torch.nn.Module):
    """As no family has it: what is added to the weight is 2."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (2 + self.weight)


def test_a_norm_that_computes_something_else_keeps_autograds_own_way(pieces):
    model = torch.nn.Module()
    model.config, model.norm = transformers.LlamaConfig(), TwiceRMSNorm()
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, outer = draw(3, 8), draw(3, 8)
    expected = own_gradient(model.norm, x, outer)
    compiled.compile_pieces(model)
    assert torch.equal(own_gradient(model.norm, x, outer), expected)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_family_has_the_gradients_that_it_had(family, tmp_path, pieces):
    tiny_families.write(family, tmp_path)
    (piece,) = pack(rows(6, 40, random.Random(0)), 10_000)
    found = []
    for change in (lambda model: None, pieces):
        base = load_model(tmp_path, "cpu", torch.float32)
        model = add_adapters(base, Lora(**LORA), seed=0).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        change(base)
        pack_loss(base, piece).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, gradients = found
    assert plain.keys() == gradients.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_a_norm_whose_weight_is_trained_keeps_autograds_own_way(pieces):
    model = made("Llama").get_base_model()
    norm = model.model.norm
    norm.weight.requires_grad_()
    pieces(model)
    norm(torch.ones(1, 3, 32).cumsum(-1)).sum().backward()
    assert norm.weight.grad.norm() > 0


class GatedRMSNorm(TwiceRMSNorm):
    """As some state space models have it."""

    def forward(self, x, gate=1.0):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight * gate


def test_a_norm_of_more_than_x_is_given_all_of_it(pieces):
    model = torch.nn.Module()
    model.config, model.norm = transformers.LlamaConfig(), GatedRMSNorm()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = model.norm(x, gate=x)
    compiled.compile_pieces(model)
    assert torch.equal(model.norm(x, gate=x), expected)


def test_a_rotary_embedding_of_an_unknown_family_keeps_autograds_own_way(pieces, monkeypatch):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotary

    modeling = types.ModuleType("modeling_odd")
    modeling.apply_rotary_pos_emb = rotary
    monkeypatch.setitem(sys.modules, "modeling_odd", modeling)
    model = type("Odd", (torch.nn.Module,), {"__module__": "modeling_odd"})()
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    query, key, cos, sin = draw(1, 4, 5, 8), draw(1, 2, 5, 8), draw(1, 5, 8), draw(1, 5, 8)  # a pair's angles differ

    def gradient() -> torch.Tensor:
        x = query.clone().requires_grad_()
        modeling.apply_rotary_pos_emb(x, key, cos, sin)[0].square().sum().backward()
        return x.grad

    expected = gradient()
    model.config = transformers.Qwen2Config()
    compiled.compile_pieces(model)
    assert modeling.apply_rotary_pos_emb is not rotary
    assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("compiler", [compiled.any_length, compiled.any_weight])
def test_a_function_is_compiled_for_as_many_shapes_in_autograds_thread_as_in_any(compiler, monkeypatch):
    asked, really = [], torch.compile

    def backend(module, inputs):
        asked.append(module)
        return module.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, options=None, **more: really(function, backend=backend, **more)
    )
    torch._dynamo.reset()
    function = compiler.__wrapped__(lambda x: x * 2 + 1)
    shapes = [(3,) * dimensions for dimensions in range(2, 16)]
    thread = threading.Thread(target=lambda: [function(torch.ones(shape)) for shape in shapes])
    thread.start()
    thread.join()
    torch._dynamo.reset()
    assert len(asked) == len(shapes)


@pytest.mark.parametrize("heads_first", [True, False])
def test_queries_and_keys_are_turned_in_the_order_in_which_they_lie_in_memory(heads_first):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotary

    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    # attention makes [1, T, heads, C] of a projection's rows and turns it
    query, key = (draw(1, 5, heads, 8).transpose(1, 2) for heads in (4, 2))
    if not heads_first:
        query, key = query.contiguous(), key.contiguous()
    cos, sin = draw(1, 5, 8), draw(1, 5, 8)
    seen = []

    def watched(*arguments, **options):
        seen.append(arguments[0].shape)
        return rotary(*arguments, **options)

    found = compiled.by_token(rotary, watched, turned_back=False)(query, key, cos, sin)
    expected = rotary(query, key, cos, sin)
    assert seen == [torch.Size([1, 5, 4, 8] if heads_first else [1, 4, 5, 8])]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.transpose(1, 2).is_contiguous() == heads_first
