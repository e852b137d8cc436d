"""How a run learns: `TrainingArguments` with what an elastic model adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


PARTS = ("query_transformer", "vision_tower", "language_model")
"""Parts with a learning rate of their own. The head counts as part of the language model."""


@dataclass
class MqtLlavaTrainingArguments(TrainingArguments):
    """
    Args:
        draw (`str`): numbers of visual tokens of a step; see [`parse_draw`]. The authors' second stage is `uniform`.
        eval_budgets (`list[int]`): evaluation gives `eval_loss@m` for each.
        self_distillation (`float`): weight of the KL divergence from the full budget's answers; 0 is off.
        query_transformer_learning_rate, language_model_learning_rate, vision_tower_learning_rate (`float`):
            instead of `learning_rate` for one part.
        group_by_modality_length (`bool`): batches of one kind and about one length, as in the authors' second stage.
    """

    draw: str = "uniform"
    eval_budgets: list[int] | None = None
    self_distillation: float = 0.0
    query_transformer_learning_rate: float | None = None
    language_model_learning_rate: float | None = None
    vision_tower_learning_rate: float | None = None
    group_by_modality_length: bool = False
    # Pixels have no column of their own in a data set, and no budget leaves a parameter or a buffer out.
    remove_unused_columns: bool = field(default=False)
    ddp_broadcast_buffers: bool | None = field(default=False)

    def __post_init__(self):
        if "loss@" in (self.metric_for_best_model or "") and self.greater_is_better is None:
            self.greater_is_better = False
        super().__post_init__()
        if self.self_distillation < 0:
            raise ValueError(f"`self_distillation` must be 0 (off) or a positive weight, got {self.self_distillation}.")
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        if self.accelerator_config.dispatch_batches is None:  # batches of a stream have no common shape to be cut along
            self.accelerator_config.dispatch_batches = False

    def learning_rate_of(self, parameter_name: str) -> float:
        """The learning rate of a parameter, by the part that it is in."""
        for part in PARTS:
            rate = getattr(self, f"{part}_learning_rate")
            if rate is not None and (part in parameter_name or (part == PARTS[2] and "lm_head" in parameter_name)):
                return rate
        return self.learning_rate
