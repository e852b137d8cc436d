"""
Data sets for training: where records come from, how they are mixed, and what happens to bad ones.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .conversations import BadRecord
from .records import JsonRecords, conversation_of


LARGEST_IMAGE = 178_956_970
"""Pixels: twice Pillow's `MAX_IMAGE_PIXELS`, where Pillow itself speaks of a decompression bomb."""
SHARE_WORTH_A_WARNING = 0.01
TRIES = 100
"""Bad records in a row after which the data itself, rather than a record, is called broken."""


class Records(Protocol):
    """A list of records, on disk or not."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> Mapping[str, Any]: ...


@dataclass
class SkipLog:
    """
    Bad records, one JSON line each in a file that all ranks, all DataLoader workers and all restarts append to.

    Args:
        path (`str`, *optional*): the file; without one nothing is kept.
        strict (`bool`): whether the first bad record stops the run.
    """

    path: str | None = None
    strict: bool = False

    def skip(self, name: str, error: BadRecord) -> None:
        """
        Notes a bad record.

        Raises:
            BadRecord: if `strict`, naming the record.
        """
        if self.strict:
            raise BadRecord(error.reason, f"record {name}: {error}") from error
        if self.path is not None:
            line = json.dumps({"record": name, "reason": error.reason, "detail": str(error)}) + "\n"
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())  # one write, so that lines of several processes do not mix
            finally:
                os.close(descriptor)

    def read(self) -> dict[str, dict[str, str]]:
        """Name of each bad record to its line. A record met again counts once; a half-written last line not at all."""
        lines = Path(self.path).read_text().splitlines() if self.path and os.path.exists(self.path) else []
        found: dict[str, dict[str, str]] = {}
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found.setdefault(entry["record"], entry)
        return found

    def report(self, num_records: int | None) -> str | None:
        """What a user should know at the end: how many were skipped, why, and the first few names."""
        found = self.read()
        if not found:
            return None
        reasons = Counter(entry["reason"] for entry in found.values())
        why = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        text = f"Skipped {len(found)} bad records ({why}). First: {', '.join(list(found)[:5])}. All: {self.path}."
        if num_records and len(found) > SHARE_WORTH_A_WARNING * num_records:
            share = len(found) / num_records
            text += f" That is {share:.1%} of the data, which is more than a few: look at the reasons."
        return text


@dataclass
class Source:
    """
    Records with a name, a folder for their images and a weight in a mixture.

    Args:
        weight (`float`): how often each record is seen in an epoch: 0.5 takes half of them, 2.0 each twice.
    """

    name: str
    records: Records
    image_folder: str | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.records)

    def name_of(self, position: int) -> str:
        """How a record is called in messages."""
        return f"{self.name}#{position}"

    def conversation(self, position: int) -> dict[str, Any]:
        """
        A record with its images open.

        Raises:
            BadRecord: for anything that cannot be learned from.
        """
        return open_conversation(self.records[position], self.image_folder)


def open_conversation(record: Mapping[str, Any], image_folder: str | None) -> dict[str, Any]:
    """A record of either format as `messages` and decoded `images`. See [`BadRecord`] for what is refused."""
    conversation = conversation_of(record)
    conversation["images"] = [open_image(image, image_folder) for image in conversation["images"]]
    return conversation


def open_image(image: Any, folder: str | None) -> Image.Image:
    """
    A decoded image from a path, from bytes or from one that is already open.

    Raises:
        BadRecord: if it is missing, broken or too large.
    """
    if isinstance(image, Mapping):  # a column of `datasets` that is not decoded
        import io

        source: Any = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    else:
        source = image
    try:
        if isinstance(source, (str, os.PathLike)):
            source = os.path.join(folder or "", source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = source if isinstance(source, Image.Image) else Image.open(source)
            if opened.width * opened.height > LARGEST_IMAGE:
                raise BadRecord("huge image", f"{opened.width} x {opened.height} pixels in {source!r}")
            opened.load()
        return opened
    except FileNotFoundError as error:
        raise BadRecord("missing image", f"no file {str(source)!r}. Is `image_folder` right?") from error
    except Image.DecompressionBombError as error:
        raise BadRecord("huge image", f"{source!r}: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, AttributeError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("broken image", f"{source!r}: {error}") from error


class ConversationDataset(torch.utils.data.Dataset):
    """
    Sources in one list, mixed by weight, encoded when asked for.

    A bad record is noted, and the next good one of the mixture stands in for it: epochs keep their length, and every
    rank and every restart sees the same.

    Args:
        sources (`list[Source]`): with their weights.
        encode (`Callable`): a conversation to a row.
        skip_log ([`SkipLog`]): where bad records go.
        seed (`int`): of the choice that fractional weights make.
    """

    def __init__(self, sources: Sequence[Source], encode: Callable, skip_log: SkipLog | None = None, seed: int = 0):
        self.sources, self.encode, self.skip_log = list(sources), encode, skip_log or SkipLog()
        chosen = [mix_in(len(source), source.weight, seed + i) for i, source in enumerate(self.sources)]
        self.source_of = np.repeat(np.arange(len(chosen), dtype=np.int16), [len(part) for part in chosen])
        self.position_of = np.concatenate(chosen) if chosen else np.empty(0, np.int32)
        if not len(self):
            raise ValueError("`data` has no records. Check the files and the weights.")

    def __len__(self) -> int:
        return len(self.position_of)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        for shift in range(min(TRIES, len(self))):
            place = (item + shift) % len(self)
            source, position = self.sources[self.source_of[place]], int(self.position_of[place])
            try:
                return self.encode(source.conversation(position))
            except BadRecord as error:
                self.skip_log.skip(source.name_of(position), error)
                last = error
        raise ValueError(f"{shift + 1} records in a row cannot be learned from; the last: {last}")

    def lengths(self) -> np.ndarray:
        """`(len,)`: about how long each record is, negative where it has no image. For sampling by length."""
        parts = [lengths_of(source) for source in self.sources]
        first = np.cumsum([0] + [len(part) for part in parts])[:-1]
        return np.concatenate(parts)[first[self.source_of] + self.position_of]


def mix_in(num_records: int, weight: float, seed: int) -> np.ndarray:
    """
    Positions of one epoch of a source: all of them `floor(weight)` times, and a random part for the fraction.

    Raises:
        ValueError: for a weight that is not positive.
    """
    if not weight > 0:
        raise ValueError(f"`weight` must be positive, got {weight}. Leave the source out to use none of it.")
    whole, part = int(weight), round((weight - int(weight)) * num_records)
    everything = np.arange(num_records, dtype=np.int32)
    rest = np.random.default_rng(seed).permutation(everything)[:part]
    return np.concatenate([everything] * whole + [np.sort(rest)])


def lengths_of(source: Source) -> np.ndarray:
    """`(len(source),)`: bytes of each record, negative without an image; ones where only reading would tell."""
    if isinstance(source.records, JsonRecords):
        index = source.records.index
        return np.where(index.with_image, index.sizes, -index.sizes)
    return np.ones(len(source), np.int32)


class ConversationStream(torch.utils.data.IterableDataset):
    """
    Sources read as they come, mixed by weight until each has been read, encoded; bad records are noted and left out.

    DataLoader workers share the records among them. Ranks each read all and keep their part of the batches.

    Args:
        sources (`list[Source]`): their records may be anything that can be iterated over more than once.
        encode, skip_log, seed: see [`ConversationDataset`].
    """

    def __init__(self, sources: Sequence[Source], encode: Callable, skip_log: SkipLog | None = None, seed: int = 0):
        self.sources, self.encode, self.skip_log = list(sources), encode, skip_log or SkipLog()
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Mixes, and shuffles what can be shuffled, anew."""
        self.epoch = epoch
        for source in self.sources:
            if hasattr(source.records, "set_epoch"):
                source.records.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for position, (source, name, record) in enumerate(self._mixed()):
            if position % number != own:
                continue
            try:
                yield self.encode(open_conversation(record, source.image_folder))
            except BadRecord as error:
                self.skip_log.skip(name, error)

    def _mixed(self) -> Iterator[tuple[Source, str, Mapping[str, Any]]]:
        """Records in order of a weighted draw; a source that has been read starts over until the last has been."""
        generator = np.random.default_rng([self.seed, self.epoch])
        weights = np.array([source.weight for source in self.sources])
        streams: list[Iterator] = [enumerate(source.records) for source in self.sources]  # type: ignore[arg-type]
        unread = set(range(len(streams)))
        while unread:
            chosen = int(generator.choice(len(streams), p=weights / weights.sum()))
            item = next(streams[chosen], None)
            if item is None:
                unread.discard(chosen)
                streams[chosen] = enumerate(self.sources[chosen].records)  # type: ignore[arg-type]
            else:
                source = self.sources[chosen]
                yield source, source.name_of(item[0]), item[1]


