"""
Which numbers of visual tokens a training step reads its images with: a name and its arguments, drawn from (seed, step).

A draw depends on nothing else, so every rank and every accumulation micro-batch of a step agrees, and a resumed run
draws what the interrupted one would have drawn.
"""

import difflib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..configuration_mqt_llava import check_num_visual_tokens


@dataclass(frozen=True)
class Draw:
    """A distribution over budgets. More than one budget in a step means that the mean of their losses is learned."""

    name: str
    max_visual_tokens: int
    sample: Callable[[random.Random], tuple[int, ...]]

    def __call__(self, seed: int, step: int) -> tuple[int, ...]:
        """The budgets of optimizer step `step` of a run with this seed."""
        return self.sample(random.Random(f"{seed}:{step}"))

    def from_torch(self) -> tuple[int, ...]:
        """Budgets from torch's global generator, which a DataLoader seeds anew in each worker."""
        return self.sample(random.Random(int(torch.randint(2**62, ()))))


def fixed(maximum: int, m: int) -> Callable:
    """Always `m`."""
    (m,) = check_num_visual_tokens(m, 1, maximum)
    return lambda generator: (m,)


def uniform(maximum: int) -> Callable:
    """2, 4, ..., M with equal chance, as the authors' second stage draws them (`builder.py`). Odd m are never seen."""
    return lambda generator: (generator.randrange(2, maximum + 1, 2),) if maximum > 1 else (1,)


def uniform_all(maximum: int) -> Callable:
    """1, 2, ..., M with equal chance."""
    return lambda generator: (generator.randint(1, maximum),)


def log_uniform(maximum: int) -> Callable:
    """The logarithm is uniform: every doubling of m is about as likely as the next."""
    return lambda generator: (min(maximum, int(math.exp(generator.uniform(0, math.log(maximum + 1))))),)


def all_of(maximum: int, *budgets: int) -> Callable:
    """Every budget of the list in every step (M3, arXiv 2405.17430, averages the loss over its five)."""
    if not budgets:
        raise ValueError("`all_of` needs at least one number of visual tokens, got none. Write `all_of(1, 9, 36)`.")
    chosen = tuple(check_num_visual_tokens(list(budgets), len(budgets), maximum))
    return lambda generator: chosen


def sandwich(maximum: int) -> Callable:
    """The smallest, the largest and one in between in every step (the rule of slimmable networks, arXiv 1903.05134)."""
    return lambda generator: (1, generator.randint(1, maximum), maximum)


DRAWS: dict[str, Callable[..., Callable]] = {
    draw.__name__: draw for draw in (fixed, uniform, uniform_all, log_uniform, all_of, sandwich)
}
NUMBER_OF_ARGUMENTS = {"fixed": "one number", "all_of": "one number or more"}


def parse_draw(spec: str | Draw, max_visual_tokens: int) -> Draw:
    """
    A draw from its name in a recipe: `uniform`, `fixed(64)`, `all_of(1, 9, 36)`.

    Raises:
        ValueError: for an unknown name (the nearest is suggested), or arguments that the draw does not take.
    """
    if isinstance(spec, Draw):
        return spec
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([\d\s,]*)\))?\s*", str(spec))
    name = match[1] if match else str(spec)
    if name not in DRAWS or match is None:
        near = difflib.get_close_matches(name, DRAWS, 1, cutoff=0.4)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"`draw` must be one of {', '.join(DRAWS)}, with numbers in brackets, got {spec!r}.{hint}")
    arguments = [int(number) for number in re.findall(r"\d+", match[2] or "")]
    if (len(arguments) != 1 and name == "fixed") or (arguments and name not in NUMBER_OF_ARGUMENTS):
        takes = NUMBER_OF_ARGUMENTS.get(name, "no numbers")
        raise ValueError(f"`draw: {name}` takes {takes}, got {arguments}.")
    return Draw(name, max_visual_tokens, DRAWS[name](max_visual_tokens, *arguments))


def budget_bucket(m: int) -> str:
    """The octave of m, by which losses are logged together: `1`, `2`, `3-4`, `5-8`, `9-16`, ..."""
    high = 1 << max(m - 1, 0).bit_length()
    low = high // 2 + 1
    return str(high) if low >= high else f"{low}-{high}"


def budget_buckets(maximum: int) -> list[str]:
    """All buckets up to M, in order."""
    return list(dict.fromkeys(budget_bucket(m) for m in range(1, maximum + 1)))


def check_budgets(name: str, budgets: Sequence[int] | None, maximum: int) -> list[int]:
    """
    Budgets of an option such as `eval_budgets`: none, or different numbers between 1 and M.

    Raises:
        ValueError: for a number out of range, or one that is there twice.
    """
    if not budgets:
        return []
    counts = check_num_visual_tokens(list(budgets), len(budgets), maximum)
    if len(set(counts)) != len(counts):
        raise ValueError(f"`{name}` must name each number of visual tokens once, got {list(budgets)}.")
    return counts
