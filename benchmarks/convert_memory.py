"""
Peak memory of `mqt-llava convert` on a large sharded checkpoint.

Writes a random checkpoint of the authors' layout into a temporary folder, converts it in a process of its own, and
prints the most memory that this process ever held. `--pickled` makes `.bin` shards, `--shards 1` one file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file


WIDTH, VISION_WIDTH, QUERIES, VOCABULARY = 2048, 1024, 256, 32000
CONVERT = """
import re, sys
from pathlib import Path
from mqt_llava.conversion import convert as module
# The tokenizer has no weights; the benchmark has no tokenizer.
module.build_processor = lambda source: type("NoProcessor", (), {"save_pretrained": lambda self, folder: None})()
def peak():  # kB; not `ru_maxrss`, which a process inherits from the one that started it
    return re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
before = peak()
module.convert(sys.argv[1], sys.argv[2])
print(before, peak())
"""


def main() -> None:
    """Prints size, shard and peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--pickled", action="store_true", help="shards of torch.save instead of safetensors")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, destination = Path(folder, "source"), Path(folder, "destination")
        source.mkdir()
        sizes = write_checkpoint(source, args.gigabytes, args.shards, args.pickled)
        command = [sys.executable, "-c", CONVERT, str(source), str(destination)]
        before, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        written = sum(path.stat().st_size for path in destination.glob("*.safetensors"))
    print(f"checkpoint      {sum(sizes) / 1e9:6.2f} GB in {len(sizes)} files")
    print(f"largest file    {max(sizes) / 1e9:6.2f} GB")
    print(f"written         {written / 1e9:6.2f} GB")
    print(f"after imports   {before * 1024 / 1e9:6.2f} GB")
    print(f"peak            {peak * 1024 / 1e9:6.2f} GB")
    print(f"above one file  {(peak * 1024 - max(sizes)) / 1e9:6.2f} GB")


def write_checkpoint(folder: Path, gigabytes: float, num_shards: int, pickled: bool) -> list[int]:
    """Random half-precision weights, as many layers as make up the size; returns the sizes of the files."""
    shapes = shapes_without_layers()
    layer = layer_shapes()
    layer_bytes = 2 * sum(torch.Size(shape).numel() for shape in layer.values())
    rest_bytes = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    num_layers = max(1, round((gigabytes * 1e9 - rest_bytes) / layer_bytes))
    for number in range(num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    write_config(folder, num_layers)
    names, suffix = list(shapes), ".bin" if pickled else ".safetensors"
    stem, weight_map, sizes = "pytorch_model" if pickled else "model", {}, []
    per_shard = -(-len(names) // num_shards)
    for number in range(num_shards):
        part = {
            name: torch.randn(shapes[name], dtype=torch.float16)
            for name in names[number * per_shard : (number + 1) * per_shard]
        }
        file = f"{stem}-{number + 1:05d}-of-{num_shards:05d}{suffix}"
        (torch.save if pickled else save_file)(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
        sizes.append((folder / file).stat().st_size)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return sizes


def layer_shapes() -> dict[str, tuple[int, ...]]:
    """One layer of a Llama."""
    attention = {f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    wide, norm = 4 * WIDTH, (WIDTH,)
    mlp = {f"mlp.{name}_proj.weight": (wide, WIDTH) for name in ("gate", "up")}
    norms = {"input_layernorm.weight": norm, "post_attention_layernorm.weight": norm}
    return {**attention, **mlp, "mlp.down_proj.weight": (WIDTH, wide), **norms}


def shapes_without_layers() -> dict[str, tuple[int, ...]]:
    """Embeddings, head, query transformer and a CLIP tower of two layers."""
    width = VISION_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    queries: dict[str, tuple[int, ...]] = {
        "query": (QUERIES, width),
        "pos_embed": (QUERIES, width),
        "proj": (width, WIDTH),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
    }
    queries |= {f"ln_{name}.{kind}": (width,) for name in "qkv" for kind in ("weight", "bias")}
    tower: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, width),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        tower |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for number in range(2):
        layer = f"encoder.layers.{number}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            tower |= {f"{layer}{name}.weight": (width, width), f"{layer}{name}.bias": (width,)}
        tower |= {f"{layer}mlp.fc1.weight": (4 * width, width), f"{layer}mlp.fc1.bias": (4 * width,)}
        tower |= {f"{layer}mlp.fc2.weight": (width, 4 * width), f"{layer}mlp.fc2.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            tower |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
    shapes |= {f"model.query_abstractor.{name}": shape for name, shape in queries.items()}
    return shapes | {f"model.vision_tower.vision_tower.vision_model.{name}": shape for name, shape in tower.items()}


def write_config(folder: Path, num_layers: int) -> None:
    """The authors' config.json."""
    config = {
        "model_type": "llava_llama",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 16,
        "num_hidden_layers": num_layers,
        "vocab_size": VOCABULARY,
        "image_aspect_ratio": "pad",
        "mm_vision_select_layer": -2,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
