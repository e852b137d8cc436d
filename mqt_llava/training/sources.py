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
    if arguments.streaming:
        return make_stream(described, encode, skip_log, seed)
    return ConversationDataset([open_source(source) for source in described], encode, skip_log, seed)


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


def open_source(source: Mapping[str, Any]) -> Source:
    """Records of a JSON file, of a folder or Hub id that `datasets` can load, or the built-in toy."""
    path = source["path"]
    if path.startswith("builtin:tiny"):
        from .tiny import TinyRecords

        records: Any = TinyRecords(64, seed=1) if path.endswith("-eval") else TinyRecords()
    elif path.endswith((".json", ".jsonl")):
        records = JsonRecords(path)
    else:
        records = load_columns(source, streaming=False)
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


def make_stream(sources: list[dict[str, Any]], encode: Callable, skip_log: SkipLog, seed: int) -> ConversationStream:
    """
    Streams, interleaved by weight until every one has been read.

    Raises:
        ValueError: if the sources have different image folders, which a stream cannot keep apart.
    """
    import datasets

    folders = {source["image_folder"] for source in sources}
    if len(folders) > 1:
        raise ValueError(f"`streaming` needs one `image_folder` for all sources, got {sorted(map(str, folders))}.")
    streams = [open_stream(source) for source in sources]
    if len(streams) > 1:
        total = sum(float(source["weight"]) for source in sources)
        shares = [float(source["weight"]) / total for source in sources]
        stream = datasets.interleave_datasets(streams, shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        stream = streams[0]
    return ConversationStream(stream, encode, skip_log, folders.pop())


def open_stream(source: Mapping[str, Any]):
    """A source as an `IterableDataset`."""
    import datasets

    if source["path"].endswith((".json", ".jsonl")) or source["path"].startswith("builtin:"):
        records = open_source(source).records
        return datasets.IterableDataset.from_generator(lambda: (records[i] for i in range(len(records))))
    return load_columns(source, streaming=True)
