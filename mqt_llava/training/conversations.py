"""
From a conversation about images to rows that the model learns from: loss on the answers and their end tokens alone.

Axes: B rows, S row length, n images of a conversation, I images of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..processing_mqt_llava import PLAIN_CHAT_TEMPLATE, VICUNA_V1_CHAT_TEMPLATE, MqtLlavaProcessor
from .batches import IGNORED, pad_rows, trim_to_budget
from .draws import Draw


CHAT_TEMPLATES = {"plain": PLAIN_CHAT_TEMPLATE, "vicuna": VICUNA_V1_CHAT_TEMPLATE}
"""Names that a recipe may use for `chat_template`, beside the processor's own."""


class BadRecord(ValueError):
    """A record that cannot be learned from. `reason` is short and the same for records with the same trouble."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass
class ConversationEncoder:
    """
    One conversation to one row, at M placeholders per image.

    A row longer than `max_length` is cut on the right, as the authors' loader does, so the last turns lose text. An
    image is never cut: if the cut would fall on or before the end of an image, or leave nothing to learn, the
    conversation is refused.

    Args:
        processor ([`MqtLlavaProcessor`]): its chat template must mark answers with `{% generation %}`.
        max_length (`int`, *optional*): most tokens of a row, placeholders included.
        chat_template (`str`, *optional*): a template, or the name of one in `CHAT_TEMPLATES` or of the processor; the
            processor's own by default.
    """

    processor: MqtLlavaProcessor
    max_length: int | None = None
    chat_template: str | None = None

    def __post_init__(self):
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` must be positive, got {self.max_length}.")
        own = self.processor.chat_template  # one template, or several by name
        named = {**CHAT_TEMPLATES, **(own if isinstance(own, dict) else {"default": own})}
        self.template = named.get(self.chat_template or "default", self.chat_template)
        if "generation" not in (self.template or ""):
            raise ValueError(
                "`chat_template` must mark the answers with `{% generation %}` ... `{% endgeneration %}`, or there is "
                "nothing to tell them by. Add the marks to the template of the processor."
            )

    def __call__(self, example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """
        Args:
            example (`dict`): `messages` (content a string, or parts of type `text` and `image`) and `images`, in order.

        Returns:
            `dict`: `input_ids` and `labels` of shape `(S,)`; with images also `pixel_values` of shape `(n, 3, H, W)`.

        Raises:
            BadRecord: naming what is wrong, and the way out where there is one.
        """
        conversation = with_images(example["messages"], example.get("images") or [])
        row = self.processor.apply_chat_template(
            [conversation],
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": self.processor.max_visual_tokens},
        )
        ids = row["input_ids"][0]
        labels = ids.masked_fill(torch.as_tensor(row["assistant_masks"])[0] == 0, IGNORED)
        encoded = {"input_ids": ids, "labels": labels}
        if "pixel_values" in row:
            encoded["pixel_values"] = row["pixel_values"]
        return self.cut(encoded)

    def cut(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The row, not longer than `max_length`."""
        length = self.max_length
        if length is not None and len(row["input_ids"]) > length:
            if (row["input_ids"][length:] == self.processor.image_token_id).any():
                raise BadRecord(
                    "too long",
                    f"`max_length` ({length}) would cut an image away from a row of {len(row['input_ids'])} tokens. "
                    "Raise `max_length`, or put fewer images into a conversation.",
                )
            row = {**row, "input_ids": row["input_ids"][:length], "labels": row["labels"][:length]}
        if not (row["labels"] != IGNORED).any():
            raise BadRecord(
                "nothing to learn",
                f"no answer begins within `max_length` ({length}). Raise it, or shorten the question.",
            )
        return row


def with_images(messages: Sequence[Mapping], images: Sequence) -> list[dict]:
    """
    New messages whose contents are lists of parts, the images in their `image` parts.

    Raises:
        BadRecord: if there are not as many `image` parts as images.
    """
    supply, conversation = iter(images), []
    num_parts = 0
    for message in messages:
        parts: list[dict] = []
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                num_parts += 1
                parts.append({"type": "image", "image": next(supply, None)})
            else:
                parts.append({"type": "text", "text": part.get("text") or ""})
        conversation.append({"role": message["role"], "content": parts})
    if num_parts != len(images):
        raise BadRecord("wrong number of <image>", f"{num_parts} in the text for {len(images)} images")
    return conversation


@dataclass
class ConversationCollator:
    """
    Rows to a batch: padded on the right, images in flat order, M placeholders each.

    Takes conversations (`messages` and `images`) or rows that are already encoded. Examples are never changed, and
    nothing is kept between calls, so it works in DataLoader workers. Under a plain `Trainer` give it `draw`, and every
    batch is cut to a number of visual tokens of its own; [`MqtLlavaTrainer`] draws by itself.

    Args:
        processor ([`MqtLlavaProcessor`]): makes the rows.
        max_length, chat_template: see [`ConversationEncoder`].
        draw ([`Draw`], *optional*): with one budget per step, drawn from torch's global generator.
        pad_to_multiple_of (`int`, *optional*): rounds the row length up.
    """

    processor: MqtLlavaProcessor
    max_length: int | None = None
    chat_template: str | None = None
    draw: Draw | None = None
    pad_to_multiple_of: int = 1
    encode: ConversationEncoder = field(init=False)

    def __post_init__(self):
        self.encode = ConversationEncoder(self.processor, self.max_length, self.chat_template)
        if self.draw is not None and self.draw.name in ("all_of", "sandwich"):
            raise ValueError(
                f"`draw` of a collator must give one number per batch, got {self.draw.name!r}. Use `MqtLlavaTrainer`, "
                "which can take the mean loss over several."
            )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `labels` of shape `(B, S)`; with any image in the batch also
            `pixel_values` of shape `(I, 3, H, W)` and `visual_token_counts` of shape `(I,)`.

        Raises:
            BadRecord: (a `ValueError`) for a conversation that cannot be encoded.
        """
        rows = [example if "input_ids" in example else self.encode(example) for example in examples]
        ids = [row["input_ids"] for row in rows]
        pad = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": pad_rows(ids, pad if pad is not None else 0, self.pad_to_multiple_of),
            "attention_mask": pad_rows([torch.ones_like(row) for row in ids], 0, self.pad_to_multiple_of),
            "labels": pad_rows([row["labels"] for row in rows], IGNORED, self.pad_to_multiple_of),
        }
        pixels = [row["pixel_values"] for row in rows if row.get("pixel_values") is not None]
        maximum = self.processor.max_visual_tokens
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
            batch["visual_token_counts"] = torch.full((len(batch["pixel_values"]),), maximum)
        if self.draw is None:
            return batch
        return trim_to_budget(batch, self.draw.from_torch()[0], self.processor.image_token_id, maximum)
