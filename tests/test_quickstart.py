"""The quickstart: its corpus against the pixels, its packing against separate rows, and a small run end to end."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mqt_llava.evaluation.ask import ask
from mqt_llava.quickstart import Recipe, run, run_quickstart, training
from mqt_llava.quickstart.answering import FromPatches, Tokens, elastic_draw, examples_of, patches_of
from mqt_llava.quickstart.baselines import blind_accuracy, majority_accuracy
from mqt_llava.quickstart.corpus import QUESTIONS_PER_VISIT, build_corpus, normalise
from mqt_llava.quickstart.evaluation import MEAN, measure_accuracy, right_answers
from mqt_llava.quickstart.figures import spread
from mqt_llava.quickstart.model import build_model, build_processor
from mqt_llava.quickstart.questions import KINDS
from mqt_llava.quickstart.recipe import BUDGETS, FIXED_BUDGETS
from mqt_llava.quickstart.samples import answer
from mqt_llava.quickstart.scenes import BACKGROUNDS, CELL, COLOURS, DIGIT_ROWS, INK, PLATE, SHAPES
from mqt_llava.quickstart.training import Stage
from mqt_llava.quickstart.vocabulary import IMAGE_TOKEN_ID, WORDS, build_tokenizer
from mqt_llava.training.batches import IGNORED, trim_to_budget
from mqt_llava.training.branches import Branch, BranchCollator, Example


SMALL = Recipe(
    tower=Stage(steps=12, batch_size=8, learning_rate=3e-3),
    answers=Stage(steps=40, batch_size=8, learning_rate=3e-3),
    split_sizes={"train": 60, "validation": 10, "test": 20},
)
TINY = Recipe(
    tower=Stage(steps=4, batch_size=4, learning_rate=3e-3),
    answers=Stage(steps=8, batch_size=4, learning_rate=3e-3),
    split_sizes={"train": 20, "validation": 4, "test": 8},
)


@pytest.fixture(scope="module")
def corpus():
    return build_corpus(seed=0, sizes={"train": 600, "validation": 50, "test": 200})


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A finished run, long enough to have learned the colour of the background."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    lines: list[str] = []
    run_quickstart(folder, seed=0, recipe=SMALL, echo=lines.append)
    return folder, lines


@pytest.fixture(scope="module")
def trained(small_run):
    folder, _ = small_run
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


# --- The corpus ---


def test_the_same_seed_gives_the_same_corpus():
    one, other = (build_corpus(seed=3, sizes={"train": 20, "test": 5}) for _ in range(2))
    for name in one:
        assert np.array_equal(one[name].pictures, other[name].pictures)
        assert one[name].questions == other[name].questions


def test_another_seed_gives_another_corpus():
    one, other = (build_corpus(seed=seed, sizes={"test": 5})["test"] for seed in (0, 1))
    assert not np.array_equal(one.pictures, other.pictures)


def test_splits_share_no_scene(corpus):
    keys = [scene.key for split in corpus.values() for scene in split.scenes]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("kind", KINDS)
def test_guessing_from_the_question_is_worth_little_more_than_chance(kind, corpus):
    number_of_answers = {"background": 4, "dominant": 6, "exists": 2, "count": 5, "locate": 6, "digit": 10, "read": 50}
    train, test = corpus["train"].all_questions(), corpus["test"].all_questions()
    for accuracy in (majority_accuracy(train, test), blind_accuracy(train, test)):
        assert accuracy[kind] <= 1 / number_of_answers[kind] + 0.08


def test_blind_baseline_gives_the_commonest_answer_to_the_same_words(corpus):
    train, test = corpus["train"].all_questions(), corpus["test"].all_questions()
    right, asked = 0, [question for question in test if question.kind == "locate"]
    for question in asked:
        answers = Counter(other.answer for other in train if other.text == question.text)
        right += question.answer == answers.most_common(1)[0][0]
    assert blind_accuracy(train, test)["locate"] == right / len(asked)


def test_number_plate_is_in_every_row_about_equally_often(corpus):
    rows = Counter(scene.plate_row for scene in corpus["train"].scenes)
    assert min(rows.values()) > 0.18 * 600


def test_one_colour_is_strictly_the_most_common(corpus):
    for scene in corpus["test"].scenes:
        counts = np.sort(np.bincount(scene.colours.ravel(), minlength=7)[1:])
        assert counts[-1] > counts[-2]


def test_a_scene_is_asked_no_question_twice(corpus):
    for by_kind in corpus["train"].questions:
        for asked in by_kind.values():
            assert len({question.text for question in asked}) == len(asked)


def test_every_answer_follows_from_the_pixels(corpus):
    split = corpus["validation"]
    for picture, by_kind in zip(split.pictures, split.questions):
        cells = read_picture(picture)
        for asked in by_kind.values():
            for question in asked:
                assert answer_from(cells, question.text) == question.answer, question


def read_picture(picture):
    """Cell name -> what is in it: ("digit", d), ("nothing",) or (shape, colour). Knows the palette and the font."""
    names = [f"{column}{row}" for row in range(1, 5) for column in "abcd"]
    cells = [picture[r : r + CELL, c : c + CELL].astype(int) for r in range(0, 64, CELL) for c in range(0, 64, CELL)]
    seen = {name: read_cell(cell) for name, cell in zip(names, cells)}
    seen["background"] = nearest(BACKGROUNDS, next(cell[0, 0] for cell in cells if tuple(cell[0, 0]) != PLATE))
    return seen


def read_cell(cell):
    if tuple(cell[0, 0]) == PLATE or tuple(cell[-1, -1]) == PLATE:
        return ("digit", read_digit((cell == INK).all(-1)))
    # shapes stay off one corner at least, and no shape's colour is near the background's
    ground = Counter(map(tuple, cell[[0, 0, -1, -1], [0, -1, 0, -1]])).most_common(1)[0][0]
    mask = (cell != ground).any(-1)
    if not mask.any():
        return ("nothing",)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if box.all():
        shape = "square"
    elif box[-1].mean() > 0.75:
        shape = "triangle"
    else:
        shape = "circle" if box.mean() > 0.66 else "cross"
    return (shape, nearest(COLOURS, cell[mask].mean(0)))


def read_digit(ink):
    def overlap(digit):
        dots = np.array([[dot == "1" for dot in row] for row in DIGIT_ROWS[digit].split()])
        large = dots.repeat(2, 0).repeat(2, 1)
        return max((ink[y : y + 14, x : x + 10] == large).mean() for y in range(3) for x in range(7))

    return str(max(range(10), key=overlap))


def nearest(palette, colour):
    return min(palette, key=lambda name: ((np.array(palette[name]) - colour) ** 2).sum())


def answer_from(cells, text):
    things = [cell for name, cell in cells.items() if name != "background" and cell[0] in SHAPES]
    colours = Counter(colour for _, colour in things)
    last = text.split()[-1]
    if text == "which background":
        return cells["background"]
    if text == "which colour most":
        return colours.most_common(1)[0][0]
    if text.startswith("any "):
        return "yes" if colours[last] else "no"
    if text.startswith("how many "):
        return str(colours[last] if last in COLOURS else sum(shape[:5] == last[:5] for shape, _ in things))
    if text == "read the number":
        return " ".join(cell[1] for name, cell in cells.items() if cell[0] == "digit")
    what, cell = re.fullmatch(r"which (\w+) at \w\d", text)[1], cells[last]
    return cell[0] if what == "shape" else cell[-1]


# --- The words ---


def test_every_word_is_known(corpus):
    tokenizer = build_tokenizer()
    for question in corpus["train"].all_questions():
        assert tokenizer.unk_token_id not in tokenizer(f"{question.text} {question.answer}")["input_ids"]


def test_no_word_stands_twice_in_the_vocabulary():
    assert len(set(WORDS)) == len(WORDS)


def test_case_and_question_marks_do_not_matter():
    tokenizer = build_tokenizer()
    assert tokenizer("Which shape at B3?")["input_ids"] == tokenizer("which shape at b3")["input_ids"]


def test_processor_makes_of_a_picture_what_training_sees(corpus):
    picture = corpus["test"].pictures[0]
    inputs = build_processor()(images=Image.fromarray(picture), text="<image> any red", return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"][0], normalise(picture))


def test_chat_template_gives_the_row_of_training(corpus):
    processor, tokens = build_processor(), Tokens(build_tokenizer())
    split = corpus["test"]
    question = split.questions[0]["read"][0]
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.fromarray(split.pictures[0])},
                {"type": "text", "text": question.text},
            ],
        },
        {"role": "assistant", "content": question.answer},
    ]
    chat = processor.apply_chat_template(
        conversation,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": 3},
    )
    example = Example(normalise(split.pictures[0]), tokens.prefix, [tokens.branch(question)])
    batch = collate([example], 3)
    assert chat["input_ids"].tolist() == batch["input_ids"].tolist()
    assert torch.as_tensor(chat["assistant_masks"]).tolist() == (batch["labels"] != IGNORED).long().tolist()


# --- The collator ---


def collate(examples, num_visual_tokens):
    return BranchCollator(IMAGE_TOKEN_ID, pad_token_id=0, num_visual_tokens=num_visual_tokens)(examples)


@pytest.mark.parametrize("num_visual_tokens", [1, 6, 16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_questions_are_answered_as_if_asked_alone(num_visual_tokens, attention, corpus):
    model = build_model().eval()
    model.set_attn_implementation(attention)
    examples = examples_of(corpus["test"], Tokens(build_tokenizer()))[:3]
    packed = collate(examples, num_visual_tokens)
    logits = model(**packed).logits
    for row, example in enumerate(examples):
        start = len(example.prefix) - 1 + num_visual_tokens
        for branch in example.branches:
            ids = torch.tensor([[1] + [IMAGE_TOKEN_ID] * num_visual_tokens + branch.input_ids])
            alone = model(input_ids=ids, pixel_values=example.pixel_values[None]).logits[0, -len(branch.input_ids) :]
            stop = start + len(branch.input_ids)
            torch.testing.assert_close(logits[row, start:stop], alone, atol=2e-4, rtol=1e-4)
            start = stop


def test_labels_are_the_answers_with_their_end(corpus):
    tokenizer = build_tokenizer()
    examples = examples_of(corpus["test"], Tokens(tokenizer))[:4]
    labels = collate(examples, 5)["labels"]
    for row, by_kind in zip(labels, corpus["test"].questions):
        answers = [f"{question.answer} </s>" for asked in by_kind.values() for question in asked]
        assert tokenizer.decode(row[row != IGNORED]) == " ".join(answers)


def test_collator_never_changes_its_examples(corpus):
    examples = examples_of(corpus["test"], Tokens(build_tokenizer()))[:2]
    before = json.dumps([[example.prefix, [vars(branch) for branch in example.branches]] for example in examples])
    collate(examples, 7)
    after = json.dumps([[example.prefix, [vars(branch) for branch in example.branches]] for example in examples])
    assert before == after


def test_prefix_without_exactly_one_image_raises():
    example = Example(torch.zeros(3, 64, 64), [1, 7], [Branch([5], [5])])
    with pytest.raises(ValueError, match="`prefix` must hold the image token .* exactly once"):
        collate([example], 2)


def test_labels_of_another_length_raise():
    with pytest.raises(ValueError, match="`labels` must be as long as `input_ids`"):
        Branch([1, 2], [1])


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("num_visual_tokens", [1, 6, 15])
def test_a_packed_batch_that_is_cut_is_the_one_made_at_that_number(num_visual_tokens, boolean, corpus):
    examples = examples_of(corpus["test"], Tokens(build_tokenizer()))[:4]
    whole, expected = collate(examples, 16), collate(examples, num_visual_tokens)
    for batch in (whole, expected) if boolean else ():
        batch["attention_mask"] = batch["attention_mask"] == 0
    cut = trim_to_budget(whole, num_visual_tokens, IMAGE_TOKEN_ID, 16)
    seen = (expected["labels"] != IGNORED) | (expected["input_ids"] != 0)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], expected[name]), name
    assert torch.equal(cut["position_ids"][seen], expected["position_ids"][seen])


def test_first_steps_see_all_visual_tokens():
    draw = elastic_draw(steps=100)
    assert {draw(0, step) for step in range(25)} == {(16,)}


def test_later_steps_draw_every_even_number():
    draw = elastic_draw(steps=400)
    assert {draw(0, step) for step in range(100, 400)} == {(budget,) for budget in BUDGETS}


# --- A run ---


def test_results_have_the_documented_keys(small_run):
    results = json.loads((small_run[0] / "results.json").read_text())
    assert set(results) == {"seed", "seconds", "budgets", "accuracy", "majority", "blind", "versions"}
    assert results["budgets"] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert set(results["accuracy"]) == {*KINDS, "mean"}
    assert all(set(by_budget) == {str(m) for m in BUDGETS} for by_budget in results["accuracy"].values())
    assert set(results["majority"]) == set(results["blind"]) == set(KINDS)


def test_mean_is_the_plain_mean_over_kinds(small_run):
    accuracy = json.loads((small_run[0] / "results.json").read_text())["accuracy"]
    for budget, mean in accuracy["mean"].items():
        assert mean == pytest.approx(np.mean([accuracy[kind][budget] for kind in KINDS]))


def test_a_small_run_learns_something(small_run):
    results = json.loads((small_run[0] / "results.json").read_text())
    assert results["accuracy"]["background"]["16"] > results["blind"]["background"] + 0.1


@pytest.mark.parametrize("name", ["accuracy.png", "samples.png"])
def test_figures_are_pictures(name, small_run):
    with Image.open(small_run[0] / name) as picture:
        assert min(picture.size) > 500


def test_the_scene_left_to_ask_about_gets_an_answer_at_each_budget(small_run):
    rows = ask(str(small_run[0]), str(small_run[0] / "scene.png"), "which background", [2, 16])
    assert [row.num_visual_tokens for row in rows] == [2, 16]
    assert rows[0].prefill_flops < rows[1].prefill_flops


def test_nothing_but_the_result_is_left_in_the_folder(small_run):
    names = {path.name for path in small_run[0].iterdir()}
    assert "work" not in names
    assert {"model.safetensors", "config.json", "processor_config.json", "results.json"} <= names


def test_the_next_commands_name_a_program_that_the_shell_finds(small_run):
    commands = [line.split()[0] for line in small_run[1] if line.startswith("  ")]
    assert len(commands) == 2
    assert all(shutil.which(command) for command in commands)


def test_echo_is_told_of_the_stand_in(small_run):
    assert any("stand-in for CLIP's pre-training" in line for line in small_run[1])


@pytest.mark.parametrize("num_visual_tokens", [1, 3, 16])
def test_checkpoint_answers_through_the_auto_classes(num_visual_tokens, trained, corpus):
    model, processor = trained
    said = answer(model, processor, corpus["test"].pictures[0], "which background", num_visual_tokens)
    assert set(said.split()) <= set(WORDS)


def test_measured_answers_are_what_the_model_generates(trained):
    model, processor = trained
    split = build_corpus(seed=0, sizes=dict(SMALL.split_sizes))["test"]
    examples = examples_of(split, Tokens(processor.tokenizer))[:12]
    pixels = torch.stack([example.pixel_values for example in examples])
    features = model.eval().get_image_features(pixels).pooler_output
    verdicts = right_answers(model, examples, features, budget=6)
    for picture, by_kind, verdict in zip(split.pictures, split.questions, verdicts):
        asked = [question for questions in by_kind.values() for question in questions]
        said = [answer(model, processor, picture, question.text, 6) == question.answer for question in asked]
        assert verdict == said
    assert {hit for verdict in verdicts for hit in verdict} == {True, False}


def test_tower_runs_once_per_image_whatever_the_number_of_budgets(trained, corpus, monkeypatch):
    model, processor = trained
    calls = []
    original = model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda pixels, **kw: calls.append(len(pixels)) or original(pixels, **kw)
    )
    measure_accuracy(model, corpus["validation"], Tokens(processor.tokenizer), BUDGETS)
    assert sum(calls) == len(corpus["validation"])


def test_answering_does_not_move_the_tower(tmp_path, monkeypatch):
    towers = []
    original = training.Trainer.train

    def train(trainer, **kwargs):
        tower = getattr(trainer.model, "tower", None) or trainer.model.model.model.vision_tower
        before = {name: value.clone() for name, value in tower.state_dict().items()}
        original(trainer, **kwargs)
        towers.append(all(torch.equal(before[name], value) for name, value in tower.state_dict().items()))

    monkeypatch.setattr(training.Trainer, "train", train)
    run_quickstart(tmp_path / "run", recipe=TINY)
    assert towers == [False, True]


class Stop(Exception):
    """Stands for an interruption."""


@pytest.mark.parametrize("stage, step", [("seeing", 3), ("answering", 1), ("answering", 7)])
def test_interrupted_run_ends_as_if_it_had_not_been(stage, step, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_quickstart(whole, recipe=TINY)
    original = training.ReportSteps.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        total = {"seeing": TINY.tower.steps, "answering": TINY.answers.steps}[stage]
        if (state.max_steps, state.global_step) == (total, step):
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(training.ReportSteps, "on_step_end", on_step_end)
        run_quickstart(broken, recipe=TINY)
    run_quickstart(broken, recipe=TINY)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


def test_run_interrupted_while_measuring_repeats_no_step(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(run.Run, "measure", lambda *args: (_ for _ in ()).throw(Stop))
        run_quickstart(tmp_path / "run", recipe=TINY)
    steps = []
    monkeypatch.setattr(training.ReportSteps, "on_step_end", lambda self, *args, **kwargs: steps.append(args))
    run_quickstart(tmp_path / "run", recipe=TINY)
    assert steps == []


def test_finished_run_is_shown_not_done_again(small_run, monkeypatch):
    folder, _ = small_run
    monkeypatch.setattr(training.Trainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "settings.json"}
    lines: list[str] = []
    run_quickstart(folder, seed=0, recipe=SMALL, echo=lines.append)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "settings.json"}
    assert before == after
    assert any(line.startswith("mean") for line in lines)


def test_another_seed_does_not_overwrite_a_finished_run(small_run):
    with pytest.raises(ValueError, match="`output_dir` must not hold another run"):
        run_quickstart(small_run[0], seed=1, recipe=SMALL)


def test_overwrite_replaces_a_finished_run(tmp_path):
    run_quickstart(tmp_path / "run", seed=0, recipe=TINY)
    results = run_quickstart(tmp_path / "run", seed=1, recipe=TINY, overwrite=True)
    assert results["seed"] == 1


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="`output_dir` must be new, empty or hold a quickstart run"):
        run_quickstart(tmp_path, recipe=TINY)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, 2**32])
def test_seed_out_of_range_raises(seed, tmp_path):
    with pytest.raises(ValueError, match="`seed` must be a whole number"):
        run_quickstart(tmp_path / "run", seed=seed)


@pytest.mark.parametrize("steps", [0, -5, 2.5, "100", True])
def test_steps_out_of_range_raise(steps, tmp_path):
    with pytest.raises(ValueError, match="`steps` must be a whole number"):
        run_quickstart(tmp_path / "run", steps=steps)


def test_learning_from_patches_is_learning_from_pictures(corpus):
    """The frozen tower is asked once per picture; loss and gradients are those of asking it at every step."""
    model, train, tokens = build_model(), corpus["train"], Tokens(build_tokenizer())
    model.model.vision_tower.requires_grad_(False)
    examples = examples_of(train, tokens)[:3]
    from_patches = [
        Example(patches, example.prefix, example.branches)
        for patches, example in zip(patches_of(model, train), examples)
    ]
    losses, gradients = [], []
    for learner, some in ((model, examples), (FromPatches(model), from_patches)):
        model.zero_grad()
        loss = learner(**collate(some, 6)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.model.query_transformer.query.grad.clone())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_a_run_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    with run.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_compare_measures_every_fixed_model_beside_the_elastic_one(tmp_path):
    run_quickstart(tmp_path / "run", recipe=TINY)
    said: list[str] = []
    run_quickstart(tmp_path / "run", recipe=TINY, compare=True, echo=said.append)
    comparison = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert set(comparison["fixed"]) == {str(budget) for budget in FIXED_BUDGETS}
    assert set(comparison["trained_at_all_then_cut"][MEAN]) == {str(budget) for budget in BUDGETS}
    assert comparison["fixed"]["16"][MEAN] == comparison["trained_at_all_then_cut"][MEAN]["16"]
    assert (tmp_path / "run" / "comparison.png").is_file()
    printed = next(line for line in said if line.startswith("trained at m only"))
    assert printed.split()[4:] == [f"{100 * comparison['fixed'][str(m)][MEAN]:.1f}" for m in FIXED_BUDGETS]


def test_labels_of_lines_keep_their_order_and_distance():
    placed = spread([100, 100, 99, 60, 58], gap=4, top=101)
    assert placed == [100, 96, 92, 60, 56]


def test_a_visit_asks_as_many_questions_as_the_recipe_says(corpus):
    for by_kind in corpus["test"].questions:
        assert {kind: len(asked) for kind, asked in by_kind.items()} == QUESTIONS_PER_VISIT
