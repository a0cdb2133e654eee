"""What each recipe's training is expected to take of one GPU: memory as the doctor reckons it, time by its operations.

    python -m bench.recipes

Nothing is run. The shapes are those of the published config.json files. `gib`: with packs as large as a step of the
longest rows; `gib_at_least`: with packs of one such row, to which machine.tokens_per_pack: auto goes down.
`seconds_a_million_tokens`: at half of what an H200 multiplies in bfloat16, of which the 1B shape reached 57% and the 4B
60% (bench/results/train_h200.json); null where training takes other ways, of which nothing was read.
"""

import tempfile
from pathlib import Path

from bench.train import PEAK_TFLOPS
from stages.models import memory
from stages.outputs import write_json
from stages.params import load
from tools.recipe import RECIPES, applied

RESULTS = Path(__file__).parent / "results/recipes.json"
SHARE_OF_PEAK = 0.5


def config(kind: str, hidden: int, layers: int, heads: int, keys: int, inner: int, words: int, size: int, **more):
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": inner,
        "vocab_size": words,
        "head_dim": size,
        **more,
    }


# and the bytes of the safetensors files, of those with towers
MODELS = {
    "gemma-2b": (config("gemma", 2048, 18, 8, 1, 16384, 256000, 256), None),
    "gemma-2-27b": (config("gemma2", 4608, 46, 32, 16, 36864, 256000, 128, attn_logit_softcapping=50.0), None),
    "gemma-3-1b": (config("gemma3_text", 1152, 26, 4, 1, 6912, 262144, 256), None),
    "gemma-3-4b": (config("gemma3_text", 2560, 34, 8, 4, 10240, 262208, 256), 8_600_000_000),
    "gemma-3-12b": (config("gemma3_text", 3840, 48, 16, 8, 15360, 262208, 256), 24_400_000_000),
    "gemma-3-27b": (config("gemma3_text", 5376, 62, 32, 16, 21504, 262208, 128), 54_900_000_000),
    "gemma-3n": ({"model_type": "gemma3n_text"}, 15_700_000_000),
    "llama-2-7b": (config("llama", 4096, 32, 32, 32, 11008, 32000, 128), None),
}


def expected(recipe: Path, model: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "params.yaml"
        path.write_text(applied(Path("params.yaml").read_text(encoding="utf-8"), recipe), encoding="utf-8")
        params = load(path)
    described, weights = MODELS[model]
    shape = memory.shape(described, weights)
    longest = params.encode.max_length

    def gib(tokens: int) -> float:
        held = memory.training(shape, params.lora, "cuda", "bfloat16", tokens, longest)
        return round(held.needed / memory.GIB, 1)

    operations = 4 * (shape.linear_parameters + shape.vocabulary * shape.hidden)  # two a weight, there and back
    usual = shape.kind in memory.RECORDED and not shape.capped
    seconds = 1e6 * operations / (SHARE_OF_PEAK * PEAK_TFLOPS * 1e12)
    return {
        "recipe": recipe.stem,
        "model": model,
        "quantize": params.lora.quantize,
        "tokens_per_pack": memory.pack_tokens(params, "cuda"),
        "longest": longest,
        "gib": gib(memory.pack_tokens(params, "cuda")),
        "gib_at_least": gib(longest),
        "seconds_a_million_tokens": round(seconds) if usual else None,
    }


def all_expected() -> list[dict]:
    found = []
    for recipe in sorted(RECIPES.glob("*.yaml")):
        models = [model for model in MODELS if recipe.stem.endswith((model, f"{model}-local"))]
        if models:
            found.append(expected(recipe, models[0]))
    return found


def main() -> None:
    found = all_expected()
    print(*found, sep="\n")
    write_json(RESULTS, found)


if __name__ == "__main__":
    main()