class ByLengthAndModality(torch.utils.data.Sampler):
    """
    Batches of one kind, with images or without, and of about one length (`LengthGroupedSampler` with
    `group_by_modality` in the authors' `llava_trainer.py`). The same order for the same seed and epoch.

    Args:
        lengths (`np.ndarray`): as from [`ConversationDataset.lengths`].
        batch_size (`int`): examples that go into one optimizer step on all ranks.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        self.lengths_, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths_)

    def set_epoch(self, epoch: int) -> None:
        """Another order for each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        full, rest = [], []
        for kind in (self.lengths_ > 0, self.lengths_ <= 0):
            shuffled = generator.permutation(np.flatnonzero(kind))
            batches = self._batches(shuffled)
            full += [batch for batch in batches if len(batch) == self.batch_size]
            rest += [batch for batch in batches if len(batch) < self.batch_size]
        order = [full[i] for i in generator.permutation(len(full))] + rest
        yield from (int(item) for batch in order for item in batch)

    def _batches(self, shuffled: np.ndarray) -> list[np.ndarray]:
        """Stretches of 50 batches are sorted by length, then cut into batches."""
        stretch, batches = 50 * self.batch_size, []
        for start in range(0, len(shuffled), stretch):
            part = shuffled[start : start + stretch]
            part = part[np.argsort(-np.abs(self.lengths_[part]), kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        return batches
