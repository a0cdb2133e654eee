"""The train stage on a tiny model: the same bytes twice, the same curve whatever the machine, no adapter from NaN."""

import contextlib
import csv
import functools
import importlib.util
import json
import math
import random
import shutil
import types

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import train
from stages.encode import SCHEMA
from stages.models import checkpoints, room
from stages.models.fused import (
    KINDS,
    _DroppedLora,
    _FusedLora,
    _Gated,
    _gated_lora_forward,
    _GatedLora,
    _WideLora,
    fuse,
    group_projections,
)
from stages.models.load import load_model, mean_loss, pack_loss, row_losses
from stages.models.lora import add_adapters, load_adapter
from stages.models.machine import resolve
from stages.models.packs import IGNORED, pack
from stages.models.ranks import ALONE
from stages.models.tokens import read_rows
from stages.params import Lora, load
from stages.questions import Questions
from stages.refusal import SPARE_BYTES, Refusal
from tests.conftest import CHAT, LORA, write_asked


def write_tokens(path, count: int, seed: int) -> list[dict]:
    chance = random.Random(seed)
    schemas = [[chance.randrange(6, 60) for _ in range(40)] for _ in range(3)]
    rows = []
    for number in range(count):
        prompt = chance.choice(schemas) + [chance.randrange(6, 60) for _ in range(chance.randint(2, 12))]
        answer = [chance.randrange(6, 60) for _ in range(chance.randint(2, 8))]
        labels = [IGNORED] * len(prompt) + answer
        rows.append(
            {"id": f"row{number}", "input_ids": prompt + answer, "labels": labels, "prompt_tokens": len(prompt)}
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), path)
    return rows


@pytest.fixture
def trained(tmp_path, monkeypatch, tiny_model, params_file):
    """A function that runs the stage, in a folder of its own each time, and returns that folder."""
    write_tokens(tmp_path / "train.parquet", 22, 0)
    write_tokens(tmp_path / "validation.parquet", 5, 1)

    def run(name: str, base=tiny_model, **overrides):
        folder = tmp_path / name
        folder.mkdir()
        fixed = {"train.epochs": 1.0, "train.batch_size": 4, "train.validations": 3, "train.learning_rate": 0.01}
        machine = {"machine.device": "cpu", "machine.dtype": "float32", "machine.tokens_per_pack": 300}
        lora = {f"lora.{key}": value for key, value in LORA.items()}
        params_file(folder, **{**fixed, **machine, **lora, **overrides})
        monkeypatch.chdir(folder)
        tokens = [str(tmp_path / f"{side}.parquet") for side in ("train", "validation")]
        (folder / "asked").mkdir()
        if overrides.get("train.metric") == "score":
            write_asked(folder / "asked", tmp_path / "validation.parquet", base)
        train.main([str(base), *tokens, "asked", "adapter", "train.json", "loss.csv"])
        return folder

    return run


def curve(folder, column: str = "loss") -> list[float]:
    with (folder / "loss.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def validations(folder) -> dict[int, float]:
    with (folder / "loss.csv").open() as file:
        return {
            int(row["step"]): float(row["validation_loss"]) for row in csv.DictReader(file) if row["validation_loss"]
        }


def said(folder) -> dict:
    return json.loads((folder / "train.json").read_text())


def loss_of_what_was_saved(folder, base) -> float:
    """The validation loss, in nats a token, of the plain base with the folder's adapter as PEFT puts it on."""
    rows = pyarrow.parquet.read_table(folder.parent / "validation.parquet").to_pylist()
    tuned = load_adapter(load_model(base, "cpu", torch.float32), folder / "adapter").get_base_model()
    with torch.no_grad():
        loss = sum(float(pack_loss(tuned, piece)) for piece in pack(rows, 300))
    return loss / sum(label != IGNORED for row in rows for label in row["labels"])


def test_two_runs_give_the_same_bytes(trained):
    one, other = trained("one"), trained("other")
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "train.json", "loss.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_loss_curve_does_not_depend_on_the_tokens_per_pack(trained):
    large, small = (
        curve(trained("large", **{"machine.tokens_per_pack": 10_000})),
        curve(trained("small", **{"machine.tokens_per_pack": 1})),
    )
    assert large == pytest.approx(small, rel=1e-4)
    assert large[-1] < large[0]


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="see tests/tpu")
@pytest.mark.parametrize("order", ["shared", "shuffled"])
def test_what_is_recorded_on_a_gpu_is_told_of_every_pack_that_comes(order, trained, monkeypatch):
    told, came = [], []

    class Graphs:
        def __init__(self, model, rows, coming):
            told.extend(coming)

        def hidden(self, piece):
            came.append((len(piece), any(segment.shared_end for segment in piece.segments)))

    monkeypatch.setattr(train, "takes_flash", lambda model: True)
    monkeypatch.setattr(train, "Graphs", Graphs)
    trained("run", **{"train.order": order, "train.epochs": 2.0, "train.batch_size": 6, "machine.tokens_per_pack": 130})
    assert told == came and len(told) > 2 * 4, "several packs a step"


