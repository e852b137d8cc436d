"""From the `data` of a recipe to data sets."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from .data import ConversationDataset, ConversationStream, SkipLog, Source
from .recipe import DataArguments
from .records import JsonRecords


KEYS = {"path", "image_folder", "weight", "split", "name"}


def make_dataset(sources: list, arguments: DataArguments, encode: Callable, skip_log: SkipLog, seed: int):
    """The sources of a recipe, mixed. A stream if the recipe asks for one, else a list that stays on disk."""
    described = [describe(source, arguments) for source in sources]
    opened = [open_source(source, arguments.streaming) for source in described]
    kind = ConversationStream if arguments.streaming else ConversationDataset
    return kind(opened, encode, skip_log, seed)


def describe(source: Any, arguments: DataArguments) -> dict[str, Any]:
    """
    A source as a mapping with every key.

    Raises:
        ValueError: for an unknown key, or a source without a path.
    """
    if isinstance(source, str):
        source = {"path": source}
    if not isinstance(source, Mapping) or "path" not in source or not set(source) <= KEYS:
        raise ValueError(
            f"A source in `data` must be a path, or a mapping with `path` and perhaps {sorted(KEYS)}, got {source!r}."
        )
    defaults = {"image_folder": arguments.image_folder, "weight": 1.0, "split": "train", "name": None}
    return {**defaults, **source}


def open_source(source: Mapping[str, Any], streaming: bool = False) -> Source:
    """Records of a JSON file, of a folder or Hub id that `datasets` can load, or the built-in toy."""
    path = source["path"]
    if path.startswith("builtin:tiny"):
        from .tiny import TinyRecords

        records: Any = TinyRecords(64, seed=1) if path.endswith("-eval") else TinyRecords()
    elif path.endswith((".json", ".jsonl")):
        records = JsonRecords(path)
    else:
        records = load_columns(source, streaming)
    return Source(source["name"] or path, records, source["image_folder"], float(source["weight"]))


def load_columns(source: Mapping[str, Any], streaming: bool):
    """
    `messages` and `images` (or LLaVA's columns) through `datasets`; images stay undecoded until they are asked for.

    Raises:
        ValueError: if the columns are others.
    """
    import datasets

    path = source["path"]
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, "state.json")):
        loaded = datasets.load_from_disk(path)
        loaded = loaded.to_iterable_dataset() if streaming else loaded
    else:
        loaded = datasets.load_dataset(path, split=source["split"], streaming=streaming)
    columns = loaded.column_names or []
    if columns and "messages" not in columns and "conversations" not in columns:
        raise ValueError(
            f"{path!r} must have a column `messages` (and `images`), or `conversations` (and `image`), got {columns}."
        )
    for name, feature in (loaded.features or {}).items():
        undecoded = datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(name, undecoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            loaded = loaded.cast_column(name, datasets.List(undecoded))
    return loaded
