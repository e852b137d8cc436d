"""Which files a checkpoint of the authors' code consists of, and the settings that go with them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.clip.configuration_clip import CLIPVisionConfig

from ..configuration_mqt_llava import MqtLlavaConfig
from .files import local_folder, read_json, shapes_of, weight_files
from .released import ABSTRACTOR, NOT_WEIGHTS, TOWER, VISION_FIELDS, is_released_config, translate_config


# Files of weights, each with the way from its names to those of a whole checkpoint.
Files = list[tuple[Path, Callable[[str], str]]]

STAGE_ONE_NAME = "query_abstractor.bin"
NON_LORA_NAME = "non_lora_trainables.bin"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

# Ways of PEFT to build an adapter that are not `W + scale * B @ A`, and the value that turns each off.
PLAIN_LORA: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "modules_to_save": (None, []),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "lora_bias": (None, False),
    "use_bdlora": (None,),
}


def _same(name: str) -> str:
    return name


def _tower_name(name: str) -> str:
    """A CLIP checkpoint's own names, old or new, to those of a tower inside a checkpoint of the authors."""
    return name if NOT_WEIGHTS.search(name) else TOWER + name.removeprefix("vision_model.")


def _unwrapped(name: str) -> str:
    """Names without what PEFT puts in front of them."""
    name = name.removeprefix("base_model.model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


@dataclass
class Source:
    """Everything that one checkpoint is made of. Later files win over earlier ones."""

    config: MqtLlavaConfig
    released: dict[str, Any]  # their config.json
    files: Files
    tokenizer_folder: Path
    vision_folder: Path | None
    adapter: Path | None = None
    lora_scale: float = 0.0


def find_source(
    source: str | Path,
    vision_tower: str | Path | None = None,
    base_model: str | Path | None = None,
    **hub_kwargs,
) -> Source:
    """
    Looks at a checkpoint of the authors' code, of any of their layouts.

    Args:
        source: folder or Hub id: a whole model, a LoRA run, or a first stage; or a first stage's
            `query_abstractor.bin`.
        vision_tower (*optional*): folder or Hub id of the CLIP. Defaults to the checkpoint's `mm_vision_tower`,
            needed only where the checkpoint has no tower inside.
        base_model (*optional*): folder or Hub id of the language model, for a LoRA run and a first stage.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` for `source`.

    Raises:
        ValueError: if a part is missing, or the parts do not fit.
    """
    path = local_folder(source, **hub_kwargs)
    folder = path.parent if path.is_file() else path
    if path.is_file() or _is_first_stage(folder):
        parts = _first_stage(path, folder, base_model)
    elif (folder / "adapter_config.json").is_file():
        parts = _lora_run(folder, base_model)
    else:
        parts = _Parts(_released_config(folder), [(file, _same) for file in weight_files(folder)], folder)
    return _complete(parts, vision_tower)


@dataclass
class _Parts:
    released: dict[str, Any]
    files: Files
    tokenizer_folder: Path
    adapter: Path | None = None
    lora_scale: float = 0.0


def _released_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if is_released_config(config):
        return config
    model_type = config.get("model_type")
    way_out = {
        MqtLlavaConfig.model_type: "It is in this project's layout already: load it with `from_pretrained`.",
        "llava": "Use `mqt-llava upcycle` for LLaVA checkpoints.",
    }.get(str(model_type), "Use `from_components` to build on other models.")
    raise ValueError(
        f"`{folder}` must hold a checkpoint of the authors' code (model type 'llava_llama'), got "
        f"{model_type!r}. {way_out}"
    )


def _is_first_stage(folder: Path) -> bool:
    return (folder / STAGE_ONE_NAME).is_file() and not (folder / "adapter_config.json").is_file()


def _base_folder(base_model: str | Path | None, why: str) -> Path:
    if base_model is None:
        raise ValueError(
            f"{why} Give the language model that it was trained on with `base_model` (`--base-model` on the "
            "command line)."
        )
    return local_folder(base_model)


def _first_stage(path: Path, folder: Path, base_model: str | Path | None) -> _Parts:
    """The query transformer alone, and the language model that it was trained with."""
    file = path if path.is_file() else folder / STAGE_ONE_NAME
    base = _base_folder(base_model, f"`{file.name}` holds the query transformer alone.")
    config = read_json(base / "config.json")
    if config.get("model_type") not in ("llama", "llava_llama"):
        raise ValueError(f"`base_model` must be a Llama, got model type {config.get('model_type')!r}.")
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    settings = settings if is_released_config(settings) else {}
    # Captions were trained on centre crops, and a saved config says the same.
    released = {"image_aspect_ratio": "square", **config, **settings}
    files: Files = [*((shard, _same) for shard in weight_files(base)), (file, _unwrapped)]
    return _Parts(released, files, _folder_with_vocabulary(folder, base))


def _lora_run(folder: Path, base_model: str | Path | None) -> _Parts:
    """An adapter, what else was trained, and the language model under both."""
    adapter_config = read_json(folder / "adapter_config.json")
    for name, plain in PLAIN_LORA.items():
        if adapter_config.get(name) not in plain:
            raise ValueError(
                f"`{name}` must be one of {plain} in adapter_config.json, got {adapter_config[name]!r}: only "
                "plain LoRA can be merged here. Merge this adapter with PEFT."
            )
    rank, alpha = adapter_config.get("r"), adapter_config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"`r` and `lora_alpha` must be positive in adapter_config.json, got {rank!r} and {alpha!r}.")
    adapter = next((folder / name for name in ADAPTER_NAMES if (folder / name).is_file()), None)
    if adapter is None or not (folder / NON_LORA_NAME).is_file():
        raise ValueError(f"`{folder}` must hold {' or '.join(ADAPTER_NAMES)}, and {NON_LORA_NAME}.")
    base = _base_folder(
        base_model or adapter_config.get("base_model_name_or_path"), f"`{folder}` holds a LoRA adapter alone."
    )
    files: Files = [*((shard, _same) for shard in weight_files(base)), (folder / NON_LORA_NAME, _unwrapped)]
    scale = alpha / (rank**0.5 if adapter_config.get("use_rslora") else rank)
    vocabulary = _folder_with_vocabulary(folder, base)
    return _Parts(_released_config(folder), files, vocabulary, adapter=adapter, lora_scale=scale)


