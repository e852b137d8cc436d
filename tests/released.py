"""Checkpoints of the authors' code in all their shapes, made from the recorded one."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


FIDELITY = Path(__file__).parent / "fidelity"
TOWER = "model.vision_tower."


def whole_weights():
    return load_file(FIDELITY / "checkpoint/model.safetensors")


def without_tower(weights):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(TOWER)}


def write(folder, weights, *, pickled=False, shards=1, **config):
    """A checkpoint folder with these weights."""
    shutil.copytree(FIDELITY / "checkpoint", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    save = torch.save if pickled else save_file
    if shards == 1:
        save(weights, folder / (stem + suffix))
        return folder
    names, weight_map = list(weights), {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}{suffix}"
        part = {name: weights[name] for name in names[shard::shards]}
        save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def language_model(folder, weights=None):
    """The language model alone, as a plain Llama."""
    weights = without_tower(weights or whole_weights())
    write(folder, {name: tensor for name, tensor in weights.items() if "query_abstractor" not in name})
    settings = json.loads((folder / "config.json").read_text())
    plain = {name: value for name, value in settings.items() if "mm_" not in name and "visual" not in name}
    plain.pop("query_abstractor_type")
    plain.pop("image_aspect_ratio")
    (folder / "config.json").write_text(
        json.dumps({**plain, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    return folder


def lora_run(folder, base, **adapter_config):
    """A LoRA run, and the weights that it stands for."""
    weights = without_tower(whole_weights())
    settings = json.loads((FIDELITY / "checkpoint/config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base), **adapter_config}
        )
    )
    generator, adapter = torch.Generator().manual_seed(0), {}
    for name, weight in weights.items():
        if name.startswith("model.layers.") and ("q_proj" in name or "down_proj" in name):
            a = torch.randn(4, weight.shape[1], generator=generator) * 0.2
            b = torch.randn(weight.shape[0], 4, generator=generator) * 0.2
            module = "base_model.model." + name.removesuffix(".weight")
            adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            weights[name] = weight + 2 * b @ a
    save_file(adapter, folder / "adapter_model.safetensors")
    others = {f"base_model.model.{name}": tensor for name, tensor in weights.items() if "query_abstractor" in name}
    torch.save(others, folder / "non_lora_trainables.bin")
    return weights
