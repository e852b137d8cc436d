"""Questions about pictures as examples for the collator, and the draw of the number of visual tokens per step."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from ..training.collator import Branch, BranchCollator, Example, one_answer
from .corpus import QUESTIONS_PER_VISIT, Split, normalise
from .model import MAX_VISUAL_TOKENS
from .questions import Question
from .randomness import stream
from .training import Stage, Visits, run_stage
from .vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, IMAGE_TOKEN_ID, PAD_TOKEN_ID


PICTURES_AT_ONCE = 100
"""Pictures that the tower reads in one go, when it reads them for good."""

FULL_LENGTH_SHARE = 0.25
"""Share of the steps, from the first on, that see all visual tokens: looking is learned before coping with less."""


class Tokens:
    """Questions as token ids. Each wording is tokenized once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids_of: dict[str, list[int]] = {}
        self.prefix = [BOS_TOKEN_ID, IMAGE_TOKEN_ID]

    def ids(self, text: str) -> list[int]:
        """Ids of `text` alone, no special tokens added."""
        if text not in self.ids_of:
            self.ids_of[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.ids_of[text]

    def branch(self, question: Question) -> Branch:
        """The question, its answer and the end token."""
        return one_answer(self.ids(question.text), [*self.ids(question.answer), EOS_TOKEN_ID])


def examples_of(split: Split, tokens: Tokens) -> list[Example]:
    """Every scene of the split with all its questions, in order."""
    return [
        Example(
            pixel_values=normalise(picture),
            prefix=tokens.prefix,
            branches=[tokens.branch(question) for questions in by_kind.values() for question in questions],
        )
        for picture, by_kind in zip(split.pictures, split.questions)
    ]


@torch.no_grad()
def patches_of(model: MqtLlavaForConditionalGeneration, split: Split) -> torch.Tensor:
    """`(number of scenes, N, C)`: what the tower says about every picture. It is frozen, so once is enough."""
    model.eval()
    starts = range(0, len(split), PICTURES_AT_ONCE)
    pictures = (split.pictures[start : start + PICTURES_AT_ONCE] for start in starts)
    return torch.cat([model.model.patch_features(torch.stack([normalise(one) for one in some])) for some in pictures])


class FromPatches(nn.Module):
    """The model from its tower's output on: `pixel_values` are the `(B, N, C)` patches of [`patches_of`]."""

    def __init__(self, model: MqtLlavaForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, **inputs):
        """What the model returns for the pictures themselves."""
        visual_tokens = self.model.model.query_transformer(pixel_values)  # (B, M, D)
        images = BaseModelOutputWithPooling(pooler_output=list(visual_tokens))
        return self.model(mm_encoder_outputs={"image": images}, **inputs)


def training_visits(split: Split, patches: torch.Tensor, tokens: Tokens, stage: Stage, seed: int) -> Visits:
    """
    Scenes in a new order each time round, and each time another choice from the questions ready for them. Their
    pictures are given as `patches`, see [`patches_of`].
    """
    pools = [
        {kind: [tokens.branch(question) for question in questions] for kind, questions in by_kind.items()}
        for by_kind in split.questions
    ]

    def make(scene: int, visit: int, rng: np.random.Generator) -> Example:
        chosen = [
            pools[scene][kind][index]
            for kind, number in QUESTIONS_PER_VISIT.items()
            for index in rng.permutation(len(pools[scene][kind]))[:number]
        ]
        return Example(patches[scene], tokens.prefix, chosen, position=visit // stage.batch_size)

    return Visits(make, len(split), stage.steps * stage.batch_size, seed)


def elastic_draw(steps: int, seed: int) -> Callable[[Sequence[Example]], int]:
    """All visual tokens at first, then 2, 4, ..., M with equal chance, as the original second stage draws them."""

    def draw(examples: Sequence[Example]) -> int:
        step = examples[0].position
        if step < FULL_LENGTH_SHARE * steps:
            return MAX_VISUAL_TOKENS
        return 2 * int(stream(seed, "number of visual tokens", step).integers(1, MAX_VISUAL_TOKENS // 2 + 1))

    return draw


def fixed_draw(num_visual_tokens: int) -> Callable[[Sequence[Example]], int]:
    """The same number at every step: an ordinary model, to compare with."""
    return lambda examples: num_visual_tokens


def teach_to_answer(
    model: MqtLlavaForConditionalGeneration,
    stage: Stage,
    visits: Visits,
    draw: Callable[[Sequence[Example]], int],
    folder: Path,
    seed: int,
    on_step: Callable[[int], None],
) -> None:
    """Trains query transformer and language model in place; the tower stays as it is."""
    model.model.vision_tower.requires_grad_(False)
    collator = BranchCollator(IMAGE_TOKEN_ID, PAD_TOKEN_ID, draw)
    run_stage(stage, FromPatches(model), visits, collator, folder, seed, on_step)
