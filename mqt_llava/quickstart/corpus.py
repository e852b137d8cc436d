"""Scenes, pictures and balanced questions: three splits that share no scene."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .questions import BalancedAsker, Question
from .randomness import stream
from .scenes import Scene, draw_scene, render


SPLIT_SIZES = {"train": 8000, "validation": 500, "test": 1000}

QUESTIONS_PER_VISIT = {
    "background": 1,
    "dominant": 1,
    "exists": 2,
    "count": 2,
    "locate": 3,
    "digit": 2,
    "read": 1,
}
"""Kind -> questions asked about a scene each time it is seen."""

POOL_FACTOR = 2
"""A training scene has this many times as many questions ready as one visit asks (fewer where it allows fewer)."""


@dataclass
class Split:
    """Scenes with their pictures and questions, in one order."""

    scenes: list[Scene]
    pictures: np.ndarray
    """`(number of scenes, 64, 64, 3)` uint8."""
    questions: list[dict[str, list[Question]]]
    """For each scene: kind -> its questions."""

    def __len__(self) -> int:
        return len(self.scenes)

    def all_questions(self) -> list[Question]:
        """Every question of every scene."""
        return [question for by_kind in self.questions for asked in by_kind.values() for question in asked]


def build_corpus(seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, Split]:
    """
    The splits `train`, `validation` and `test` of one seed. The same seed gives the same corpus.

    Args:
        seed (`int`): any non-negative number.
        sizes (`Mapping[str, int]`, *optional*, defaults to `SPLIT_SIZES`): scenes in each split.
    """
    seen: set[bytes] = set()
    return {
        name: build_split(stream(seed, "corpus", index), size, seen, POOL_FACTOR if name == "train" else 1)
        for index, (name, size) in enumerate((sizes or SPLIT_SIZES).items())
    }


def build_split(rng: np.random.Generator, size: int, seen: set[bytes], pool_factor: int) -> Split:
    """`size` scenes that are not in `seen` yet; they are added to it."""
    scenes: list[Scene] = []
    while len(scenes) < size:
        scene = draw_scene(rng)
        if scene.key not in seen:
            seen.add(scene.key)
            scenes.append(scene)
    asker = BalancedAsker(rng)
    return Split(
        scenes=scenes,
        pictures=np.stack([render(scene, rng) for scene in scenes]),
        questions=[
            {kind: asker.ask(scene, kind, pool_factor * number) for kind, number in QUESTIONS_PER_VISIT.items()}
            for scene in scenes
        ],
    )


def normalise(pictures: np.ndarray) -> torch.Tensor:
    """`(..., 64, 64, 3)` uint8 to `(..., 3, 64, 64)` between -1 and 1: what the image processor makes of a picture."""
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pictures, -1, -3))).float()
    return pixels / 127.5 - 1
