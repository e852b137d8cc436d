"""
Many conversations about one image in one row: the image is read once, and none of them sees another.

Axes: B rows (one image each), S row length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .batches import IGNORED, pad_rows


@dataclass(frozen=True)
class Branch:
    """One conversation about an image, from the first token after the image on."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the token itself where the model speaks (its end token included), else `IGNORED`."""

    def __post_init__(self):
        if len(self.labels) != len(self.input_ids):
            raise ValueError(
                f"`labels` must be as long as `input_ids` ({len(self.input_ids)}), got {len(self.labels)}. Use "
                f"{IGNORED} for the tokens that are not learned."
            )


@dataclass(frozen=True)
class Example:
    """One image and the conversations about it, each as if it were the only one."""

    pixel_values: torch.Tensor
    """`(3, H, W)`, as the image processor gives it, or whatever the model that is trained takes in its place."""
    prefix: list[int]
    """Token ids up to the conversation, the image as one placeholder."""
    branches: list[Branch]


def one_answer(question: list[int], answer: list[int]) -> Branch:
    """A question and its answer; the answer is learned, and must end with the end token."""
    return Branch(question + answer, [IGNORED] * len(question) + answer)


@dataclass
class BranchCollator:
    """
    Packs every image and all conversations about it into one row: the image is read once, and each conversation sees
    the image, itself and nothing else, at the positions it would have alone. (Molmo packs its annotations like this.)

    Examples are never changed. [`MqtLlavaTrainer`] cuts the batch to the number that it draws.
    """

    image_token_id: int
    pad_token_id: int
    num_visual_tokens: int
    """Placeholders of every image."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `labels`, `position_ids` of shape `(B, S)`, an additive `attention_mask` of shape
            `(B, 1, S, S)` and `pixel_values`, those of the examples stacked.

        Raises:
            ValueError: if a prefix does not hold exactly one placeholder.
        """
        rows = [self.pack(example) for example in examples]
        return {
            "input_ids": pad_rows([torch.tensor(row.input_ids) for row in rows], self.pad_token_id),
            "labels": pad_rows([torch.tensor(row.labels) for row in rows], IGNORED),
            "position_ids": pad_rows([torch.tensor(row.position_ids) for row in rows], 0),
            "attention_mask": branch_mask(pad_rows([torch.tensor(row.branch_of) for row in rows], PADDING)),
            "pixel_values": torch.stack([example.pixel_values for example in examples]),
        }

    def pack(self, example: Example) -> "Row":
        """One row: the prefix with its placeholder repeated, then the branches one after the other."""
        if example.prefix.count(self.image_token_id) != 1:
            raise ValueError(
                f"`prefix` must hold the image token ({self.image_token_id}) exactly once, got {example.prefix}. Give "
                "every image an example of its own; the collator repeats the placeholder."
            )
        image = example.prefix.index(self.image_token_id)
        prefix = example.prefix[:image] + [self.image_token_id] * self.num_visual_tokens + example.prefix[image + 1 :]
        row = Row()
        row.append(prefix, [IGNORED] * len(prefix), branch=PREFIX, start=0)
        for index, branch in enumerate(example.branches, start=PREFIX + 1):
            row.append(branch.input_ids, branch.labels, branch=index, start=len(prefix))
        return row


PADDING, PREFIX = -1, 0


@dataclass
class Row:
    """A packed row under construction: four lists of one length."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    branch_of: list[int] = field(default_factory=list)
    """`PREFIX`, or the number of the branch, from 1."""

    def append(self, input_ids: list[int], labels: list[int], branch: int, start: int) -> None:
        """Adds a stretch of tokens of one branch, whose positions count from `start`."""
        self.input_ids += input_ids
        self.labels += labels
        self.position_ids += range(start, start + len(input_ids))
        self.branch_of += [branch] * len(input_ids)


def branch_mask(branch_of: torch.Tensor) -> torch.Tensor:
    """
    `(B, S)` branch numbers to the `(B, 1, S, S)` additive mask: 0 where a token may look, the lowest number elsewhere.

    Additive rather than boolean, because eager attention adds whatever it gets. A token looks back at its own branch
    and at the prefix; padding looks at padding, so that no row of the softmax is empty.
    """
    length = branch_of.shape[1]
    same, prefix = branch_of[:, :, None] == branch_of[:, None, :], (branch_of == PREFIX)[:, None, :]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (same | prefix) & earlier
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
