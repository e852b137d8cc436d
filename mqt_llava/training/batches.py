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
            `max_visual_tokens` placeholders. A mask of shape `(B, 1, S, S)`, boolean or additive, may come with
            `position_ids`: a token's position falls by the number of placeholders that it saw and that are gone.
        budget (`int`): m.
        image_token_id (`int`): the placeholder.
        max_visual_tokens (`int`): M.

    Raises:
        ValueError: if `position_ids` without a 4-D mask, or a mask of another shape, would have to be cut, or the
            placeholders are not those of whole images.
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
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 4:
        batch = with_closed_ranks(batch, kept)
    elif mask is not None:
        kept &= mask.bool()
    lengths = kept.sum(-1)  # (B,)
    longest = int(lengths.max())
    order = (~kept).long().argsort(dim=-1, stable=True)[:, :longest]  # (B, longest): what is kept, in order
    filling = torch.arange(longest, device=ids.device) >= lengths[:, None]
    trimmed = dict(batch, visual_token_counts=counts.clamp(max=budget))
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:
            trimmed[name] = value.gather(1, order).masked_fill(filling, IGNORED if name == "labels" else 0)
    if mask is None:
        trimmed["attention_mask"] = (~filling).long()
    elif mask.ndim == 4:
        trimmed["attention_mask"] = cut_mask(mask, order, filling)
    return trimmed


def with_closed_ranks(batch: dict[str, Any], kept: torch.Tensor) -> dict[str, Any]:
    """The batch with `position_ids`, if it has any, as they are once all but the `(B, S)` `kept` tokens are gone."""
    if batch.get("position_ids") is None:
        return batch
    gone = visible(batch["attention_mask"])[:, 0] & ~kept[:, None, :]  # (B, S, S)
    return {**batch, "position_ids": batch["position_ids"] - gone.sum(-1)}


def cut_mask(mask: torch.Tensor, order: torch.Tensor, filling: torch.Tensor) -> torch.Tensor:
    """
    `(B, 1, S, S)` to `(B, 1, S', S')`: the rows and columns of `order`, of shape `(B, S')`. Nobody sees `filling`,
    except itself, so that no row of the softmax is empty.
    """
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    shown = True if mask.dtype == torch.bool else 0.0
    columns = mask.gather(3, order[:, None, None, :].expand(-1, -1, mask.shape[2], -1))
    cut = columns.gather(2, order[:, None, :, None].expand(-1, -1, -1, order.shape[1]))
    itself = torch.eye(order.shape[1], dtype=torch.bool, device=mask.device) & filling[:, None, :]
    return cut.masked_fill(filling[:, None, None, :], hidden).masked_fill(itself[:, None], shown)


def visible(mask: torch.Tensor) -> torch.Tensor:
    """A boolean or additive mask as a boolean one: true where a token may look."""
    return mask if mask.dtype == torch.bool else mask == 0


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
    mask, (rows, length) = batch.get("attention_mask"), is_image.shape
    shape = None if mask is None else tuple(mask.shape)
    square = shape == (rows, 1, length, length)
    if (batch.get("position_ids") is not None and not square) or not (square or shape in (None, (rows, length))):
        raise ValueError(
            "A batch that is cut to another number of visual tokens must have an `attention_mask` of shape "
            f"{(rows, length)}, or one of shape {(rows, 1, length, length)}, with or without `position_ids`; got "
            f"{shape} {'with' if batch.get('position_ids') is not None else 'without'} `position_ids`. Leave them out, "
            "or have the collator draw the number."
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
