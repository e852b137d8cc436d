"""How often the model is right, by kind of question and number of visual tokens."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from ..training.batches import IGNORED
from ..training.branches import BranchCollator, Example
from .answering import Tokens, examples_of
from .corpus import Split
from .questions import KINDS
from .vocabulary import IMAGE_TOKEN_ID, PAD_TOKEN_ID


ROWS_PER_BATCH = 50
MEAN = "mean"
"""Name of the plain mean over kinds among the accuracies."""

Accuracy = dict[str, dict[str, float]]
"""Kind, or `MEAN` -> number of visual tokens, as text -> share of questions answered exactly right."""


@torch.no_grad()
def measure_accuracy(
    model: MqtLlavaForConditionalGeneration,
    split: Split,
    tokens: Tokens,
    budgets: Sequence[int],
    on_scenes: Callable[[int], None] = lambda done: None,
) -> Accuracy:
    """
    Exact match at each budget: every token of the answer, and the end after it, is the model's first choice.

    One pass with the right answers as input decides this without generating: greedy decoding gives the right answer
    exactly when, at every token, the right one is the first choice given those before it. The tower runs once per
    image.
    """
    model.eval()
    kinds = [[kind for kind, asked in by_kind.items() for _ in asked] for by_kind in split.questions]
    hits: dict[int, list[list[bool]]] = {budget: [] for budget in budgets}
    for examples in batches(examples_of(split, tokens)):
        pixels = torch.stack([example.pixel_values for example in examples])
        features = model.get_image_features(pixels, return_dict=True).pooler_output  # type: ignore[union-attr]
        for budget in budgets:
            hits[budget] += right_answers(model, examples, features, budget)
        on_scenes(len(hits[budgets[0]]))
    return {
        **{kind: {str(m): share_right(hits[m], kinds, kind) for m in budgets} for kind in KINDS},
        MEAN: {str(m): sum(share_right(hits[m], kinds, kind) for kind in KINDS) / len(KINDS) for m in budgets},
    }


def batches(examples: list[Example]) -> Iterator[list[Example]]:
    for start in range(0, len(examples), ROWS_PER_BATCH):
        yield examples[start : start + ROWS_PER_BATCH]


def right_answers(
    model: MqtLlavaForConditionalGeneration, examples: list[Example], features: list[torch.Tensor], budget: int
) -> list[list[bool]]:
    """For each example, for each of its branches: whether the whole answer is right at this budget."""
    batch = BranchCollator(IMAGE_TOKEN_ID, PAD_TOKEN_ID, budget)(examples)
    labels = batch.pop("labels")[:, 1:]
    del batch["pixel_values"]
    visual = BaseModelOutputWithPooling(pooler_output=[image[:budget] for image in features])
    guesses = model(**batch, mm_encoder_outputs={"image": visual}, use_cache=False).logits[:, :-1].argmax(-1)
    wrong = (guesses != labels) & (labels != IGNORED)  # (B, S - 1)

    verdicts = []
    for row, example in enumerate(examples):
        ends = torch.tensor([len(branch.input_ids) for branch in example.branches])
        ends = len(example.prefix) - 1 + budget + ends.cumsum(0) - 1  # place of each branch's last label
        errors = wrong[row].cumsum(0)[ends - 1]
        verdicts.append((errors.diff(prepend=torch.zeros(1, dtype=errors.dtype)) == 0).tolist())
    return verdicts


def share_right(hits: list[list[bool]], kinds: list[list[str]], kind: str) -> float:
    """Share of `hits` among the questions of one kind. `kinds` names the kind of each."""
    of_kind = [hit for row, names in zip(hits, kinds) for hit, name in zip(row, names) if name == kind]
    return sum(of_kind) / max(len(of_kind), 1)
