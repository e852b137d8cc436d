"""A few pictures, a question about each, and what the model really says with few and with many visual tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from ..processing_mqt_llava import MqtLlavaProcessor
from .corpus import Split
from .questions import Question


SAMPLE_BUDGETS = (2, 4, 8, 16)
SAMPLE_KINDS = ("read", "locate", "dominant", "digit", "exists", "count")
"""Scene i of the split is asked a question of the i-th kind. Nothing is picked by hand."""


@dataclass(frozen=True)
class Sample:
    picture: np.ndarray
    question: Question
    answers: dict[int, str]
    """Number of visual tokens -> what the model said."""


def collect_samples(
    model: MqtLlavaForConditionalGeneration, processor: MqtLlavaProcessor, split: Split
) -> list[Sample]:
    """One sample per kind in `SAMPLE_KINDS`, from the first scenes of the split."""
    model.eval()
    samples = []
    for kind, picture, by_kind in zip(SAMPLE_KINDS, split.pictures, split.questions):
        question = by_kind[kind][0]
        answers = {budget: answer(model, processor, picture, question.text, budget) for budget in SAMPLE_BUDGETS}
        samples.append(Sample(picture, question, answers))
    return samples


@torch.no_grad()
def answer(
    model: MqtLlavaForConditionalGeneration,
    processor: MqtLlavaProcessor,
    picture: np.ndarray,
    question: str,
    num_visual_tokens: int,
) -> str:
    """What the model generates, greedily."""
    inputs = processor(images=Image.fromarray(picture), text=f"<image> {question}", return_tensors="pt")
    output = model.generate(**inputs, num_visual_tokens=num_visual_tokens, max_new_tokens=6, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
