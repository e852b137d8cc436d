import copy

import pytest
import torch
from training_helpers import M, arguments, conversation, conversations, logged, tiny_model, tiny_processor, trainer
from transformers import Trainer

from mqt_llava.training.batches import trim_to_budget
from mqt_llava.training.conversations import ConversationCollator
from mqt_llava.training.draws import Draw
from mqt_llava.training.elastic import core_of
from mqt_llava.training.models import freeze_all_but
from mqt_llava.training.trainer import MqtLlavaTrainer


MIXED = [*conversations(5), *conversations(3, images=0)]
FULL = ("vision_tower", "query_transformer", "language_model")


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_step_learns_what_the_plain_path_learns_at_the_drawn_budgets(tmp_path):
    """Logits only where there are labels, a cut batch: against `Trainer` on batches that are cut beforehand."""
    ours = trainer(tmp_path, examples=MIXED, draw="uniform_all", optim="sgd", train_sampling_strategy="sequential")
    ours.train()
    model, step, collate = tiny_model(), 0, ConversationCollator(tiny_processor())

    def collate_as_drawn(examples):
        nonlocal step
        step += 1
        return trim_to_budget(collate(examples), ours.budgets_of_step(step - 1)[0], 4, M)

    plain = Trainer(
        model,
        arguments(tmp_path, optim="sgd", train_sampling_strategy="sequential"),
        train_dataset=MIXED,
        data_collator=collate_as_drawn,
    )
    plain.train()
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    torch.testing.assert_close(weights(ours.model), weights(model))


def test_every_micro_batch_of_a_step_reads_one_budget(tmp_path, monkeypatch):
    seen = []
    accumulating = trainer(tmp_path, gradient_accumulation_steps=3, max_steps=4, draw="uniform_all")
    monkeypatch.setattr(
        accumulating, "compute_loss", record_budget(accumulating.compute_loss, accumulating, seen), raising=True
    )
    accumulating.train()
    by_step = {}
    for step, budget in seen:
        by_step.setdefault(step, []).append(budget)
    assert [set(budgets) for budgets in by_step.values()] == [set(accumulating.budgets_of_step(i)) for i in range(4)]
    assert [len(budgets) for budgets in by_step.values()] == [3, 1, 3, 1]  # 4 batches an epoch


def record_budget(compute_loss, of, seen):
    def wrapped(model, inputs, *args, **kwargs):
        seen.append((of.state.global_step, int(inputs["visual_token_counts"][0])))
        return compute_loss(model, inputs, *args, **kwargs)

    return wrapped


