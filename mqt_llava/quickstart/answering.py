"""Questions about pictures as examples for the collator, and the draw of the number of visual tokens per step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from ..training.arguments import MqtLlavaTrainingArguments
from ..training.branches import Branch, BranchCollator, Example, one_answer
from ..training.draws import Draw, parse_draw
from ..training.trainer import MqtLlavaTrainer
from .corpus import QUESTIONS_PER_VISIT, Split, normalise
from .model import MAX_VISUAL_TOKENS
from .questions import Question
from .training import Stage, Visits, run_stage, stage_arguments
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

    def forward(self, pixel_values: torch.Tensor | None = None, **inputs):
        """What the model returns for the pictures themselves (or for images that are encoded already)."""
        if pixel_values is not None:
            visual_tokens = self.model.model.query_transformer(pixel_values)  # (B, M, D)
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(visual_tokens))}
        return self.model(**inputs)


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
        return Example(patches[scene], tokens.prefix, chosen)

    return Visits(make, len(split), stage.steps * stage.batch_size, seed)


@dataclass(frozen=True)
class AllAtFirst(Draw):
    """All visual tokens for the first `steps`, then what the draw says."""

    steps: int

    def __call__(self, seed: int, step: int) -> tuple[int, ...]:
        """The budgets of optimizer step `step`."""
        return (self.max_visual_tokens,) if step < self.steps else super().__call__(seed, step)


def elastic_draw(steps: int, name: str = "uniform") -> Draw:
    """A draw by its name, after a part of the `steps` at all visual tokens. The authors' second stage is `uniform`."""
    draw = parse_draw(name, MAX_VISUAL_TOKENS)
    return AllAtFirst(draw.name, draw.max_visual_tokens, draw.sample, steps=math.ceil(FULL_LENGTH_SHARE * steps))


def fixed_draw(num_visual_tokens: int) -> Draw:
    """The same number at every step: an ordinary model, to compare with."""
    return parse_draw(f"fixed({num_visual_tokens})", MAX_VISUAL_TOKENS)


def teach_to_answer(
    model: MqtLlavaForConditionalGeneration,
    stage: Stage,
    visits: Visits,
    draw: Draw,
    folder: Path,
    seed: int,
    on_step: Callable[[int], None],
    self_distillation: float = 0.0,
) -> None:
    """Trains query transformer and language model in place; the tower stays as it is."""
    model.model.vision_tower.requires_grad_(False)
    arguments = MqtLlavaTrainingArguments(**stage_arguments(stage, folder, seed), self_distillation=self_distillation)
    trainer = MqtLlavaTrainer(
        FromPatches(model),
        arguments,
        draw=draw,
        train_dataset=visits,
        data_collator=BranchCollator(IMAGE_TOKEN_ID, PAD_TOKEN_ID, MAX_VISUAL_TOKENS),
    )
    run_stage(trainer, on_step)
