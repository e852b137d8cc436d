"""
Checkpoint files, read and written one tensor at a time: nothing here holds more than one tensor and its file's pages.
"""

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open


# In order of preference, as `from_pretrained` looks for them.
WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What is fetched from the Hub: no code, no weights of other frameworks, and pickles only where there is nothing else.
DATA_PATTERNS = [
    *("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors"),
    *("query_abstractor.bin", "non_lora_trainables.bin", "adapter_model.bin"),
]

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def local_folder(source: str | Path, **hub_kwargs) -> Path:
    """
    A folder as it is, or the data files of a Hub repository. Where it has safetensors, its pickles stay there.

    Raises:
        ValueError: if `source` looks like a path and is not there.
    """
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise ValueError(f"`{source}` must be a folder or a Hub id, but there is no such folder.")
    folder = Path(snapshot_download(str(source), allow_patterns=DATA_PATTERNS, **hub_kwargs))
    if not any(folder.glob("*.safetensors")):
        snapshot_download(str(source), allow_patterns=["*.bin"], **hub_kwargs)
    return folder


def read_json(path: Path) -> dict:
    """
    A JSON object.

    Raises:
        ValueError: if the file is absent or not one.
    """
    if not path.is_file():
        raise ValueError(f"`{path.parent}` must hold a {path.name}, but does not.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"`{path}` must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got a {type(value).__name__}.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """
    The files that hold a folder's weights: one, or the shards of an index.

    Raises:
        ValueError: if there are none, or the index names files that are missing or outside the folder.
    """
    for name in WEIGHTS_NAMES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"`{path}` must have a `weight_map` from names to files.")
        return [_shard(folder, shard, path) for shard in sorted({str(shard) for shard in weight_map.values()})]
    raise ValueError(f"`{folder}` holds no weights. It must have one of {', '.join(WEIGHTS_NAMES)}.")


def _shard(folder: Path, shard: str, index: Path) -> Path:
    if Path(shard).name != shard or "\\" in shard:
        raise ValueError(f"`{index}` names the file {shard!r}, which is not in its own folder: refused.")
    if not (folder / shard).is_file():
        raise ValueError(f"`{index}` names the file {shard!r}, which is missing.")
    return folder / shard


class TensorFile:
    """An open file of named tensors. Nothing is read before it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._tensors: dict[str, torch.Tensor] | None = None
        try:
            if path.suffix == ".safetensors":
                self._file = safe_open(path, framework="pt")
                self.names = list(self._file.keys())
            else:
                self._tensors = _read_pickle(path)
                self.names = list(self._tensors)
        except SafetensorError as error:
            raise ValueError(f"`{path}` is damaged or no safetensors file: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._tensors[name].shape if self._tensors else self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor, without reading it."""
        if self._tensors:
            return self._tensors[name].dtype
        written = self._file.get_slice(name).get_dtype()
        for dtype, known in SAFETENSORS_NAMES.items():
            if known == written:
                return dtype
        raise ValueError(f"`{name}` in {self.path} has the number format {written}, which is not supported.")

    def read(self, name: str) -> torch.Tensor:
        """The tensor."""
        return self._tensors[name] if self._tensors else self._file.get_tensor(name)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """A file of `torch.save`, mapped rather than read where its format allows. Never runs what is in it."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # written before torch 1.6
                raise
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`{path}` is damaged, or holds more than tensors: refused without running it ({reason}). Ask for a "
            "safetensors file."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"`{path}` must hold a dictionary of tensors.")
    return tensors


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """A [`TensorFile`], whose pages are given back at the end."""
    file = TensorFile(path)
    try:
        yield file
    finally:
        file.__dict__.clear()


def shapes_of(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in some files."""
    shapes = {}
    for path in paths:
        with open_tensors(path) as file:
            shapes.update({name: file.shape(name) for name in file.names})
    return shapes


@dataclass
class PlannedTensor:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class ShardWriter:
    """
    A safetensors file, written as its tensors come. The format is a length of 8 bytes, a JSON header with the place of
    every tensor, and the tensors: so shapes have to be known first, and no tensor has to wait for another.
    """

    path: Path
    planned: list[PlannedTensor]
    _ends: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> "ShardWriter":
        header: dict = {"__metadata__": {"format": "pt"}}
        place = 0
        for tensor in self.planned:
            end = place + tensor.num_bytes
            header[tensor.name] = {
                "dtype": SAFETENSORS_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [place, end],
            }
            place = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._waiting = list(self.planned)
        self._stream = self.path.open("wb")
        self._stream.write(len(encoded).to_bytes(8, "little") + encoded)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, in the planned order."""
        planned = self._waiting.pop(0)
        if (planned.name, planned.shape, planned.dtype) != (name, tuple(tensor.shape), tensor.dtype):
            raise RuntimeError(f"{name} {tuple(tensor.shape)} {tensor.dtype} was written, but {planned} is next.")
        self._stream.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))

    def __exit__(self, exception_type, *_) -> None:
        self._stream.close()
        if exception_type is None and self._waiting:
            raise RuntimeError(f"{self.path} lacks {len(self._waiting)} planned tensors.")
