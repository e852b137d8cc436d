"""
A run as data: one flat YAML file, every key known, every value of its kind.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .arguments import MqtLlavaTrainingArguments


STAGES = {
    "pretrain": ("query_transformer",),
    "finetune": ("query_transformer", "language_model"),
}
"""Stage -> parts whose weights learn (the authors' `pretrain.sh` and `finetune.sh`). All else stays as loaded."""


@dataclass
class ModelArguments:
    """
    What is trained.

    Args:
        model_name_or_path (`str`): an MQT-LLaVA model, as a folder or on the Hub; `builtin:tiny` for a toy.
        language_model, vision_tower (`str`): instead, a new model from these two.
        max_visual_tokens, query_num_attention_heads, query_init, vision_feature_layer: of a new model; see
            [`MqtLlavaConfig`]. Heads default to the width of the tower divided by 64, as in the released checkpoint.
        stage (`str`): `pretrain` or `finetune`.
        trainable (`list[str]`): instead of a stage, the parts that learn.
        lora (`bool`): adapters on the language model; other parts that learn are saved with them in full.
        lora_r, lora_alpha, lora_dropout: of the adapters.
        quantization (`str`): `4bit` or `8bit` for the language model (bitsandbytes), with `lora`.
        dtype (`str`): of the weights, `float32` or `bfloat16`.
        attn_implementation (`str`): `sdpa`, `eager`, `flash_attention_2`, ...
    """

    model_name_or_path: str | None = None
    language_model: str | None = None
    vision_tower: str | None = None
    max_visual_tokens: int = 256
    query_num_attention_heads: int | None = None
    query_init: str = "authors"
    vision_feature_layer: int = -2
    stage: str = "finetune"
    trainable: list[str] | None = None
    lora: bool = False
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    quantization: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None


@dataclass
class DataArguments:
    """
    What it learns from.

    Args:
        data, eval_data (`list`): sources. Each is a path or Hub id, or a mapping with `path` and perhaps
            `image_folder`, `weight`, `split`, `name`.
        image_folder (`str`): where image paths begin, for sources that do not say.
        streaming (`bool`): read data sets of the Hub as they come, instead of to disk first.
        max_length (`int`): most tokens of a row, placeholders included.
        chat_template (`str`): `plain`, or a template; the processor's own by default.
        image_aspect (`str`): `pad` to a square or `crop` to one; the processor's own by default.
        strict_data (`bool`): stop at the first bad record.
    """

    data: list[Any] = dataclasses.field(default_factory=list)
    eval_data: list[Any] = dataclasses.field(default_factory=list)
    image_folder: str | None = None
    streaming: bool = False
    max_length: int | None = 2048
    chat_template: str | None = None
    image_aspect: str | None = None
    strict_data: bool = False


@dataclass
class RunArguments:
    """
    Args:
        resume (`bool`): go on from the newest whole checkpoint in `output_dir`, if there is one.
        overwrite (`bool`): start anew in a folder that holds checkpoints, which are deleted.
    """

    resume: bool = False
    overwrite: bool = False


GROUPS = {"model": ModelArguments, "data": DataArguments, "run": RunArguments, "training": MqtLlavaTrainingArguments}


@dataclass
class Recipe:
    """A run in four parts."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: MqtLlavaTrainingArguments


def known_keys() -> dict[str, tuple[str, Any]]:
    """Key -> the group that it belongs to, and its type."""
    keys = {}
    for group, arguments in GROUPS.items():
        hints = typing.get_type_hints(arguments)
        keys.update({f.name: (group, hints[f.name]) for f in dataclasses.fields(arguments) if f.init})
    return keys


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    A recipe file, with changes from a command line: `["--max_steps", "10", "--lora"]`.

    Raises:
        ValueError: for a file that is not a mapping, an unknown key, or a value of another kind.
    """
    return make_recipe(read_values(path, overrides))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Keys and values of a recipe, checked, before anything is made of them."""
    if not Path(path).is_file():
        raise ValueError(f"`recipe` must be a YAML file, got {str(path)!r}, which does not exist.")
    try:
        written = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(written, Mapping):
        raise ValueError(f"{str(path)!r} must be a mapping of keys to values, got {type(written).__name__}.")
    return checked({**written, **parse_overrides(overrides)})


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, each of the kind that its key takes. See [`load_recipe`] for what is refused."""
    keys = known_keys()
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1, cutoff=0.5)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"`{key}` is not a key of a recipe.{hint}")
    return {key: convert(key, value, keys[key][1]) for key, value in values.items()}


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Groups of arguments from checked values."""
    keys = known_keys()
    parts: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, value in values.items():
        parts[keys[key][0]][key] = value
    recipe = Recipe(**{group: GROUPS[group](**part) for group, part in parts.items()})
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """
    Raises:
        ValueError: if no model or no data is named, or options exclude each other.
    """
    model = recipe.model
    new = [model.language_model, model.vision_tower]
    if (model.model_name_or_path is None) == (None in new) or (model.model_name_or_path and any(new)):
        raise ValueError("Give either `model_name_or_path`, or `language_model` and `vision_tower` for a new model.")
    if model.trainable is None and model.stage not in STAGES:
        raise ValueError(
            f"`stage` must be one of {', '.join(STAGES)}, got {model.stage!r}. Or name the `trainable` parts."
        )
    if model.quantization not in (None, "4bit", "8bit"):
        raise ValueError(f"`quantization` must be `4bit` or `8bit`, got {model.quantization!r}.")
    if model.quantization and not model.lora:
        raise ValueError("`quantization` needs `lora: true`: quantized weights do not learn.")
    if not recipe.data.data:
        raise ValueError("`data` must name at least one source.")
    if recipe.data.image_aspect not in (None, "pad", "crop"):
        raise ValueError(f"`image_aspect` must be `pad` or `crop`, got {recipe.data.image_aspect!r}.")
    if recipe.training.eval_strategy != "no" and not recipe.data.eval_data:
        raise ValueError("`eval_strategy` needs `eval_data`. Name some, or set `eval_strategy: no`.")


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """
    `--key value`, `--key=value` and `--flag` (true) to keys and YAML values; dashes inside a key are underscores.

    Raises:
        ValueError: for a word that belongs to no key.
    """
    values: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise ValueError(f"Changes to a recipe are written `--key value`, got {word!r} without a key.")
        key, equals, value = word[2:].partition("=")
        following = words[position + 1] if position + 1 < len(words) else "--"
        if not equals and not following.startswith("--"):
            value, position = following, position + 1
        elif not equals:
            value = "true"
        values[key.replace("-", "_")] = yaml.safe_load(value)
        position += 1
    return values


def convert(key: str, value: Any, kind: Any) -> Any:
    """
    `value` as the kind that a key takes. (YAML reads `1e-3` as text, and a command line knows no lists.)

    Raises:
        ValueError: naming the key, what it takes and what it got.
    """
    options = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    if value is None:
        return None
    if str in options and isinstance(value, bool) and bool not in options:
        return "yes" if value else "no"  # YAML 1.1 reads the words `no` and `off` as false
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if plain is list and not isinstance(value, list):
            return convert(key, [value], kind) if str not in options or not isinstance(value, str) else value
        if plain is Any or (
            isinstance(plain, type) and isinstance(value, plain) and isinstance(value, bool) <= (plain is bool)
        ):
            return value
    if str in options and isinstance(value, (int, float)):
        return str(value)
    takes = " or ".join(getattr(option, "__name__", str(option)) for option in options if option is not type(None))
    raise ValueError(f"`{key}` must be {takes}, got {value!r}.")