def test_tpus_without_torch_xla_are_refused(trained):
    with pytest.raises(Refusal, match=r"machine\.device is xla, but torch-xla is not installed"):
        trained("run", **{"machine.device": "xla"})


def test_where_tpus_train_the_processor_does_the_rest(params_file, tmp_path):
    machine = load(params_file(tmp_path, **{"machine.device": "xla", "machine.tokens_per_pack": 7})).machine
    found = resolve(machine)
    assert (found.device, found.devices, found.tokens_per_pack) == ("cpu", ("cpu",), 1024)


def test_another_seed_gives_another_adapter(trained):
    one, other = (
        load_file(trained(str(seed), **{"train.seed": seed}) / "adapter/adapter_model.safetensors") for seed in (1, 2)
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("keep", "init"), [("last", "default"), ("best", "default"), ("last", "pissa")])
def test_checkpoints_and_adapter_take_the_room_that_train_and_the_doctor_ask_for(trained, monkeypatch, keep, init):
    seen = []

    def look(folder, sync=checkpoints._sync_folder):  # a checkpoint has been written, and none deleted yet
        run = folder.parent if folder.name == "partial" else folder
        seen.append(sum(path.stat().st_size for path in run.rglob("*") if path.is_file()))
        sync(folder)

    monkeypatch.setattr(checkpoints, "_sync_folder", look)
    often = {"machine.checkpoint_minutes": 1e-9, "train.validations": 6}
    folder = trained("run", **{"lora.r": 16, "train.keep": keep, "lora.init": init, **often})
    expected = room.checkpoints_bytes(said(folder)["trainable_parameters"], keep == "best")
    assert expected < max(seen) < expected + 100_000  # beside the tensors' values
    saved = (folder / "adapter/adapter_model.safetensors").stat().st_size
    assert 0 < saved - room.adapter_bytes(said(folder)["trainable_parameters"], init) < 10_000


@pytest.mark.parametrize(("free", "keep", "refused"), [(8.5, "last", True), (9.5, "last", False), (9.5, "best", True)])
def test_without_room_for_its_checkpoints_nothing_is_trained(trained, monkeypatch, free, keep, refused):
    """`free`: in float32s for each value that is trained."""
    trainable = said(trained("before"))["trainable_parameters"]
    left = shutil._ntuple_diskusage(1 << 40, 0, int(4 * free * trainable) + SPARE_BYTES)
    monkeypatch.setattr("stages.outputs.shutil.disk_usage", lambda _: left)
    with pytest.raises(Refusal, match="its disk has") if refused else contextlib.nullcontext():
        trained("full", **{"train.keep": keep})


