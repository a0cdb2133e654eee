"""A base's files and an adapter in; the merged model's files out, a block of rows at a time: the bytes that PEFT's own
merge and transformers' save_pretrained give, in the memory of a block.

PEFT itself computes what each block gains, in its own layer; transformers says, from the model without its weights,
what a tensor is called on the disk and which ones are tied. What is not sure to come out the same is Uncovered.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners import lora
from transformers import GenerationConfig, PreTrainedModel

from stages.models.families import adaptable
from stages.models.quantized import as_one_block, kept_values
from stages.models.shards import DTYPES, Stored, stored, write_shard
from stages.models.unloaded import Uncovered, unloaded, uses
from stages.refusal import Refusal

# what an adapter's configuration may say without changing how a layer of it is merged, other than as the layer knows
COVERED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"),
    *("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights"),
}
FROM_NOTHING = (True, False, "gaussian")  # ways to begin an adapter that leave the base's weights as they are
FILES_AT_ONCE = 8  # more than there are cores: while one waits for the disk, another computes


@dataclass(frozen=True)
class Plan:
    """A model without its weights, perhaps with an adapter on it, and where its weights are.

    tensors: its own, by their names on the disk, which are those in the files; files: the places of these; sources:
    all places, the adapter's too, by the names in the model; quantized: the names on the disk of the
    weights that are rounded where the base is quantized; layers: for such a name, the adapter's layer and its tensors.
    """

    model: PreTrainedModel
    parameters: int
    tensors: dict[str, torch.Tensor]
    files: dict[str, Stored]
    sources: dict[str, Stored]
    quantized: set[str]
    layers: dict[str, tuple[lora.Linear, dict[str, Stored]]]


def plan(folder: Path, adapter: Path | None, dtype: torch.dtype) -> Plan:
    """Look at names and shapes alone; raises Uncovered."""
    found = unloaded(folder, dtype)
    model, in_files, files, sources = found.model, found.on_disk, found.files, found.sources
    parameters = model.num_parameters()
    tied = {name for same in uses(model).values() if len(same) > 1 for name in same}
    plain = {in_files[f"{name}.weight"] for name in adaptable(model) if f"{name}.weight" in in_files}
    layers = {}
    for name, (layer, own) in (_adapted(model, adapter) if adapter else {}).items():
        if f"{name}.weight" in tied:
            raise Uncovered(f"{name} shares its weight with another layer")
        layers[in_files[f"{name}.weight"]] = layer, own
        sources |= {f"{name}.{part}.default.weight": place for part, place in own.items()}
        for leaf, _ in layer.get_base_layer().named_parameters():
            sources[f"{name}.base_layer.{leaf}"] = sources[f"{name}.{leaf}"]
    return Plan(model.eval(), parameters, found.tensors, files, sources, plain, layers)


def _adapted(model: PreTrainedModel, adapter: Path) -> dict[str, tuple[lora.Linear, dict[str, Stored]]]:
    """Put the adapter's layers, without their weights, on the model. Each of them, by name, and its tensors in the
    adapter's file: lora_A, lora_B and, of DoRA, lora_magnitude_vector; every tensor of the file has its layer."""
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, LoraConfig):
        raise Uncovered(f"the adapter is {config.peft_type}, not LoRA")
    values, usual = config.to_dict(), LoraConfig().to_dict()
    beyond = sorted(key for key in values if key not in COVERED and values[key] != usual[key])
    if config.init_lora_weights not in FROM_NOTHING:
        beyond.append("init_lora_weights")
    if beyond:
        raise Uncovered(f"the adapter has {', '.join(beyond)}")
    config.base_model_name_or_path = model.name_or_path
    get_peft_model(model, config, low_cpu_mem_usage=True)
    path = adapter / "adapter_model.safetensors"
    if not path.exists():
        raise Uncovered("the adapter is not in safetensors")
    left = stored(path)
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        if type(layer) is not lora.Linear or type(layer.get_base_layer()) is not torch.nn.Linear:
            raise Uncovered(f"{name} is no plain linear layer")
        own = {}
        for part, holder in _holders(layer).items():
            key = f"base_model.model.{name}.{part}" + ("" if part == "lora_magnitude_vector" else ".weight")
            own[part] = left.pop(key, None)
            if own[part] is None or own[part].shape != tuple(holder.weight.shape) or own[part].dtype not in DTYPES:
                raise Uncovered(f"the adapter's file does not hold {key} as its configuration says")
        found[name] = layer, own
    if left:
        raise Uncovered(f"the adapter's file also holds {min(left)}")
    return found


