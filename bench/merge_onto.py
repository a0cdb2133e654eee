"""Where an adapter that was trained on nf4 values is merged better: onto those values, or onto the stored weights.

    python -m bench.merge_onto FOLDER

FOLDER is a repository in which the pipeline has run up to encode, with its params.yaml; a third of an epoch is trained
on the stored weights and on their nf4 values. For each adapter and each way to merge it: how far the merged model is
from the one that was trained, and the loss of both on the test rows. Writes bench/results/merge_onto.json.
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import json
import os
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet
import torch
from ruamel.yaml import YAML

from stages import train
from stages.merge import answer_logits, compare, merge
from stages.models.load import load_model, mean_loss, row_losses
from stages.models.lora import load_adapter
from stages.models.machine import resolve
from stages.params import load

EPOCHS = 0.34
RESULTS = Path(__file__).parent / "results/merge_onto.json"


def main(arguments: list[str]) -> None:
    source = Path(arguments[0]).resolve()
    base, tokens = source / "models/base", source / "data/tokens"
    values = YAML().load(source / "params.yaml")
    test = pyarrow.parquet.read_table(tokens / "test.parquet").to_pylist()
    found = []
    for quantize in (None, "nf4"):
        values["train"]["epochs"] = EPOCHS
        values["lora"]["quantize"] = quantize
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            YAML().dump(values, Path("params.yaml"))
            params = load()
            machine = resolve(params.machine)
            inputs = [base, tokens / "train.parquet", tokens / "validation.parquet"]
            Path("asked").mkdir()
            train.main([*map(str, inputs), "asked", "adapter", "train.json", "loss.csv"])

            def loss(model) -> float:
                return round(mean_loss(row_losses(model, test, machine.tokens_per_pack).values()), 5)  # noqa: B023

            model = load_model(base, machine.device, machine.dtype, quantize=quantize)
            trained = load_adapter(model, Path("adapter")).get_base_model()
            before = [answer_logits(trained, row, machine.device) for row in test[: params.merge.rows]]
            loss_before = loss(trained)
            for onto in (None, "nf4") if quantize else (None,):
                model = merge(load_model(base, machine.device, torch.bfloat16), Path("adapter"), onto)
                after = [
                    answer_logits(model.to(machine.dtype), row, machine.device) for row in test[: params.merge.rows]
                ]
                one = {"trained_on": quantize or "stored", "merged_onto": onto or "stored"}
                losses = {"test_loss_of_adapter": loss_before, "test_loss_of_merged": loss(model)}
                found.append({**one, **compare(before, after), **losses})
                print(json.dumps(found[-1]), file=sys.stderr)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