def test_the_metrics_say_what_was_trained(trained):
    folder = trained("run")
    metrics = said(folder)
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    assert metrics["steps"] == len(curve(folder)) == 6
    assert metrics["trainable_parameters"] == sum(weight.numel() for weight in adapter.values())
    assert metrics["validation_loss"] == pytest.approx(validations(folder)[6], abs=1e-6)
    assert (metrics["kept_step"], metrics["ended"]) == (6, "as planned")
    assert not {"seconds", "tokens_per_second", "peak_gib"} & set(metrics)
    assert json.loads((folder / "metrics/timing.json").read_text())["train"]["tokens_per_second"] > 0


def test_the_validation_loss_is_measured_as_often_as_asked_and_last_at_the_end(trained):
    assert list(validations(trained("run"))) == [2, 4, 6]


def test_the_adapters_configuration_is_sorted_and_names_no_path_of_this_machine(trained, tmp_path):
    text = (trained("run") / "adapter/adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tmp_path) not in text and "tiny" not in config["base_model_name_or_path"]


def test_only_adapter_files_are_written(trained):
    names = {path.name for path in (trained("run") / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_weights_that_are_not_finite_stop_training_and_name_step_and_rows(trained, tiny_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"step 1: the gradient is not finite, on rows row\d+"):
        trained("run", base=broken)
    assert not (tmp_path / "run/adapter").exists() and not (tmp_path / "run/train.json").exists()


def test_a_target_that_no_module_has_is_refused_naming_those_there_are(trained):
    with pytest.raises(Refusal, match=r"lora.target_modules 'q_projj' matches nothing; there are: .*q_proj"):
        trained("run", **{"lora.target_modules": ["q_projj"]})


def test_a_named_target_adapts_that_module_alone(trained):
    adapter = load_file(trained("run", **{"lora.target_modules": ["q_proj"]}) / "adapter/adapter_model.safetensors")
    assert adapter and all(".q_proj." in name for name in adapter)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_fused_adapters_have_the_loss_and_gradients_of_pefts_own(tiny_model, tmp_path, dropout):
    rows = write_tokens(tmp_path / "rows.parquet", 6, 2)
    lora = Lora(**LORA | {"dropout": dropout})
    found = []
    for fused in (False, True):
        model = add_adapters(load_model(tiny_model, "cpu", torch.float32), lora, seed=0).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        if fused:
            fuse(model)
        torch.manual_seed(0)  # both drop the same
        loss = sum(pack_loss(model.get_base_model(), piece) for piece in pack(rows, 200))
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain_loss, plain), (fused_loss, fused) = found
    assert fused_loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_base_of_4_bit_values_gives_another_curve_and_an_adapter_of_the_same_form(trained):
    plain, quantized = trained("plain"), trained("quantized", **{"lora.quantize": "nf4"})
    assert curve(plain) != curve(quantized)
    assert curve(quantized) == pytest.approx(curve(plain), rel=0.1)
    plain, quantized = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (plain, quantized))
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in quantized.items()}


@pytest.mark.parametrize("kind", [_FusedLora, _WideLora])
def test_the_products_of_adapted_layers_have_exact_gradients(kind):
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (10, 4), "weight": (6, 4), "down": (3, 4), "up": (6, 3)}
    x, weight, down, up = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes.values())
    trained = [x.requires_grad_(), down.requires_grad_(), up.requires_grad_()]
    torch.testing.assert_close(kind.apply(x, weight, down, up, 0.5), x @ weight.T + 0.5 * (x @ down.T) @ up.T)
    outer = torch.randn(10, 6, generator=draw, dtype=torch.float64)
    found = torch.autograd.grad(kind.apply(x, weight, down, up, 0.5), trained, outer)
    expected = torch.autograd.grad(x @ weight.T + 0.5 * (x @ down.T) @ up.T, trained, outer)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)  # adapters' gradients are float32


