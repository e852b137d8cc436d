"""What guessing is worth: the two scores that a model which looks at the picture has to beat."""

from collections import Counter
from collections.abc import Callable

from .questions import KINDS, Question


def majority_accuracy(train: list[Question], test: list[Question]) -> dict[str, float]:
    """Kind -> accuracy of always giving the answer that is most common for that kind in training."""
    return table_accuracy(train, test, lambda question: question.kind)


def blind_accuracy(train: list[Question], test: list[Question]) -> dict[str, float]:
    """
    Kind -> accuracy of always giving the answer that is most common for those very words in training.

    Whoever reads only the question can do no better: the words are all there is, and this is the best answer to them.
    """
    return table_accuracy(train, test, lambda question: question.text)


def table_accuracy(train: list[Question], test: list[Question], key: Callable[[Question], str]) -> dict[str, float]:
    """Kind -> accuracy on `test` of the answer that `train` gives most often to questions with the same `key`."""
    answers: dict[str, Counter[str]] = {}
    for question in train:
        answers.setdefault(key(question), Counter())[question.answer] += 1
    guess = {asked: counter.most_common(1)[0][0] for asked, counter in answers.items()}
    right = {kind: [guess.get(key(q)) == q.answer for q in test if q.kind == kind] for kind in KINDS}
    return {kind: sum(hits) / max(len(hits), 1) for kind, hits in right.items()}
