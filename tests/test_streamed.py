"""A model answered a layer at a time gives the numbers of the model in memory, and never holds more than a layer."""

import functools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from stages import merge
from stages.models.load import load_model
from stages.models.lora import save_adapter
from stages.models.machine import Resolved
from stages.models.merging import plan, read_weights
from stages.models.streamed import in_step
from stages.models.unloaded import Uncovered, give_buffers

ROWS = [
    {"id": str(n), "input_ids": list(range(6, 6 + n)), "labels": [-100] * n, "prompt_tokens": n // 2}
    for n in (40, 7, 23)
]


def machine(dtype: torch.dtype) -> Resolved:
    return Resolved("cpu", ("cpu",), dtype, 64, 4, "batches")


def write_adapter(base: Path, folder: Path, **values) -> Path:
    model = get_peft_model(
        load_model(base, "cpu", torch.float32),
        LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **values),
    )
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.05
    save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("values", "quantize"),
    [(None, None), ({}, None), ({"use_dora": True}, None), ({"lora_dropout": 0.5}, "nf4")],
    ids=["base", "adapter", "DoRA", "dropout and nf4"],
)
def test_its_numbers_are_those_of_the_model_in_memory(values, quantize, dtype, tiny_model, tmp_path, monkeypatch):
    adapter = None if values is None else write_adapter(tiny_model, tmp_path / "adapter", **values)
    ask = functools.partial(merge.answers_logits, tiny_model, adapter, ROWS, machine(dtype), quantize)
    streamed = ask()

    def uncovered(*_) -> None:
        raise Uncovered("told to be")

    monkeypatch.setattr(merge, "plan", uncovered)
    whole = ask()
    assert [logits.shape for logits in streamed] == [(21, 300), (5, 300), (13, 300)]
    assert all(torch.equal(one, other) for one, other in zip(streamed, whole, strict=True))


def streamable(folder: Path):
    planned = plan(folder, None, torch.float32)
    give_buffers(planned.model, set(planned.sources), folder, "cpu")
    return planned.model, read_weights(planned, "cpu", None)


def test_no_more_than_a_layer_is_held_and_each_is_read_once(tiny_model):
    model, read = streamable(tiny_model)
    layers = [f"model.layers.{number}." for number in range(3)]
    asked = []

    def counting(name: str) -> torch.Tensor:
        asked.append(name)
        here = [n for n, p in model.named_parameters(remove_duplicate=False) if p.device.type != "meta"]
        inside = next((layer for layer in layers if name.startswith(layer)), name)
        assert all(other.startswith(inside) for other in here)
        return read(name)

    in_step(model, counting, [functools.partial(merge.answer_logits, model, row, "cpu") for row in ROWS])
    assert sorted(asked) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("failing", [0, 2])
def test_what_fails_in_one_row_ends_all_and_is_what_is_raised(failing, tiny_model):
    model, read = streamable(tiny_model)
    rows = [dict(row) for row in ROWS]
    rows[failing]["input_ids"] = [10**6] * len(rows[failing]["labels"])
    with pytest.raises(IndexError):
        in_step(model, read, [functools.partial(merge.answer_logits, model, row, "cpu") for row in rows])
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_file_that_cannot_be_read_ends_all(tiny_model):
    model, _ = streamable(tiny_model)

    def unreadable(name: str) -> torch.Tensor:
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        in_step(model, unreadable, [functools.partial(merge.answer_logits, model, row, "cpu") for row in ROWS])