def test_accumulation_gives_the_losses_of_the_large_batch(tmp_path):
    settings = {"optim": "sgd", "draw": "uniform_all", "train_sampling_strategy": "sequential", "max_steps": 2}
    whole = trainer(tmp_path, examples=MIXED, per_device_train_batch_size=4, **settings)
    parts = trainer(tmp_path, examples=MIXED, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    whole.train()
    parts.train()
    assert logged(whole, "loss") == pytest.approx(logged(parts, "loss"), rel=1e-5)
    torch.testing.assert_close(weights(whole.model), weights(parts.model))


def test_all_of_learns_the_mean_loss_over_its_list(tmp_path):
    settings = {"train_sampling_strategy": "sequential", "optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0}
    several = trainer(tmp_path, draw="all_of(1, 4, 16)", **settings)
    several.train()
    one_by_one = [trainer(tmp_path, draw=f"fixed({m})", **settings) for m in (1, 4, 16)]
    for other in one_by_one:
        other.train()
    means = [sum(losses) / 3 for losses in zip(*(logged(other, "loss") for other in one_by_one))]
    assert logged(several, "loss") == pytest.approx(means, rel=1e-5)
    for name, value in weights(several.model).items():
        mean = torch.stack([weights(other.model)[name].float() for other in one_by_one]).mean(0)
        torch.testing.assert_close(value.float(), mean, rtol=1e-4, atol=1e-6)


def test_gradients_are_complete_with_the_last_pass_of_a_step_alone(tmp_path, monkeypatch):
    """DeepSpeed takes its step inside the backward that comes with complete gradients."""
    ours = trainer(tmp_path, draw="sandwich", max_steps=2, gradient_accumulation_steps=2)
    complete, backward = [], ours.accelerator.backward
    monkeypatch.setattr(
        ours.accelerator, "backward", lambda loss: complete.append(ours.accelerator.sync_gradients) or backward(loss)
    )
    ours.train()
    assert complete == 2 * [*3 * [False], False, False, True]


def test_evaluation_at_each_budget_is_the_loss_of_prompts_at_that_budget(tmp_path):
    ours = trainer(tmp_path, eval_budgets=[1, 5, M], max_steps=1)
    ours.eval_dataset = MIXED
    metrics = ours.evaluate()
    collate, model = ConversationCollator(tiny_processor()), ours.model.eval()
    for budget in (1, 5, M):
        batch = trim_to_budget(collate(MIXED), budget, 4, M)
        with torch.no_grad():
            expected = model(**batch).loss.item()
        assert metrics[f"eval_loss@{budget}"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_loss@{m}"] for m in (1, 5, M)) / 3)


def test_prediction_without_labels_gives_logits(tmp_path):
    ours = trainer(tmp_path, eval_budgets=[1])
    batch = ConversationCollator(tiny_processor())(conversations(3))
    labels = batch.pop("labels")
    loss, logits, _ = ours.prediction_step(ours.model, batch, prediction_loss_only=False)
    assert loss is None
    assert logits[0].shape[:2] == labels.shape


def test_the_tower_runs_once_for_all_evaluation_budgets(tmp_path):
    ours = trainer(tmp_path, eval_budgets=[1, 2, 4, 8, M])
    calls = []
    core_of(ours.model).model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    ours.evaluate()
    assert len(calls) == 2  # batches of 3 and 2


def test_the_tower_does_not_run_for_text_alone(tmp_path):
    ours = trainer(tmp_path, examples=conversations(8, images=0))
    core_of(ours.model).model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    ours.train()


def test_logits_are_computed_where_there_are_labels_alone(tmp_path):
    ours = trainer(tmp_path, max_steps=1)
    rows = []
    core_of(ours.model).lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape))
    ours.train()
    assert len(rows[0]) == 2
    assert rows[0][0] < 30


def test_a_frozen_tower_records_nothing_even_behind_inputs_that_require_grad(tmp_path):
    model = tiny_model()
    freeze_all_but(model, ("query_transformer", "language_model"))
    model.enable_input_require_grads()
    ours = trainer(tmp_path, model=model, max_steps=1, activation_checkpointing=True)
    outputs = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: outputs.append((module, output)))
    ours.train()
    assert all(not module.training and not output.last_hidden_state.requires_grad for module, output in outputs)


@pytest.mark.parametrize("parts", [("query_transformer",), ("query_transformer", "language_model"), FULL])
def test_only_the_named_parts_move(tmp_path, parts):
    model = tiny_model()
    freeze_all_but(model, parts)
    before = weights(model)
    trainer(tmp_path, model=model, examples=conversations(8)).train()
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    groups = {part: any(f"{part}." in name for name in moved) for part in FULL}
    assert groups == {part: part in parts for part in FULL}
    assert ("lm_head.weight" in moved) == ("language_model" in parts)


def test_activation_checkpointing_changes_no_number(tmp_path):
    plain = trainer(tmp_path, draw="uniform_all")
    saved = trainer(tmp_path, draw="uniform_all", activation_checkpointing=True)
    plain.train()
    saved.train()
    assert logged(plain, "loss") == logged(saved, "loss")
    torch.testing.assert_close(weights(plain.model), weights(saved.model))


def test_each_part_learns_at_its_own_rate(tmp_path):
    ours = trainer(
        tmp_path,
        query_transformer_learning_rate=1e-3,
        vision_tower_learning_rate=1e-5,
        learning_rate=1e-4,
        weight_decay=0.1,
    )
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in ours.create_optimizer().param_groups for p in g["params"]}
    core = ours.model
    assert rate[id(core.model.query_transformer.query)][0] == 1e-3
    assert rate[id(next(core.model.vision_tower.parameters()))][0] == 1e-5
    assert rate[id(core.lm_head.weight)] == (1e-4, 0.1)
    assert rate[id(core.model.language_model.norm.weight)] == (1e-4, 0.0)