@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_times_up_has_the_gradients_of_transformers_own(kind):
    draw = torch.Generator().manual_seed(0)
    gate, up, outer = (3 * torch.randn(1000, generator=draw) for _ in range(3))
    trained = [gate.requires_grad_(), up.requires_grad_()]
    found, expected = _Gated.apply(gate, up, KINDS[kind]), kind()(gate) * up
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(out, trained, outer) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asks", [True, False])
def test_an_adapted_mlp_as_one_function_has_the_gradients_of_its_parts(kind, asks):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, ranks, scalings = draw(10, 4, requires_grad=asks), (4, 3, 2), (0.5, 2.0, 1.5)
    sizes = ((4, 6), (4, 6), (6, 4))
    weights = [draw(out, into) for into, out in sizes]
    downs = [draw(rank, into, requires_grad=True) for rank, (into, _) in zip(ranks, sizes, strict=True)]
    ups = [draw(out, rank, requires_grad=True) for rank, (_, out) in zip(ranks, sizes, strict=True)]

    def layer(number: int, rows: torch.Tensor) -> torch.Tensor:
        return rows @ weights[number].T + scalings[number] * (rows @ downs[number].T) @ ups[number].T

    factors = [factor for one in zip(weights, downs, ups, strict=True) for factor in one]
    found = _GatedLora.apply(x, KINDS[kind], scalings, *factors)
    expected = layer(2, kind()(layer(0, x)) * layer(1, x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the gate is float32
    trained, outer = [*downs, *ups, *([x] if asks else [])], draw(10, 4)
    for one, other in zip(*(torch.autograd.grad(out, trained, outer) for out in (found, expected)), strict=True):
        assert (one.double() - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize(
    ("part", "together"),
    [
        ("gate_proj", lambda mlp: setattr(mlp, "forward", types.MethodType(_gated_lora_forward, mlp))),
        ("q_proj", group_projections),
    ],
)
def test_layers_of_one_input_taken_together_have_the_gradients_of_one_after_the_other(
    tiny_model, tmp_path, part, together
):
    rows = write_tokens(tmp_path / "rows.parquet", 6, 2)
    found = []
    for change in (None, together):
        model = add_adapters(load_model(tiny_model, "cpu", torch.float32), Lora(**LORA), seed=0).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        fuse(model)
        for module in model.modules() if change else ():
            if hasattr(module, part):
                change(module)
        loss = sum(pack_loss(model.get_base_model(), piece) for piece in pack(rows, 200))
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (apart_loss, apart), (loss, gradients) = found
    assert loss == pytest.approx(apart_loss, rel=1e-6)
    for name, gradient in apart.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_nothing_is_dropped_where_nothing_is_trained(tiny_model):
    model = add_adapters(load_model(tiny_model, "cpu", torch.float32), Lora(**{**LORA, "dropout": 0.5}), seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    ids = list(range(6, 30))
    (piece,) = pack([{"id": "row", "input_ids": ids, "labels": [IGNORED] * 20 + ids[20:]}], 200)
    expected = pack_loss(model.eval().get_base_model(), piece).item()
    fuse(model)
    assert pack_loss(model.get_base_model(), piece).item() == pytest.approx(expected, rel=1e-5)
    assert pack_loss(model.train().get_base_model(), piece).item() != pytest.approx(expected, rel=1e-3)


def test_of_adapters_with_dropout_the_gradients_are_those_of_the_elements_that_were_kept():
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (50, 4), "weight": (6, 4), "down": (3, 4), "up": (6, 3)}
    x, weight, down, up = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes.values())
    trained = [x.requires_grad_(), down.requires_grad_(), up.requires_grad_()]
    outer = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    torch.manual_seed(0)
    out = _DroppedLora.apply(x, weight, down, up, 0.5, 0.25)
    found = torch.autograd.grad(out, trained, outer)
    torch.manual_seed(0)
    _, kept = torch.native_dropout(x.detach(), 0.25, True)
    assert 0.6 < kept.double().mean() < 0.9
    plain = x @ weight.T + 0.5 * ((x * kept / 0.75) @ down.T) @ up.T
    torch.testing.assert_close(out, plain)
    for one, other in zip(found, torch.autograd.grad(plain, trained, outer), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)


def added(folder) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight."""
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    downs = [name for name in weights if "lora_A" in name]
    return {name: scale * weights[name.replace("lora_A", "lora_B")] @ weights[name] for name in downs}


@pytest.mark.parametrize("changed", [{"method": "rslora"}, {"method": "dora"}, {"init": "gaussian"}])
def test_another_method_or_another_beginning_trains_another_adapter_that_peft_knows_by_its_name(changed, trained):
    plain, folder = trained("plain"), trained("other", **{f"lora.{key}": value for key, value in changed.items()})
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["use_rslora"] == (changed.get("method") == "rslora")
    assert config["use_dora"] == (changed.get("method") == "dora")
    assert config["init_lora_weights"] == changed.get("init", True)
    assert curve(folder)[0] == pytest.approx(curve(plain)[0], rel=1e-5)  # at first, an adapter changes nothing
    assert curve(folder)[-1] != curve(plain)[-1]
    vectors = {name for name in load_file(folder / "adapter/adapter_model.safetensors") if "magnitude" in name}
    assert bool(vectors) == config["use_dora"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_begins_from_the_weights_is_saved_for_the_base_as_it_is(init, trained, tiny_model):
    folder = trained("run", **{"lora.init": init, "lora.r": 4})
    again = trained("again", **{"lora.init": init, "lora.r": 4})
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / name).read_bytes() == (again / "adapter" / name).read_bytes()
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    assert loss_of_what_was_saved(folder, tiny_model) == pytest.approx(said(folder)["validation_loss"], rel=1e-4)


def test_with_a_ratio_the_matrices_that_begin_at_zero_learn_so_many_times_faster(trained):
    plain, fast = added(trained("plain")), added(trained("fast", **{"train.lora_plus_ratio": 16.0}))
    assert all(fast[name].norm() > 2 * plain[name].norm() for name in plain)


@pytest.mark.parametrize(
    ("changed", "rates"),
    [
        ({"schedule": "constant"}, [0.01] * 6),
        ({"schedule": "constant_with_warmup", "warmup_ratio": 0.5}, [0, 0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01]),
        ({"schedule": "linear", "warmup_ratio": 0.3}, [0, 0.005, 0.01, 0.0075, 0.005, 0.0025]),
        ({"schedule": "cosine", "warmup_ratio": 0.0}, [0.005 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]),
    ],
    ids=lambda value: value.get("schedule") if isinstance(value, dict) else "",
)
def test_the_learning_rate_follows_the_schedule(changed, rates, trained):
    folder = trained("run", **{f"train.{key}": value for key, value in changed.items()})
    assert curve(folder, "learning_rate") == pytest.approx(rates)


TURNING = {"train.validations": 12, "train.epochs": 6.0, "train.learning_rate": 0.05}  # lowest at step 9 of 36


def test_the_best_adapter_is_kept_where_asked_and_else_the_last(trained, tiny_model):
    last, best = trained("last", **TURNING), trained("best", **TURNING, **{"train.keep": "best"})
    assert (last / "loss.csv").read_bytes() == (best / "loss.csv").read_bytes()
    losses = validations(best)
    assert said(last)["kept_step"] == 36 and said(last)["steps"] == said(best)["steps"] == 36
    assert said(best)["kept_step"] == min(losses, key=losses.__getitem__) < 36
    for folder in (last, best):
        loss = losses[said(folder)["kept_step"]]
        assert said(folder)["validation_loss"] == pytest.approx(loss, abs=1e-6)
        assert loss_of_what_was_saved(folder, tiny_model) == pytest.approx(loss, rel=1e-5)
    assert said(best)["validation_loss"] < said(last)["validation_loss"]


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_training_without_progress_ends_early_on_the_curve_of_the_whole_one(keep, trained, tiny_model):
    whole = trained("whole", **TURNING)
    folder = trained("early", **TURNING, **{"train.early_stopping": 3, "train.keep": keep})
    assert list(validations(folder)) == [3, 6, 9, 12, 15, 18]
    for column in ("loss", "validation_loss", "learning_rate", "gradient_norm"):
        assert curve(folder, column) == curve(whole, column)[: len(curve(folder, column))]
    assert (said(folder)["steps"], said(folder)["ended"]) == (18, "early: no progress")
    assert said(folder)["kept_step"] == (9 if keep == "best" else 18)
    assert loss_of_what_was_saved(folder, tiny_model) == pytest.approx(said(folder)["validation_loss"], rel=1e-5)


SCORED = {**CHAT, **TURNING, "train.metric": "score", "evaluate.max_new_tokens": 6, "train.metric_rows": 5}


def scores(folder) -> dict[int, float]:
    with (folder / "loss.csv").open() as file:
        return {
            int(row["step"]): float(row["validation_score"]) for row in csv.DictReader(file) if row["validation_score"]
        }


def score_of_what_was_saved(folder, base) -> float:
    """By the code that evaluates the merged model, on the adapter."""
    model = load_adapter(load_model(base, "cpu", torch.float32), folder / "adapter").get_base_model().eval()
    params = load(folder / "params.yaml")
    rows = read_rows(folder.parent / "validation.parquet")
    questions = Questions(folder / "asked", rows, base, params, resolve(params.machine))
    return questions.score(model, ALONE)


def test_answers_are_scored_while_training_and_change_nothing_of_it(trained, tiny_model):
    plain, scored = trained("plain", **TURNING), trained("scored", **SCORED)
    saved = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (plain, scored)]
    assert saved[0] == saved[1] and validations(scored) == validations(plain)
    found = scores(scored)
    assert found.keys() == validations(scored).keys() and len({*found.values()}) > 1
    assert said(scored)["validation_score"] == pytest.approx(found[36], abs=1e-6)
    assert score_of_what_was_saved(scored, tiny_model) == pytest.approx(found[36], abs=1e-6)
    assert "validation_score" not in said(plain) and "validation_score" not in (plain / "loss.csv").read_text()


@pytest.mark.parametrize(
    "lora",
    [
        {"lora.quantize": "nf4"},
        {"lora.quantize": "int8"},
        {"lora.method": "dora"},
        {"lora.modules_to_save": ["embed_tokens"]},
        {"lora.trainable_tokens": ["<end_of_turn>"]},
    ],
    ids=str,
)
def test_what_answers_while_training_is_what_trains(lora, trained, tiny_model):
    """Its loss on the validation rows is the trained model's own, on the same tensors."""
    seen = []

    def score(questions, model, ranks):
        rows = pyarrow.parquet.read_table(tokens).to_pylist()
        seen.append(mean_loss(row_losses(model, rows, 300).values()))
        return 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Questions, "score", score)
        tokens = trained("warm", **CHAT).parent / "validation.parquet"
        folder = trained("run", **CHAT, **lora, **{"train.metric": "score", "train.learning_rate": 0.05})
    assert seen == pytest.approx(list(validations(folder).values()), rel=1e-5) and len({*seen}) > 1


def test_the_adapter_of_the_best_score_is_kept_and_training_ends_where_it_rises_no_more(trained, tiny_model):
    found = scores(trained("whole", **SCORED))
    best = max(found, key=found.__getitem__)
    folder = trained("best", **SCORED, **{"train.keep": "best"})
    assert said(folder)["kept_step"] == best < 36
    assert score_of_what_was_saved(folder, tiny_model) == pytest.approx(found[best], abs=1e-6)
    steps = list(found)
    patience = next(n for n in range(1, 12) if steps.index(best) + n < len(steps))
    folder = trained("early", **SCORED, **{"train.early_stopping": patience, "train.keep": "best"})
    assert said(folder)["steps"] <= steps[steps.index(best) + patience]
    assert said(folder)["ended"] == "early: no progress"


def test_a_validation_row_whose_prompt_was_cut_is_not_asked_and_none_at_all_is_refused(trained, tiny_model):
    folder = trained("run", **SCORED | {"train.epochs": 0.2, "train.validations": 1})
    params = load(folder / "params.yaml")
    tokens = folder.parent / "validation.parquet"
    rows = pyarrow.parquet.read_table(tokens).to_pylist()

    def questions():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), tokens)
        return Questions(folder / "asked", read_rows(tokens), tiny_model, params, resolve(params.machine))

    rows[1]["input_ids"] = rows[1]["input_ids"][: rows[1]["prompt_tokens"] - 1]
    assert [row.id for row in questions().rows] == ["row0", "row2", "row3", "row4"]
    rows[:] = rows[1:2]
    with pytest.raises(Refusal, match=r"no validation row is whole; raise encode\.max_length"):
        questions()