def _holders(layer: lora.Linear) -> dict[str, torch.nn.Module]:
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    return {part: getattr(layer, part)["default"] for part in parts if "default" in getattr(layer, part)}


@torch.no_grad()
def merged(
    name: str, layer: lora.Linear, own: dict[str, Stored], blocks: Iterable[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The weight's blocks of rows with the adapter's product added, as `merge(safe_merge=True)` of PEFT's layer adds
    it to the whole; raises Refusal where that is no number."""
    layer = copy.deepcopy(layer)  # a copy without weights, that goes when the last block has gone
    base, holders = layer.get_base_layer(), _holders(layer)
    whole = {part: place.tensor().to(holders[part].weight.dtype) for part, place in own.items()}
    variant = layer.lora_variant.get("default")  # DoRA
    start = 0
    for block in blocks:
        rows = slice(start, start + len(block))
        start = rows.stop
        for part, holder in holders.items():
            value = whole[part] if part == "lora_A" else whole[part][rows]  # B and the magnitudes have a row for each
            holder.weight = torch.nn.Parameter(value.to(block.device), requires_grad=False)
        base.weight = torch.nn.Parameter(block, requires_grad=False)
        if variant:
            block = variant.merge_safe(layer, "default", block)
        else:
            block += layer.get_delta_weight("default").to(block.dtype)
        if not torch.stack(block.aminmax()).isfinite().all():  # ten times as fast as asking of each
            raise Refusal(
                f"the adapter makes {name} infinite or no number in {block.dtype}; try a lower train.learning_rate"
            )
        yield block


def write_merged(
    plan: Plan, folder: Path, max_shard_size: str, device: str, quantize: str | None, generation: GenerationConfig
) -> None:
    """Write the files of the merged model, as `save_pretrained` does. With `quantize`, onto the values that the base's
    weights had while the adapter was trained on them quantized. Raises Uncovered, and has written nothing then."""

    dtype = plan.model.dtype
    if any(DTYPES[place.dtype] != dtype for place in plan.files.values()):
        raise Uncovered(f"the base's files do not hold all tensors as {dtype}")

    def blocks(name: str) -> Iterable[torch.Tensor]:
        place = plan.files[name]
        rounds = quantize and name in plan.quantized
        found = [place.tensor()] if rounds and as_one_block(quantize, place.shape[-1]) else place.blocks()
        if rounds or name in plan.layers:
            found = (block.to(device) for block in found)
        if rounds:
            found = kept_values(quantize, found)
        return merged(name, *plan.layers[name], found) if name in plan.layers else found

    config = plan.model.config
    config.architectures = [type(plan.model).__name__]
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    split = split_torch_state_dict_into_shards(
        plan.tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )

    def write(file: str) -> None:
        names = split.filename_to_tensors[file]
        write_shard(folder / file, {name: plan.files[name] for name in names}, blocks)

    # a file each, one thread in each: on blocks this small, threads that share one wait for each other
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(FILES_AT_ONCE, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(write, split.filename_to_tensors))
    finally:
        torch.set_num_threads(threads)
    if split.is_sharded:
        metadata = {"total_parameters": plan.parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def read_weights(plan: Plan, device: str, quantize: str | None) -> Callable[[str], torch.Tensor]:
    """What gives the plan's parameters by name, each as the model in memory would have it."""
    dtype = plan.model.dtype
    rounded = {plan.files[name] for name in plan.quantized} if quantize else ()
    adapters = {place for _, own in plan.layers.values() for place in own.values()}

    def read(name: str) -> torch.Tensor:
        place = plan.sources[name]
        if place in rounded:
            blocks = (block.to(device, dtype) for block in place.blocks())
            blocks = [torch.cat(list(blocks))] if as_one_block(quantize, place.shape[-1]) else blocks
            return torch.cat(list(kept_values(quantize, blocks)))
        return place.mapped().to(device, torch.float32 if place in adapters else dtype)

    return read
