"""Other people's trainers: Transformers' own, and TRL's."""

import datasets
import pytest
from training_helpers import M, conversations, logged, picture, tiny_model, tiny_processor
from transformers import Trainer, TrainingArguments

from mqt_llava.training.conversations import ConversationCollator
from mqt_llava.training.draws import parse_draw
from mqt_llava.training.elastic import ElasticTrainerMixin


SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def test_plain_trainer_trains_with_a_collator_that_draws(tmp_path):
    processor = tiny_processor()
    trainer = Trainer(
        tiny_model(),
        TrainingArguments(str(tmp_path), remove_unused_columns=False, dataloader_num_workers=2, **SETTINGS),
        train_dataset=conversations(),
        data_collator=ConversationCollator(processor, draw=parse_draw("uniform", M)),
        processing_class=processor,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture
def rows():
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It is red."}]
    return datasets.Dataset.from_list([{"messages": turns, "images": [picture(i)]} for i in range(8)])


@pytest.mark.parametrize("draw", ["uniform", "sandwich"])
@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_sft_trainer_trains_at_drawn_budgets(tmp_path, rows, draw, assistant_only_loss):
    trl = pytest.importorskip("trl")

    class ElasticSFTTrainer(ElasticTrainerMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(
        str(tmp_path),
        assistant_only_loss=assistant_only_loss,
        max_length=None,
        bf16=False,
        activation_checkpointing=False,
        **SETTINGS,
    )
    trainer = ElasticSFTTrainer(
        tiny_model(), args=args, train_dataset=rows, processing_class=tiny_processor(), draw=draw
    )
    trainer.train()
    budgets = [trainer.budgets_of_step(step) for step in range(6)]
    assert logged(trainer, "num_visual_tokens") == pytest.approx([sum(drawn) / len(drawn) for drawn in budgets])
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0] - 0.5
    assert 0 <= logged(trainer, "mean_token_accuracy")[-1] <= 1


def test_sft_trainer_learns_no_placeholder(tmp_path, rows):
    """TRL's collator puts labels on placeholders; counted, they would make the loss another at every budget."""
    trl = pytest.importorskip("trl")

    class ElasticSFTTrainer(ElasticTrainerMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(str(tmp_path), max_length=None, bf16=False, activation_checkpointing=False, **SETTINGS)
    trainer = ElasticSFTTrainer(tiny_model(), args=args, train_dataset=rows, processing_class=tiny_processor())
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        bucket = next(value for key, value in entry.items() if key.startswith("loss_m"))
        assert entry["loss"] == pytest.approx(bucket, rel=1e-4)
