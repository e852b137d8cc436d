"""Model and processor straight from a checkpoint of the authors' code, without writing anything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from ..configuration_mqt_llava import HUB_ARGUMENTS
from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from .files import local_folder, open_tensors
from .processor import build_processor
from .released import default_budget, register_weight_transforms
from .sources import Source, find_source
from .weights import Piece, check_pieces, plan_pieces


def load_released_model(
    load: Callable[..., tuple[MqtLlavaForConditionalGeneration, dict]],
    pretrained_model_name_or_path: str | Path,
    vision_tower: str | Path | None,
    kwargs: dict[str, Any],
) -> tuple[MqtLlavaForConditionalGeneration, dict]:
    """
    What `from_pretrained` does for a whole checkpoint of the authors' code.

    Args:
        load: the `from_pretrained` of Transformers, returning the loading info too.
        pretrained_model_name_or_path, vision_tower, kwargs: what the caller gave.

    Returns:
        The model, and which keys were missing, unexpected or of the wrong shape.
    """
    source = find_source(_fetch(pretrained_model_name_or_path, kwargs), vision_tower)
    if source.adapter is not None:
        raise ValueError(
            f"`{pretrained_model_name_or_path}` holds an adapter alone. Merge it with `mqt-llava convert "
            "--base-model ...`."
        )
    pieces = check_pieces(plan_pieces(source), source)
    register_weight_transforms()
    with _quiet_about_missing_weights():
        model, info = load(str(source.files[0][0].parent), config=source.config, **kwargs)
    fill_tower(model, info, [piece for piece in pieces if piece.path.parent == source.vision_folder])
    model.generation_config = released_generation_config(source)
    return model, info


def _fetch(pretrained_model_name_or_path: str | Path, kwargs: dict[str, Any]) -> Path:
    """The folder that the arguments about the Hub name; they are taken out of the others."""
    given = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    subfolder = given.pop("subfolder", None) or ""
    given.pop("proxies", None)
    return local_folder(pretrained_model_name_or_path, **given) / subfolder


@contextmanager
def _quiet_about_missing_weights() -> Iterator[None]:
    """Transformers would report the tower as missing and drawn at random, before it is filled in."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def fill_tower(model: MqtLlavaForConditionalGeneration, info: dict, pieces: list[Piece]) -> None:
    """Copies the tower's weights from its own folder, and takes them off the list of missing ones."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path in dict.fromkeys(piece.path for piece in pieces):
        with open_tensors(path) as file:
            for piece in pieces:
                if piece.path == path and piece.name in info["missing_keys"]:
                    if weights[piece.name].is_meta:
                        raise ValueError(
                            "`device_map` puts parts of the vision tower on disk, which needs a converted checkpoint. "
                            "Use `mqt-llava convert` first."
                        )
                    weights[piece.name].copy_(file.read(piece.source_name))
                    info["missing_keys"].remove(piece.name)


def released_generation_config(source: Source) -> GenerationConfig:
    """
    Token ids and the default budget. Their sampling settings stay behind: they took effect only where a script of
    theirs asked for sampling.
    """
    text_config = source.config.text_config
    settings = {name: getattr(text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings["num_visual_tokens"] = default_budget(source.released, source.config.max_visual_tokens)
    return GenerationConfig(**{name: value for name, value in settings.items() if value is not None})


def load_released_processor(pretrained_model_name_or_path: str | Path, vision_tower: str | Path | None, **kwargs):
    """
    What `MqtLlavaProcessor.from_pretrained` does for a checkpoint of the authors' code.

    Args:
        pretrained_model_name_or_path, vision_tower: what the caller gave.
        kwargs: arguments about the Hub; `legacy` of the tokenizer; arguments of the processor, which win over the
            checkpoint's.
    """
    folder = _fetch(pretrained_model_name_or_path, kwargs)
    return build_processor(find_source(folder, vision_tower), **kwargs)
