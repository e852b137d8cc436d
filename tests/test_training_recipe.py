from pathlib import Path

import pytest
import yaml

from mqt_llava.training.recipe import known_keys, load_recipe, make_recipe, parse_overrides, read_values


RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = {"model_name_or_path": "x", "data": ["y.json"], "output_dir": "z", "use_cpu": True}


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    recipe = load_recipe(path, ["--use_cpu"])
    assert recipe.training.output_dir.startswith("runs/")


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_config_is_one(path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes == 8 * config.num_machines


def test_the_authors_stages_have_their_published_values():
    """arXiv 2405.19315 and the scripts of its code: batches of 256 and 128 on 8 GPUs, 1 and 2 epochs, 1e-3 and 2e-5."""
    first, second = (load_recipe(RECIPES / f"{name}.yaml", ["--use_cpu"]) for name in ("pretrain", "finetune"))
    assert (first.model.stage, first.training.draw, first.data.chat_template) == ("pretrain", "fixed(256)", "plain")
    assert (second.model.stage, second.training.draw, second.data.image_aspect) == ("finetune", "uniform", "pad")
    assert [r.training.learning_rate for r in (first, second)] == [1e-3, 2e-5]
    assert [r.training.num_train_epochs for r in (first, second)] == [1, 2]
    assert [8 * r.training.per_device_train_batch_size for r in (first, second)] == [256, 128]
    for recipe in (first, second):
        assert recipe.training.weight_decay == 0
        assert recipe.training.warmup_steps == 0.03
        assert recipe.training.lr_scheduler_type == "cosine"
        assert recipe.data.max_length == 2048


@pytest.mark.parametrize(
    "key, near",
    [("learning_rat", "learning_rate"), ("evalbudgets", "eval_budgets"), ("Draw", "draw"), ("lroa", "lora")],
)
def test_an_unknown_key_raises_with_the_nearest(recipe_file, key, near):
    with pytest.raises(ValueError, match=f"Did you mean `{near}`"):
        read_values(recipe_file(f"{key}: 1\n"))


def test_a_key_like_no_other_raises(recipe_file):
    with pytest.raises(ValueError, match="`xyzzy` is not a key of a recipe.$"):
        read_values(recipe_file("xyzzy: 1\n"))


@pytest.mark.parametrize(
    "written, key, value",
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),  # text to YAML
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 10", "max_steps", 10),
        ("eval_strategy: no", "eval_strategy", "no"),  # false to YAML
        ("data: a.json", "data", ["a.json"]),
        ("eval_budgets: 4", "eval_budgets", [4]),
        ("report_to: none", "report_to", "none"),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("bf16: true", "bf16", True),
        ("max_length: null", "max_length", None),
    ],
)
def test_values_take_the_kind_of_their_key(recipe_file, written, key, value):
    found = read_values(recipe_file(written))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "written",
    ["learning_rate: fast", "max_steps: 1.5", "max_steps: true", "lora: 3", "learning_rate: [1]", "lora: maybe"],
)
def test_values_of_another_kind_raise(recipe_file, written):
    with pytest.raises(ValueError, match=f"`{written.split(':')[0]}` must be"):
        read_values(recipe_file(written))


def test_the_command_line_wins_over_the_file(recipe_file):
    values = read_values(recipe_file("max_steps: 3\nlora: false\n"), ["--max-steps", "5", "--lora", "--seed=7"])
    assert (values["max_steps"], values["lora"], values["seed"]) == (5, True, 7)


def test_lists_and_negative_numbers_are_read_from_the_command_line():
    assert parse_overrides(["--eval_budgets", "[2, 16]", "--max_steps", "-1"]) == {
        "eval_budgets": [2, 16],
        "max_steps": -1,
    }


def test_a_word_without_a_key_raises():
    with pytest.raises(ValueError, match="without a key"):
        parse_overrides(["max_steps", "3"])


@pytest.mark.parametrize("text", ["- 1\n", "a: [", ""])
def test_a_file_that_is_no_recipe_raises(recipe_file, text):
    with pytest.raises(ValueError):
        load_recipe(recipe_file(text))


def test_a_recipe_that_is_not_there_raises(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_name_or_path": None}, "Give either"),
        ({"language_model": "a", "vision_tower": "b"}, "Give either"),
        ({"language_model": "a"}, "Give either"),
        ({"stage": "fine"}, "`stage` must be one of"),
        ({"quantization": "4bit"}, "needs `lora: true`"),
        ({"quantization": "3bit"}, "`4bit` or `8bit`"),
        ({"data": []}, "at least one source"),
        ({"image_aspect": "stretch"}, "`pad` or `crop`"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "needs `eval_data`"),
        ({"self_distillation": -1.0}, "self_distillation"),
    ],
)
def test_recipes_that_contradict_themselves_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        make_recipe({**SMALL, **changes})


def test_no_key_belongs_to_two_groups():
    from dataclasses import fields

    from mqt_llava.training.recipe import GROUPS

    names = [f.name for group in GROUPS.values() for f in fields(group) if f.init]
    assert len(names) == len(set(names)) == len(known_keys())


def test_recipes_are_plain_mappings():
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in RECIPES.glob("*.yaml"))
