"""
What happens to a batch between the collator and the model: cut to a budget, a blank image, the positions that learn.

Axes: B rows, S row length, I images, V vocabulary, T positions with a label.
"""

from typing import Any

import torch
from torch import nn


IGNORED = -100
"""Label of a token that is not learned, as `torch.nn.functional.cross_entropy` ignores it."""


def trim_to_budget(batch: dict[str, Any], budget: int, image_token_id: int, max_visual_tokens: int) -> dict[str, Any]:
    """
    The batch as the processor would have made it at `budget`: of every image the first so many placeholders are kept.

    Ids, labels, mask and everything else of shape `(B, S)` are cut together, so whatever looks at the batch later sees
    one shape. Rows end up padded on the right. Images with fewer placeholders keep theirs. The input is not changed.

    Args:
        batch (`dict`): with `input_ids` of shape `(B, S)`; `visual_token_counts` of shape `(I,)` unless every image has
            `max_visual_tokens` placeholders.
        budget (`int`): m.
        image_token_id (`int`): the placeholder.
        max_visual_tokens (`int`): M.

    Raises:
        ValueError: if `position_ids` or a mask that is not 2-D would have to be cut, or the placeholders are not those
            of whole images.
    """
    if batch.get("pixel_values") is None:
        return batch
    ids = batch["input_ids"]
    counts = batch.get("visual_token_counts")
    if counts is None:
        counts = torch.full((len(batch["pixel_values"]),), max_visual_tokens, device=ids.device)
    check_trimmable(batch, counts, ids == image_token_id)
    if int(counts.max()) <= budget:
        return {**batch, "visual_token_counts": counts}
    kept = kept_positions(ids == image_token_id, counts, budget)
    if batch.get("attention_mask") is not None:
        kept &= batch["attention_mask"].bool()
    lengths = kept.sum(-1)  # (B,)
    longest = int(lengths.max())
    order = (~kept).long().argsort(dim=-1, stable=True)[:, :longest]  # (B, longest): what is kept, in order
    filling = torch.arange(longest, device=ids.device) >= lengths[:, None]
    trimmed = dict(batch, visual_token_counts=counts.clamp(max=budget))
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:
            trimmed[name] = value.gather(1, order).masked_fill(filling, IGNORED if name == "labels" else 0)
    if batch.get("attention_mask") is None:
        trimmed["attention_mask"] = (~filling).long()
    return trimmed


def kept_positions(is_image: torch.Tensor, counts: torch.Tensor, budget: int) -> torch.Tensor:
    """`(B, S)`: true for text, and for the first `budget` placeholders of each image. `counts` has shape `(I,)`."""
    placeholder = (is_image.flatten().cumsum(0) - 1).clamp(min=0)  # (B * S,), numbered over the batch
    ends = counts.to(is_image.device).cumsum(0)  # (I,)
    image = torch.searchsorted(ends, placeholder, right=True).clamp(max=len(counts) - 1)
    place_in_image = placeholder - (ends - counts)[image]
    return ~is_image | (place_in_image.view_as(is_image) < budget)


def check_trimmable(batch: dict[str, Any], counts: torch.Tensor, is_image: torch.Tensor) -> None:
    """
    Raises:
        ValueError: see [`trim_to_budget`].
    """
    mask = batch.get("attention_mask")
    if batch.get("position_ids") is not None or (mask is not None and mask.ndim != 2):
        raise ValueError(
            "`position_ids` and 4-D attention masks cannot follow a batch that is cut to another number of visual "
            "tokens. Leave them out, or have the collator draw the number."
        )
    if int(is_image.sum()) != int(counts.sum()):
        raise ValueError(
            f"The batch has {int(is_image.sum())} image placeholders, but its {len(counts)} images take "
            f"{int(counts.sum())}. Let the collator pass `visual_token_counts` from the processor on."
        )


def without_image_labels(batch: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """The batch with no label on a placeholder. (TRL's collator puts some there, to be counted and learned.)"""
    if batch.get("labels") is None:
        return batch
    return {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] == image_token_id, IGNORED)}


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """`(B, S)`: at each position the label of the next token, which is what the logits there predict."""
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def with_blank_image(batch: dict[str, Any], image_token_id: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """
    A text-only batch with one blank image behind the end of its first row: masked, without a label, seen by no token.

    Loss and gradients stay as they were, those of the image's path being exactly zero; but the path is walked, as
    sharded training needs it on every rank.
    """
    ids = batch["input_ids"]
    padded = dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:
            padded[name] = nn.functional.pad(value, (0, 1), value=IGNORED if name == "labels" else 0)
    padded["input_ids"][0, -1] = image_token_id
    if batch.get("attention_mask") is None:
        padded["attention_mask"] = nn.functional.pad(torch.ones_like(ids), (0, 1))
    padded["pixel_values"] = torch.zeros(1, *image_shape, device=ids.device)
    padded["visual_token_counts"] = torch.ones(1, dtype=torch.long, device=ids.device)
    return padded


def pad_rows(rows: list[torch.Tensor], value: int, multiple_of: int = 1) -> torch.Tensor:
    """`(B, S)`: 1-D rows filled up with `value` on the right, to the longest, rounded up to a multiple."""
    length = -(-max(map(len, rows)) // multiple_of) * multiple_of
    return torch.stack([nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])