def test_a_training_that_makes_progress_is_not_ended(trained):
    folder = trained("run", **{"train.early_stopping": 1, "train.learning_rate": 1e-3, "train.warmup_ratio": 0.0})
    losses = list(validations(folder).values())
    assert losses == sorted(losses, reverse=True)
    assert (said(folder)["steps"], said(folder)["ended"]) == (6, "as planned")


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_moments_are_held_in_8_bits_where_asked_and_give_nearly_the_curve_of_32(ratio, trained, monkeypatch):
    held = []
    finish = train.finish

    def look(trainer, run):
        finish(trainer, run)
        states = trainer.optimizer.state.items()
        held.append(
            {
                (weight.numel() >= 4096, state[name].dtype)
                for weight, state in states
                for name in ("state1", "exp_avg", "state2", "exp_avg_sq")
                if name in state
            }
        )

    monkeypatch.setattr(train, "finish", look)
    changed = {"lora.r": 128, "train.lora_plus_ratio": ratio}
    plain, small = (trained(name, **changed, **{"train.optimizer": name}) for name in ("adamw", "adamw_8bit"))
    assert held == [
        {(True, torch.float32), (False, torch.float32)},
        {(True, torch.uint8), (False, torch.float32)},  # bitsandbytes leaves small weights their 32 bits
    ]
    assert curve(small) != curve(plain)
    assert curve(small) == pytest.approx(curve(plain), rel=1e-3)