def test_a_recipe_that_freezes_everything_raises(tmp_path):
    model = tiny_model()
    freeze_all_but(model, ())
    with pytest.raises(ValueError, match="nothing to learn"):
        trainer(tmp_path, model=model).create_optimizer()


def test_self_distillation_is_zero_at_the_full_budget(tmp_path):
    plain, distilled = (trainer(tmp_path, draw=f"fixed({M})", self_distillation=x) for x in (0.0, 1.0))
    plain.train()
    distilled.train()
    assert logged(plain, "loss") == logged(distilled, "loss")


def test_self_distillation_adds_the_divergence_from_the_full_budget(tmp_path):
    settings = {"draw": "fixed(2)", "train_sampling_strategy": "sequential", "max_steps": 1}
    model = tiny_model()
    for parameter in model.parameters():  # large enough weights for the budgets to differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter.data, std=0.3)
    plain = trainer(tmp_path, model=copy.deepcopy(model), **settings)
    distilled = trainer(tmp_path, model=copy.deepcopy(model), self_distillation=0.5, **settings)
    plain.train()
    distilled.train()
    batch = ConversationCollator(tiny_processor())(conversations(2))
    cut = trim_to_budget(batch, 2, 4, M)
    with torch.no_grad():
        p, q = (model(**b).logits[:, :-1][b["labels"][:, 1:] != -100].log_softmax(-1) for b in (batch, cut))
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    assert divergence > 0.01
    assert logged(distilled, "loss")[0] == pytest.approx(logged(plain, "loss")[0] + 0.5 * divergence, rel=1e-4)


def test_the_log_tells_budget_speed_and_loss_by_octave(tmp_path):
    ours = trainer(tmp_path, draw="sandwich", max_steps=2)
    ours.train()
    entry = ours.state.log_history[0]
    assert entry["num_visual_tokens"] == pytest.approx(sum(ours.budgets_of_step(0)) / 3)
    assert entry["tokens_per_second"] > 0
    assert {"loss_m_1", "loss_m_9-16"} <= set(entry)


def test_resuming_gives_the_uninterrupted_run(tmp_path):
    whole = trainer(tmp_path / "whole", draw="uniform_all", max_steps=6)
    whole.train()
    first = trainer(tmp_path / "parts", draw="uniform_all", max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    again = trainer(tmp_path / "parts", draw="uniform_all", max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for key in ("loss", "num_visual_tokens"):
        assert logged(again, key) == logged(whole, key)
    assert all(torch.equal(value, weights(again.model)[name]) for name, value in weights(whole.model).items())


def test_several_images_in_a_conversation_train(tmp_path):
    ours = trainer(tmp_path, examples=[conversation(i, images=1 + i % 3) for i in range(8)])
    ours.train()
    assert all(loss == loss for loss in logged(ours, "loss"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"eval_budgets": [0]}, "between 1 and 16"),
        ({"draw": "nothing"}, "`draw` must be one of"),
    ],
)
def test_options_that_make_no_sense_raise(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_a_draw_of_ones_own_is_taken_instead_of_the_named_one(tmp_path):
    ours = MqtLlavaTrainer(
        tiny_model(),
        arguments(tmp_path, draw="uniform"),
        draw=Draw("mine", M, lambda generator: (3,)),
        train_dataset=conversations(),
        data_collator=ConversationCollator(tiny_processor()),
    )
    ours.train()
    assert logged(ours, "num_visual_tokens") == [3] * 4


def test_metrics_and_budgets_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics"):
        MqtLlavaTrainer(tiny_model(), arguments(tmp_path, eval_budgets=[1]), compute_metrics=lambda p: {})


def test_another_model_raises(tmp_path):
    with pytest.raises(ValueError, match="MqtLlavaForConditionalGeneration"):
        MqtLlavaTrainer(torch.nn.Linear(1, 1), arguments(tmp_path))