def _folder_with_vocabulary(*folders: Path) -> Path:
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
            return folder
    return folders[-1]


def _complete(parts: _Parts, vision_tower: str | Path | None) -> Source:
    """Adds the tower if it is not inside, and translates the config."""
    shapes = _shapes(parts.files)
    if len(shapes.get(ABSTRACTOR + "query", ())) != 2:
        raise ValueError(
            f"The checkpoint must hold the query transformer: `{ABSTRACTOR}query` is missing or no matrix. Plain LLaVA "
            "checkpoints are for `mqt-llava upcycle`."
        )
    inside = any(name.startswith(TOWER) for name in shapes)
    if vision_tower is None and not inside:
        vision_tower = parts.released.get("mm_vision_tower") or None
    vision_folder, vision_config = None, None
    if vision_tower is not None:
        vision_folder = _tower_folder(vision_tower)
        vision_config = clip_vision_config(read_json(vision_folder / "config.json"))
        if not inside:
            parts.files.extend((file, _tower_name) for file in weight_files(vision_folder))
    config = translate_config(parts.released, shapes, vision_config)
    return Source(
        config=config,
        released=parts.released,
        files=parts.files,
        tokenizer_folder=parts.tokenizer_folder,
        vision_folder=vision_folder,
        adapter=parts.adapter,
        lora_scale=parts.lora_scale,
    )


def _tower_folder(vision_tower: str | Path) -> Path:
    """The tower's folder; fetched if it is a Hub id."""
    try:
        return local_folder(vision_tower)
    except OSError as error:
        raise ValueError(
            f"The vision tower {str(vision_tower)!r} could not be fetched ({error}). Give a folder that holds it with "
            "`vision_tower` (`--vision-tower` on the command line)."
        ) from error


def clip_vision_config(config: dict[str, Any]) -> CLIPVisionConfig:
    """
    The vision part of a CLIP's config.json.

    Raises:
        ValueError: for towers that are no CLIP; the authors' code reads no others.
    """
    model_type = config.get("model_type")
    vision = config.get("vision_config") if model_type == "clip" else config
    if model_type not in ("clip", "clip_vision_model") or not isinstance(vision, dict):
        raise ValueError(f"`vision_tower` must be a CLIP for this checkpoint, got model type {model_type!r}.")
    return CLIPVisionConfig(**{name: vision[name] for name in VISION_FIELDS if vision.get(name) is not None})


def _shapes(files: Files) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path, renamed in files:
        shapes.update({renamed(name): shape for name, shape in shapes_of([path]).items()})
    return shapes
