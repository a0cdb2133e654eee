"""Each family's tiny model of the tests through the pipeline; how far what must be the same is apart.

    python -m bench.families [NAME=FOLDER …]

With FOLDER, a repository in which the pipeline has run, also its real model, under that NAME. Writes
bench/results/families.json, a row a family.
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from stages.models.families import adaptable
from stages.models.load import load_model, packed_logits
from stages.models.packs import pack
from tests import tiny_families
from tests.test_families import Ran, run

RESULTS = Path(__file__).parent / "results/families.json"


@torch.inference_mode()
def measured(ran: Ran, rows: int) -> dict:
    """targets: adapted layers, of the language model's and of all linear layers; attention: the largest difference of a
    logit of `rows` packed test rows from transformers' eager attention, float32; merge_max_kl: nats a token; stops:
    share of test rows whose answer the tuned model ends, and the base."""
    plain, ours = ran.plain("merged"), load_model(ran.folder / "models/merged", "cpu", torch.float32)
    adapter = load_file(ran.folder / "models/adapter/adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter}
    assert adapted == set(adaptable(plain))
    taken = {row["id"]: row for row in ran.tokens("test")[:rows]}
    (piece,) = pack(list(taken.values()), 10**6)
    packed = packed_logits(ours, piece, slice(None))
    apart = 0.0
    for name, start, end in piece.rows:
        expected = plain(input_ids=torch.tensor([taken[name]["input_ids"]])).logits[0, start - end :]
        apart = max(apart, float((packed[start:end] - expected).abs().max()))
    linear = sum(isinstance(module, torch.nn.Linear) for module in plain.modules())
    return {
        "family": ran.name if ran.name in tiny_families.FAMILIES else plain.config.model_type,
        "class": type(plain).__name__,
        "targets": len(adapted),
        "linear_layers": linear,
        "attention": float(f"{apart:.2g}"),
        "merge_max_kl": ran.read("metrics/merge.json")["max_kl"],
        "stops": ran.read("metrics/tuned.json")["stop_rate"],
        "stops_before": ran.read("metrics/base.json")["stop_rate"],
    }


def main(arguments: list[str]) -> None:
    found = []
    for name in tiny_families.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found.append({"model": "tiny, random", **measured(run(name, Path(folder)), rows=13)})
    for argument in arguments:
        name, _, folder = argument.partition("=")
        found.append({"model": name, **measured(Ran("real", Path(folder)), rows=4)})
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    print(RESULTS.read_text(), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
