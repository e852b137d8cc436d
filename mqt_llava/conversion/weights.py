"""Weights of the authors' checkpoints to this project's, written shard by shard as they are read."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration, refuse_half_loaded
from .files import PlannedTensor, ShardWriter, open_tensors
from .released import NOT_WEIGHTS, weight_transforms
from .sources import Source


DEFAULT_SHARD_BYTES = 2 * 10**9


@dataclass
class Piece(PlannedTensor):
    """A tensor of ours, and where it comes from: a whole tensor of a file, or a third of a packed one."""

    path: Path
    source_name: str  # in the file
    released_name: str  # in the authors' checkpoint
    part: int | None  # of a packed query-key-value matrix


class Renamer:
    """The authors' names to ours, by Transformers' own conversion rules."""

    def __init__(self):
        transforms = weight_transforms()
        self.renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self.converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def __call__(self, name: str) -> list[tuple[str, int | None]]:
        """Our names for one of theirs: one, or three with the number of each part."""
        renamed, pattern = rename_source_key(name, self.renamings, self.converters)
        if pattern is None:
            return [(renamed, None)]
        converter = next(one for one in self.converters if pattern in one.source_patterns)
        return [(target, part) for part, target in enumerate(converter.target_patterns)]


def plan_pieces(source: Source) -> list[Piece]:
    """Every tensor of the source under our names, in the order of the files. Shapes are read, weights are not."""
    rename, pieces = Renamer(), {}
    for path, released_name in source.files:
        with open_tensors(path) as file:
            for name in file.names:
                released = released_name(name)
                if NOT_WEIGHTS.search(released):
                    continue
                shape, dtype = file.shape(name), file.dtype(name)
                for ours, part in rename(released):
                    ours_shape = shape if part is None else (shape[0] // 3, *shape[1:])
                    pieces[ours] = Piece(ours, ours_shape, dtype, path, name, released, part)
    return sorted(pieces.values(), key=lambda piece: [path for path, _ in source.files].index(piece.path))


def check_pieces(pieces: list[Piece], source: Source) -> list[Piece]:
    """
    The pieces that the model has, when they are exactly its weights. What lies above the layer that is read of the
    tower is left out.

    Raises:
        ValueError: listing the names that are missing, not known or of another shape.
    """
    with torch.device("meta"):
        model = MqtLlavaForConditionalGeneration(source.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {piece.name: piece.shape for piece in pieces}
    tied = set(model.all_tied_weights_keys)
    above = {f"model.vision_tower.{name}" for name in model.model.weights_above_selected_layer}
    refuse_half_loaded(
        {
            "missing_keys": expected.keys() - found.keys() - tied,
            "unexpected_keys": found.keys() - expected.keys() - above,
            "mismatched_keys": {
                (name, found[name], expected[name])
                for name in found.keys() & expected.keys()
                if found[name] != expected[name]
            },
        }
    )
    return [piece for piece in pieces if piece.name in expected]


def write_weights(source: Source, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """
    Writes the weights as safetensors, and an index if there is more than one file.

    One tensor is in memory at a time, and the pages of the file that it is read from.
    """
    pieces = check_pieces(plan_pieces(source), source)
    shards = _group(pieces, shard_bytes)
    weight_map = {}
    deltas = _LoraDeltas(source)
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({piece.name: name for piece in shard})
        with ShardWriter(folder / name, list(shard)) as writer, open_tensors(shard[0].path) as file:
            for piece in shard:
                writer.write(piece.name, deltas.merged(piece, _read(piece, file)))
    deltas.check_all_used()
    if len(shards) > 1:
        total = sum(piece.num_bytes for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _group(pieces: list[Piece], shard_bytes: int) -> list[list[Piece]]:
    """Neighbours from one file, up to the size of a shard."""
    shards: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not shards or shards[-1][0].path != piece.path or size + piece.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.num_bytes
    return shards


def _read(piece: Piece, file) -> torch.Tensor:
    tensor = file.read(piece.source_name)
    return tensor if piece.part is None else tensor.chunk(3)[piece.part]


class _LoraDeltas:
    """What a LoRA adapter adds to weights, one at a time."""

    def __init__(self, source: Source):
        self.path, self.scale = source.adapter, source.lora_scale
        self.pairs: dict[str, dict[str, str]] = {}
        if self.path is None:
            return
        with open_tensors(self.path) as file:
            for name in file.names:
                module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
                if kind not in ("A.weight", "B.weight"):
                    raise ValueError(f"`{self.path}` holds {name!r}, which is no part of a plain LoRA adapter.")
                self.pairs.setdefault(f"{module}.weight", {})[kind[0]] = name
        for weight, pair in self.pairs.items():
            if len(pair) != 2:
                raise ValueError(f"`{self.path}` holds half an adapter for {weight!r}: {sorted(pair.values())}.")

    def merged(self, piece: Piece, weight: torch.Tensor) -> torch.Tensor:
        """`W + scale * B @ A`, added up in single precision."""
        pair = self.pairs.pop(piece.released_name, None)
        if pair is None or self.path is None:
            return weight
        with open_tensors(self.path) as file:
            delta = file.read(pair["B"]).float() @ file.read(pair["A"]).float() * self.scale
        if delta.shape != weight.shape:
            raise ValueError(
                f"The adapter of {piece.released_name!r} has shape {tuple(delta.shape)}, not {piece.shape}."
            )
        return (weight.float() + delta).to(weight.dtype)

    def check_all_used(self) -> None:
        """Every part of the adapter has found its weight."""
        if self.pairs:
            raise ValueError(f"The adapter has parts for weights that the model lacks: {sorted(self.pairs)}.")
