"""
One number of visual tokens per optimizer step, for any trainer: drawn, the batch cut to it, the loss logged by it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from .batches import IGNORED, shifted_labels, trim_to_budget, with_blank_image, without_image_labels
from .draws import Draw, budget_bucket, budget_buckets, parse_draw


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


def core_of(model: nn.Module) -> MqtLlavaForConditionalGeneration:
    """
    The model itself, without adapters or wrappers around it.

    Raises:
        ValueError: if there is no MQT-LLaVA inside.
    """
    for module in model.modules():
        if isinstance(module, MqtLlavaForConditionalGeneration):
            return module
    raise ValueError(
        f"`model` must be a MqtLlavaForConditionalGeneration, or a wrapper of one, got {type(model).__name__}."
    )


@dataclass
class Meter:
    """What a rank has seen since the last log: loss and labels by octave of m, tokens, time from the first step on."""

    buckets: list[str]
    device: torch.device
    started: float | None = None

    def __post_init__(self):
        self.losses = torch.zeros(len(self.buckets), dtype=torch.float32, device=self.device)
        self.labels = torch.zeros_like(self.losses)
        self.tokens = torch.zeros((), device=self.device)
        self.budgets: list[int] = []

    def add(self, budget: int, loss_sum: torch.Tensor, batch: dict[str, Any]) -> None:
        """A pass over a batch at one budget. `loss_sum` is the sum over its labels."""
        bucket = self.buckets.index(budget_bucket(budget))
        self.losses[bucket] += loss_sum
        self.labels[bucket] += (shifted_labels(batch["labels"]) != IGNORED).sum()
        mask = batch.get("attention_mask")
        self.tokens += batch["input_ids"].numel() if mask is None or mask.ndim != 2 else mask.sum()
        self.budgets.append(budget)

    def read(self, reduce) -> dict[str, float]:
        """The numbers to log, over all ranks."""
        totals = reduce(torch.cat([self.losses, self.labels, self.tokens[None]]))
        losses, labels, tokens = totals.split([len(self.buckets), len(self.buckets), 1])
        seen = {
            f"loss_m_{name}": (loss / count).item()
            for name, loss, count in zip(self.buckets, losses, labels)
            if count > 0
        }
        return {
            "num_visual_tokens": sum(self.budgets) / max(len(self.budgets), 1),
            "tokens_per_second": tokens.item() / (time.perf_counter() - (self.started or 0.0)),
            **seen,
        }


class ElasticTrainerMixin(_Trainer):  # type: ignore[misc, valid-type]
    """
    One number of visual tokens per optimizer step, for any `Trainer` whose collator gives `input_ids` and `labels`:

    ```python
    class ElasticSFTTrainer(ElasticTrainerMixin, SFTTrainer): ...

    trainer = ElasticSFTTrainer(model, args=SFTConfig(...), train_dataset=dataset, draw="uniform")
    ```

    The batch is cut before anything else sees it, so metric code of the trainer finds ids, labels and logits of one
    length. A draw of several budgets makes as many passes over the batch, and the mean of their losses is learned.
    Evaluation sees batches as the collator makes them.

    Args:
        draw (`str` or [`Draw`]): see [`parse_draw`].
    """

    def __init__(self, *args, draw: str | Draw = "uniform", **kwargs):
        super().__init__(*args, **kwargs)
        core = core_of(self.model)
        self.image_token_id, self.max_visual_tokens = core.config.image_token_id, core.config.max_visual_tokens
        self.draw = parse_draw(draw, self.max_visual_tokens)
        self._new_meter()
        if not any(parameter.requires_grad for parameter in core.model.vision_tower.parameters()):
            run_without_autograd(core.model.vision_tower)

    def budgets_of_step(self, step: int) -> tuple[int, ...]:
        """What optimizer step `step` draws, counted from 0."""
        return self.draw(self.args.seed, step)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """The step at each drawn budget; returns the mean of their losses."""
        budgets = self.budgets_of_step(self.state.global_step)
        if num_items_in_batch is None and len(budgets) > 1:
            raise ValueError(f"`draw: {self.draw.name}` takes several passes a step, and needs batches with `labels`.")
        self.meter.started = self.meter.started or time.perf_counter()
        inputs = self.with_some_image(without_image_labels(inputs, self.image_token_id))
        self._whole_batch, total = inputs, None
        for passes, budget in enumerate(budgets, start=1):
            batch = trim_to_budget(inputs, budget, self.image_token_id, self.max_visual_tokens)
            self._budget = budget
            items = num_items_in_batch if len(budgets) == 1 else num_items_in_batch * len(budgets)
            with nullcontext() if passes == len(budgets) else self._more_to_come(model):
                loss = super().training_step(model, dict(batch), items)
            total = loss if total is None else total + loss
            if items is not None:
                world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                self.meter.add(budget, loss * items / world, batch)
        self._whole_batch = None
        return total

    @contextmanager
    def _more_to_come(self, model) -> Iterator[None]:
        """
        Around a pass that is not the last of its step: gradients add up. DDP sends them with the last pass, and
        DeepSpeed, whose backward takes the optimizer step when it is told that gradients are complete, waits for it.
        """
        complete = self.accelerator.sync_gradients
        self.accelerator.gradient_state._set_sync_gradients(False)
        try:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                yield
        finally:
            self.accelerator.gradient_state._set_sync_gradients(complete)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in the trainer below, on a batch that walks the images' path where that is needed."""
        return super().prediction_step(model, self.with_some_image(inputs), *args, **kwargs)

    def with_some_image(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """
        The batch; text alone gets a blank image if the model is sharded (FSDP, ZeRO-3). Forward passes then gather
        parameters layer by layer, and a rank that left the tower out would leave the others waiting.
        """
        if inputs.get("pixel_values") is not None or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return inputs
        vision = core_of(self.model).config.vision_config
        shape = (getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        return with_blank_image(inputs, self.image_token_id, shape)

    def _get_num_items_in_batch(self, batch_samples, device):
        samples = [without_image_labels(batch, self.image_token_id) for batch in batch_samples]
        return super()._get_num_items_in_batch(samples, device)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the number of visual tokens, tokens per second and the loss by octave of m."""
        if "loss" in logs and self.meter.budgets:
            logs.update(self.meter.read(lambda values: self.accelerator.reduce(values, "sum")))
            self._new_meter()
        super().log(logs, *args, **kwargs)

    def _new_meter(self) -> None:
        self.meter = Meter(budget_buckets(self.max_visual_tokens), self.args.device)


def run_without_autograd(tower: nn.Module) -> None:
    """
    A frozen tower runs in eval mode and records nothing, whatever its inputs. (`enable_input_require_grads`, which
    adapters with activation checkpointing call, makes its embeddings require gradients.)
    """
    before: list[bool] = []

    def enter(module, args):
        if module.training:
            module.eval()
        before.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def leave(module, args, output):
        torch.set_grad_enabled(before.pop())

    tower.register_forward_pre_hook(enter)
    tower.register_forward_hook(leave, always_call=True)