def test_the_ratio_is_that_of_learning_rates_whatever_the_optimizer(trained, monkeypatch):
    rates = []
    create = train.Trainer.create_optimizer

    def look(self, model=None):
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        made = create(self, model)
        rates.append(
            {
                ("lora_B" in names[id(parameter)], group["lr"])
                for group in made.param_groups
                for parameter in group["params"]
            }
        )
        return made

    monkeypatch.setattr(train.Trainer, "create_optimizer", look)
    for optimizer in ("adamw", "adamw_8bit"):
        changed = {"train.optimizer": optimizer, "train.lora_plus_ratio": 4.0, "lora.modules_to_save": ["lm_head"]}
        trained(optimizer, **changed)
    assert rates == [{(False, 0.01), (True, 0.04)}] * 2


@pytest.mark.parametrize(
    "changed",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_tokens": ["<start_of_turn>"]},
    ],
    ids=str,
)
def test_an_adapter_with_a_trained_embedding_is_one_that_peft_puts_on_the_base(changed, trained, tiny_model):
    changed = {f"lora.{key}": value for key, value in changed.items()}
    folder, plain = trained("run", **changed), trained("plain")
    assert loss_of_what_was_saved(folder, tiny_model) == pytest.approx(said(folder)["validation_loss"], rel=1e-5)
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert bool(config["modules_to_save"]) == ("lora.modules_to_save" in changed)
    vocabulary, width = load_model(tiny_model, "cpu", torch.float32).get_input_embeddings().weight.shape
    more = vocabulary * width if config["modules_to_save"] else width
    assert said(folder)["trainable_parameters"] == said(plain)["trainable_parameters"] + more


def test_a_token_that_the_model_does_not_have_is_refused_before_anything_is_trained(trained, tmp_path):
    with pytest.raises(Refusal, match=r"lora.trainable_tokens '<tool>' is no token of this model, but "):
        trained("run", **{"lora.trainable_tokens": ["<tool>"]})
    assert not (tmp_path / "run/adapter").exists()
