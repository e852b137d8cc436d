"""
The stages of training: the tower is taught to see, then the model to answer. Each stage is one run of the Trainer.

A stage resumes exactly where it was interrupted: every random choice depends on the seed and the place of the example
alone, never on what was drawn before it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .randomness import stream


CHECKPOINTS = 4
"""How many a stage writes on its way."""


@dataclass(frozen=True)
class Stage:
    """How long and how fast a stage learns."""

    steps: int
    batch_size: int
    learning_rate: float


class ReportSteps(TrainerCallback):
    """Calls `on_step(number of steps done)` after every step, and once at the start for what an earlier run did."""

    def __init__(self, on_step: Callable[[int], None]):
        self.report = on_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.report(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step)


def run_stage(trainer: Trainer, on_step: Callable[[int], None]) -> None:
    """
    Trains in place, from the newest checkpoint in the trainer's folder if there is one.

    Args:
        trainer: with the [`stage_arguments`] and all it needs.
        on_step: told the number of steps done.
    """
    folder = trainer.args.output_dir
    trainer.add_callback(ReportSteps(on_step))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if os.path.isdir(folder) else None)


def stage_arguments(stage: Stage, folder: Path, seed: int) -> dict[str, Any]:
    """
    The `TrainingArguments` of a stage, by name: AdamW with warm-up and cosine; nothing logged, nothing reported, CPU
    only. A few checkpoints are written on the way, and the newest is kept. Examples are taken in their order, which
    does not depend on the Trainer's `seed`.
    """
    return {
        "output_dir": str(folder),
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
        "warmup_steps": max(1, stage.steps // 20),
        "adam_beta2": 0.98,
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "save_steps": max(1, -(-stage.steps // CHECKPOINTS)),
        "save_total_limit": 1,
        "seed": seed,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Visits(Dataset):
    """
    `length` visits to `size` things, in a new order each time round. Visit `i` is `make(thing, i, rng)`, whose random
    numbers depend on `seed` and `i` alone.
    """

    def __init__(self, make: Callable[[int, int, np.random.Generator], object], size: int, length: int, seed: int):
        self.make, self.size, self.length, self.seed = make, size, length, seed
        self.orders = [stream(seed, "order of visits", turn).permutation(size) for turn in range(length // size + 1)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        thing = int(self.orders[index // self.size][index % self.size])
        return self.make(thing, index, stream(self.seed, "visit", index))
