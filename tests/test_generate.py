"""Batched generation against transformers' own, one prompt at a time."""

import pytest
import torch
from conftest import write_tiny_model
from transformers import AutoModelForCausalLM

from stages.models.generate import Answer, attention_for_generation, generate
from stages.models.vllm_engine import ended

LENGTHS = [3, 40, 7, 25, 12, 3, 31, 18, 5, 22]
NEW = 24


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module", params=[4, 16, 512], ids=lambda window: f"window {window}")
def model(request, tmp_path_factory):
    """In float32, so that a batch's other shape rounds nothing over to another token; windows short and long."""
    model = load(write_tiny_model(tmp_path_factory.mktemp("generate"), seed=3, sliding_window=request.param))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [[2, *torch.randint(6, 290, (length - 1,), generator=draw).tolist()] for length in LENGTHS]


def one_at_a_time(model, prompts, stops: set[int], limit: int) -> list[Answer]:
    """The answers that transformers' greedy search gives."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        end = sorted(stops) or None
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, eos_token_id=end
        )
        tokens = out[0, len(prompt) :].tolist()
        stopped = bool(tokens) and tokens[-1] in stops
        found.append(Answer(tokens[:-1] if stopped else tokens, stopped))
    return found


@pytest.fixture(scope="module")
def unstopped(model, prompts) -> list[Answer]:
    return one_at_a_time(model, prompts, set(), NEW)


@pytest.fixture(scope="module")
def stops(unstopped) -> set[int]:
    """Tokens that end some answers early, some late, and others not at all."""
    return {unstopped[n].tokens[at] for n, at in ((0, 2), (1, 9), (3, 15))}


@pytest.fixture(scope="module")
def stopped(model, prompts, stops) -> list[Answer]:
    return one_at_a_time(model, prompts, stops, NEW)


@pytest.mark.parametrize("rows_per_batch", [1, 4, 64])
def test_answers_are_those_of_transformers_with_rows_leaving_the_batch(rows_per_batch, model, prompts, stops, stopped):
    assert len({len(answer.tokens) for answer in stopped}) > 3, "no rows leave the batch: choose other weights"
    assert {answer.stopped for answer in stopped} == {True, False}
    assert generate(model, prompts, stops, NEW, rows_per_batch) == stopped


def test_answers_without_a_stop_end_at_the_limit(model, prompts, unstopped):
    found = generate(model, prompts, set(), NEW, 4)
    assert found == unstopped
    assert all(len(answer.tokens) == NEW and not answer.stopped for answer in found)


def test_a_stop_at_once_is_an_empty_answer(model, prompts):
    first = {answer.tokens[0] for answer in generate(model, prompts, set(), 1, 64)}
    assert generate(model, prompts, first, NEW, 4) == [Answer([], True)] * len(prompts)


def test_every_batch_is_told_of(model, prompts):
    told = []
    generate(model, prompts, set(), 1, 4, on_batch=told.append)
    assert told == [4, 4, 2]


def test_no_prompts_have_no_answers(model):
    assert generate(model, [], {1}, NEW, 4) == []


def test_a_model_that_caps_its_attention_generates_with_eager(model):
    assert attention_for_generation(model) == "grouped"
    model.config.attn_logit_softcapping = 50.0
    try:
        assert attention_for_generation(model) == "eager"
    finally:
        model.config.attn_logit_softcapping = None


@pytest.mark.parametrize("rows_per_batch", [2, 64])
def test_a_beginning_that_all_prompts_share_is_computed_once_and_changes_no_answer(
    rows_per_batch, model, prompts, stops, monkeypatch
):
    beginning = prompts[1]
    longer = [beginning + prompt[1:] for prompt in prompts] + [beginning + prompts[1][1:] * 2]
    computed = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: computed.append(inputs["input_ids"]) or forward(**inputs))
    found = generate(model, longer, stops, NEW, rows_per_batch)
    monkeypatch.undo()
    assert found == one_at_a_time(model, longer, stops, NEW)
    assert computed[0].tolist() == [beginning]
    assert all(ids.shape[1] <= 2 * len(prompts[1]) for ids in computed[1:])


def test_an_answer_that_is_complete_ends_there_and_has_not_stopped(model, prompts, unstopped):
    found = generate(model, prompts, set(), NEW, 4, complete=lambda tokens: len(tokens) == 5)
    assert found == [Answer(answer.tokens[:5], False) for answer in unstopped]


def test_what_vllm_gives_ends_where_batches_would_have_ended_it():
    stops, three = {9}, lambda tokens: len(tokens) == 3
    assert ended([5, 6, 9], stops, three) == Answer([5, 6], True)
    assert ended([5, 6], stops, three) == Answer([5, 6], False)
    assert ended([5, 6, 7, 8, 9], stops, three) == ended([5, 6, 7, 9], stops, three) == Answer([5, 6, 7], False)
    assert ended([9], stops, three) == Answer([], True)
