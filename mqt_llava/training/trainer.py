"""
The trainer of elastic models: logits where there are labels, a learning rate per part, evaluation at several budgets.

Axes: B rows, S row length, I images, V vocabulary, T positions with a label, K evaluation budgets.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .arguments import MqtLlavaTrainingArguments
from .batches import IGNORED, shifted_labels, trim_to_budget
from .checkpoints import StagedCheckpoints
from .data import ByLengthAndModality
from .draws import Draw, check_budgets
from .elastic import ElasticTrainerMixin, core_of


class MqtLlavaTrainer(ElasticTrainerMixin, StagedCheckpoints):
    """
    `Trainer` for MQT-LLaVA. Beside what [`ElasticTrainerMixin`] does: logits and loss only where there are labels, a
    learning rate for each part, evaluation at several budgets, self-distillation, and checkpoints that are whole.

    Args:
        args ([`MqtLlavaTrainingArguments`]): carries `draw`, `eval_budgets` and the rest.
        draw ([`Draw`], *optional*): instead of the one that `args` name, such as a distribution of your own.
        kwargs: as for `Trainer`.

    Raises:
        ValueError: for options that exclude each other, or budgets that the model does not have.
    """

    args: MqtLlavaTrainingArguments
    optimizer: torch.optim.Optimizer

    def __init__(self, model, args: MqtLlavaTrainingArguments, *, draw: Draw | None = None, **kwargs):
        self.eval_budgets = check_budgets("eval_budgets", args.eval_budgets, core_of(model).config.max_visual_tokens)
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be 0: the Trainer would smooth against labels that are not shifted."
            )
        if self.eval_budgets and kwargs.get("compute_metrics") is not None:
            raise ValueError("`eval_budgets` and `compute_metrics` exclude each other. Set `eval_budgets` to none.")
        name_layers_that_are_there(core_of(model))
        super().__init__(model=model, args=args, draw=args.draw if draw is None else draw, **kwargs)
        if self.eval_budgets:
            self.compute_metrics = self._losses_at_budgets

    # ---- learning ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Groups by part and by decay, each part with a learning rate of its own if the arguments give one."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (self.args.learning_rate_of(name), self.args.weight_decay if name in decaying else 0.0)
                groups.setdefault(key, []).append(parameter)
        if not groups:
            raise ValueError("`trainable` leaves nothing to learn. Name at least one part.")
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        parameters = [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]
        self.optimizer = optimizer_class(parameters, **settings)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The same number as the plain way, with logits only where there are labels. With `return_outputs`, or a loss
        function of the user's own, the plain way itself.
        """
        if return_outputs or self.compute_loss_func is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs, targets, _ = forward_where_learned(model, inputs)
        loss = self._cross_entropy(outputs.logits, targets, num_items_in_batch)
        if self.args.self_distillation and model.training:
            loss = loss + self.args.self_distillation * self._distillation(model, outputs, num_items_in_batch)
        if inputs.get("pixel_values") is None and model.training:
            loss = loss + self._untouched_image_path()
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, num_items) -> torch.Tensor:
        """Sum over the labels here, divided by the labels of the whole optimizer step; 0 where there are none."""
        count = torch.as_tensor(len(targets) if num_items is None else num_items, device=logits.device)
        return F.cross_entropy(logits.float(), targets, reduction="sum") / count.clamp(min=1)

    def _distillation(self, model, student, num_items) -> torch.Tensor:
        """
        KL divergence of the drawn budget from the full one, which gets no gradient. The images are read once: their
        visual tokens at the full budget are at hand from the student's pass.
        """
        if student.image_hidden_states is None or self._budget >= self.max_visual_tokens:
            return student.logits.new_zeros((), dtype=torch.float32)
        images = visual_tokens(student.image_hidden_states.detach(), self.max_visual_tokens)
        with torch.no_grad():
            teacher, targets, _ = forward_where_learned(model, self._whole_batch, images)
        log_p, log_q = (logits.float().log_softmax(-1) for logits in (teacher.logits, student.logits))  # (T, V)
        count = torch.as_tensor(len(targets) if num_items is None else num_items, device=log_p.device)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / count.clamp(min=1)

    # ---- batches without images ----

    def _untouched_image_path(self) -> torch.Tensor:
        """
        0, with a zero gradient for each learning parameter on the images' path. A batch of text alone is then the same
        step in one process and in many: DDP waits for every parameter, and an optimizer tells zero from none. (Sharded
        training never gets here: its batches all have an image.)
        """
        core = core_of(self.model)
        parts = (core.model.query_transformer, core.model.vision_tower)
        learning = [p for part in parts for p in part.parameters() if p.requires_grad]
        return sum((p.float().sum() * 0 for p in learning), torch.zeros((), device=self.args.device))

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length or not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLengthAndModality(dataset.lengths(), batch, self.args.data_seed or self.args.seed)

    # ---- evaluation at several budgets ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        With `eval_budgets`: the mean loss, `(B, K)` sums of losses and `(B, 1)` numbers of labels. The tower and the
        query transformer run once; the budgets share their visual tokens.
        """
        if not self.eval_budgets or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(self.with_some_image(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = torch.stack(list(self._loss_sums(model, inputs)), dim=1)  # (B, K)
        counts = (shifted_labels(inputs["labels"]) != IGNORED).sum(-1, keepdim=True)  # (B, 1)
        return sums.sum() / (counts.sum().clamp(min=1) * sums.shape[1]), sums, counts

    def _loss_sums(self, model, inputs: dict[str, Any]) -> Iterator[torch.Tensor]:
        """`(B,)` sums of the losses of each row, budget by budget."""
        images = None
        for budget in self.eval_budgets:
            batch = trim_to_budget(inputs, budget, self.image_token_id, self.max_visual_tokens)
            outputs, targets, learned = forward_where_learned(model, batch, images)
            if outputs.image_hidden_states is not None and images is None:
                images = visual_tokens(outputs.image_hidden_states, self.max_visual_tokens)
            losses = F.cross_entropy(outputs.logits.float(), targets, reduction="none")  # (T,)
            yield losses.new_zeros(len(learned)).index_add(0, learned.nonzero()[:, 0], losses)

    def _losses_at_budgets(self, prediction) -> dict[str, float]:
        """Mean loss per label at each budget."""
        means = prediction.predictions.sum(0) / max(prediction.label_ids.sum(), 1)  # (K,)
        return {f"loss@{budget}": float(mean) for budget, mean in zip(self.eval_budgets, means)}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in `Trainer`; `eval_loss` is the mean over the budgets, each token counted once."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.eval_budgets:
            at_budgets = [output.metrics[f"{metric_key_prefix}_loss@{budget}"] for budget in self.eval_budgets]
            output.metrics[f"{metric_key_prefix}_loss"] = sum(at_budgets) / len(at_budgets)
        return output


def forward_where_learned(model: nn.Module, batch: dict[str, Any], images: dict | None = None):
    """
    The forward with logits only where there are labels.

    Args:
        batch (`dict`): with `labels` of shape `(B, S)`.
        images (`dict`, *optional*): see [`visual_tokens`]; instead of the pixels of the batch.

    Returns:
        The model's outputs with `(T, V)` logits, the `(T,)` tokens that they should predict, and the `(B, S)` mask of
        where they come from.
    """
    targets = shifted_labels(batch["labels"])
    learned = targets != IGNORED
    left_out = {"labels", "pixel_values"} if images is not None else {"labels"}
    inputs = {name: value for name, value in batch.items() if name not in left_out}
    if images is not None:
        inputs["mm_encoder_outputs"] = images
    return model(**inputs, logits_to_keep=learned, use_cache=False), targets[learned], learned


def name_layers_that_are_there(model: nn.Module) -> None:
    """
    Leaves out of `_no_split_modules`, by which sharding wraps layers, those that the model has none of. (CLIP's tower
    names a layer of CLIP's text side, and accelerate stops at a name that it does not find.)
    """
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = type(model._no_split_modules)(name for name in model._no_split_modules if name in present)


def visual_tokens(hidden_states: torch.Tensor, max_visual_tokens: int) -> dict[str, BaseModelOutputWithPooling]:
    """`(I * M, D)` visual tokens as the model takes them in place of pixels."""
    return {"image": BaseModelOutputWithPooling(pooler_output=list(hidden_states.split(max_visual_tokens)))}
