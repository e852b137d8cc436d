"""
Conversations in JSON files: an index of where each record lies, so that the records themselves stay on disk.
"""

import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .conversations import BadRecord


ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""Speakers of the LLaVA format (and of others that use its shape) to roles of a chat template."""
IMAGE_TOKEN = "<image>"
SEPARATORS = re.compile(r"[\s,\[\]\ufeff]*")
CHUNK = 1 << 20  # characters read at a time while a file is indexed
LARGEST_RECORD = 1 << 24  # characters; anything longer is taken for a broken file


def conversation_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """
    A record of either format as `messages` (contents are lists of parts) and `images`.

    LLaVA: `conversations` of `from` and `value`, with `image` a path or a list of them. The image is moved before the
    text of its turn, as the authors do (`preprocess_multimodal` in their `train.py`). Else: `messages`,
    and `images` or `image`.

    Raises:
        BadRecord: for an unknown role, an empty answer, no answer at all, or another number of `<image>` than images.
    """
    if not isinstance(record, Mapping):
        raise BadRecord("no conversation", f"a record must be an object, got {type(record).__name__}")
    if "conversations" in record:
        turns, images = record["conversations"], record.get("image")
        images = [] if images is None else images if isinstance(images, list) else [images]
        pairs = pairs_of(turns, "from", "value")
    elif "messages" in record:
        image = record.get("image")
        images = list(record.get("images") or ([] if image is None else [image]))
        pairs = pairs_of(record["messages"], "role", "content")
    else:
        raise BadRecord("no conversation", f"neither `conversations` nor `messages` among {sorted(record)}")
    messages = [message_of(role, content) for role, content in pairs]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecord("no answer", "a conversation needs at least one turn of the assistant")
    place_images(messages, len(images), name_them="messages" in record)
    return {"messages": messages, "images": images}


def pairs_of(turns: Any, speaker: str, content: str) -> list[tuple[Any, Any]]:
    """Who says what, from turns that name it by these keys."""
    turns = [] if turns is None else turns
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRecord("no conversation", f"turns must be a list of objects, got {turns!r:.80}")
    return [(turn.get(speaker), turn.get(content)) for turn in turns]


def message_of(role: Any, content: Any) -> dict[str, Any]:
    """One turn, its content as parts of type `image` and `text`. Images come first."""
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord("unknown role", f"{role!r}, must be one of {', '.join(ROLES)}")
    if isinstance(content, str):
        texts, num_images = [content], content.count(IMAGE_TOKEN)
    elif isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") or "" for part in content if part.get("type") == "text"]
        num_images = sum(part.get("type") == "image" for part in content) + "".join(texts).count(IMAGE_TOKEN)
    else:
        raise BadRecord("empty answer" if ROLES[role] == "assistant" else "no text", f"content is {content!r}")
    text = "".join(texts).replace(IMAGE_TOKEN, "").strip() if num_images else "".join(texts)
    if ROLES[role] == "assistant" and num_images:
        raise BadRecord("wrong number of <image>", "an answer cannot hold an image")
    if ROLES[role] == "assistant" and not text.strip():
        raise BadRecord("empty answer", "an answer must have text")
    return {"role": ROLES[role], "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def place_images(messages: list[dict[str, Any]], num_images: int, name_them: bool) -> None:
    """
    Checks that there is one `<image>` per image. With `name_them`, a conversation that names none of its images (as in
    TRL's data sets) gets them all before its first question.
    """
    named = sum(part["type"] == "image" for message in messages for part in message["content"])
    question = next((message for message in messages if message["role"] == "user"), None)
    if name_them and named == 0 and question is not None:
        question["content"] = [{"type": "image"}] * num_images + question["content"]
        named = num_images
    if named != num_images:
        raise BadRecord("wrong number of <image>", f"{named} in the text for {num_images} images")


@dataclass
class RecordIndex:
    """Where the records of a file lie, and what a sampler wants to know of them. 13 bytes a record."""

    starts: np.ndarray  # int64: first byte
    sizes: np.ndarray  # int32: bytes
    with_image: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.starts)


class JsonRecords:
    """
    The records of a `.json` (one list) or `.jsonl` file, read one at a time from a memory map.

    Args:
        path (`str`): the file.

    Raises:
        ValueError: naming the byte where the file stops being JSON.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        if not Path(path).is_file() or not os.path.getsize(path):
            raise ValueError(f"`path` must be a JSON or JSONL file with records, got {self.path!r}: missing or empty.")
        self.index = build_index(self.path)
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict[str, Any]:
        start, size = int(self.index.starts[position]), int(self.index.sizes[position])
        return json.loads(self._memory()[start : start + size])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[position] for position in range(len(self)))

    def _memory(self) -> mmap.mmap:
        if self._map is None:  # opened anew in every worker
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}


def build_index(path: str) -> RecordIndex:
    """One pass over the file. What is read is forgotten again."""
    starts, sizes, with_image = Growing(np.int64), Growing(np.int32), Growing(np.bool_)
    for start, size, record in scan(path):
        starts.append(start)
        sizes.append(size)
        with_image.append(isinstance(record, dict) and bool(record.get("image") or record.get("images")))
    return RecordIndex(starts.array(), sizes.array(), with_image.array())


class Growing:
    """An array that is appended to."""

    def __init__(self, dtype):
        self.values, self.length = np.empty(1024, dtype), 0

    def append(self, value) -> None:
        """Adds one value; room is doubled when it runs out."""
        if self.length == len(self.values):
            self.values = np.concatenate([self.values, np.empty_like(self.values)])
        self.values[self.length] = value
        self.length += 1

    def array(self) -> np.ndarray:
        """The values, in an array of their number."""
        return self.values[: self.length].copy()


def scan(path: str) -> Iterator[tuple[int, int, Any]]:
    """
    First byte, number of bytes and value of every record of a JSON list or of JSON lines.

    Raises:
        ValueError: if something between the records is not JSON.
    """
    decoder = json.JSONDecoder()
    start, text = 0, ""  # what has been read and not yet understood, and the byte that it begins at
    for chunk, is_last in chunks(path):
        text += chunk
        position = 0
        while True:
            record_at = SEPARATORS.match(text, position).end()  # type: ignore[union-attr]
            start += len(text[position:record_at].encode())
            position = record_at
            if position == len(text):
                break
            try:
                record, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                if is_last or len(text) - position > LARGEST_RECORD:
                    raise ValueError(
                        f"{path!r} must hold JSON records, but none begins at byte {start} ({error.msg}). Is the file "
                        "complete?"
                    ) from error
                break  # the rest of the record is in the next chunk
            size = len(text[position:end].encode())
            yield start, size, record
            start, position = start + size, end
        text = text[position:]


def chunks(path: str) -> Iterator[tuple[str, bool]]:
    """The text of a file in pieces, and whether a piece is the last."""
    with open(path, encoding="utf-8", newline="") as file:
        chunk = file.read(CHUNK)
        while True:
            following = file.read(CHUNK)
            yield chunk, not following
            if not following:
                return
            chunk = following
