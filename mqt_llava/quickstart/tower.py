"""
The tower is taught to see: a stand-in for the contrastive pre-training that a real CLIP tower brings along.

Linear heads on every patch name what its cell holds, from what the renderer knows. The heads are thrown away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .corpus import Split, normalise
from .model import PATCH_SIZE
from .scenes import BACKGROUNDS, CELL, COLOURS, IMAGE_SIZE, SHAPES, Scene
from .training import Stage, Visits, run_stage, stage_arguments


PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
CLASSES = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "digit": 1 + 10,
    "background": len(BACKGROUNDS),
    "place": PATCHES_PER_SIDE**2,
}
"""What a head names -> number of classes, "nothing" included."""
LOSS_WEIGHTS = {"place": 0.5}
"""1 for all others."""


def patch_labels(scene: Scene) -> np.ndarray:
    """`(5, 64)` integers: for every patch its class under each name of `CLASSES`, in that order."""
    in_cell = np.ones((CELL // PATCH_SIZE,) * 2, dtype=np.int64)
    grids = [np.kron(grid, in_cell).ravel() for grid in (scene.shapes, scene.colours, scene.digits)]
    return np.stack([*grids, np.full(grids[0].shape, scene.background), np.arange(grids[0].size)])


class TowerWithHeads(nn.Module):
    """A tower under linear heads, one per name in `CLASSES`."""

    def __init__(self, tower: PreTrainedModel):
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, number) for name, number in CLASSES.items()})

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`(B, 3, 64, 64)` pictures and `(B, 5, 64)` patch labels to the `loss` and a bool `right`, `(B, 5, 64)`."""
        patches = self.tower(pixel_values).last_hidden_state[:, 1:]  # (B, 64, C), the CLS token dropped
        loss, right = torch.zeros(()), []
        for index, (name, head) in enumerate(self.heads.items()):
            logits = head(patches).transpose(1, 2)  # (B, classes, 64)
            loss = loss + LOSS_WEIGHTS.get(name, 1.0) * F.cross_entropy(logits, labels[:, index])
            right.append(logits.argmax(1) == labels[:, index])
        return {"loss": loss, "right": torch.stack(right, dim=1)}


@dataclass(frozen=True)
class LabelledPicture:
    pixel_values: torch.Tensor
    labels: torch.Tensor


def labelled_picture(split: Split, index: int) -> LabelledPicture:
    """Picture `index` of the split and its patch labels."""
    return LabelledPicture(normalise(split.pictures[index]), torch.from_numpy(patch_labels(split.scenes[index])))


def stack_pictures(examples: Sequence[LabelledPicture]) -> dict[str, torch.Tensor]:
    """A batch for `TowerWithHeads`."""
    return {
        "pixel_values": torch.stack([example.pixel_values for example in examples]),
        "labels": torch.stack([example.labels for example in examples]),
    }


def teach_to_see(
    tower: PreTrainedModel, stage: Stage, train: Split, folder: Path, seed: int, on_step: Callable[[int], None]
) -> TowerWithHeads:
    """Trains `tower` in place, and returns it under its heads."""
    model = TowerWithHeads(tower)
    visits = Visits(
        lambda index, visit, rng: labelled_picture(train, index), len(train), stage.steps * stage.batch_size, seed
    )
    arguments = TrainingArguments(**stage_arguments(stage, folder, seed))
    run_stage(Trainer(model, arguments, train_dataset=visits, data_collator=stack_pictures), on_step)
    return model


@torch.no_grad()
def seen_correctly(model: TowerWithHeads, split: Split) -> dict[str, float]:
    """Name -> share of patches of the split that its head names right."""
    model.eval()
    batch = stack_pictures([labelled_picture(split, index) for index in range(len(split))])
    return dict(zip(CLASSES, model(**batch)["right"].float().mean(dim=(0, 2)).tolist()))
