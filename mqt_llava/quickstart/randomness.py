"""One source of random numbers for each purpose and place, so that no choice depends on what was drawn before it."""

import numpy as np


PURPOSES = ("corpus", "order of visits", "visit")


def stream(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """The random numbers of one `purpose` of `PURPOSES` in the run of one seed, at one split, turn, visit or step."""
    return np.random.default_rng([seed, PURPOSES.index(purpose), number])
