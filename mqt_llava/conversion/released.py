"""What the files of the authors' code mean here: names of weights, fields of the config, tokenizer, pictures."""

import re
from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import logging

from ..configuration_mqt_llava import RELEASED_MODEL_TYPE, MqtLlavaConfig, check_sizes


logger = logging.get_logger(__name__)

ABSTRACTOR = "model.query_abstractor."
TOWER = "model.vision_tower.vision_tower.vision_model."

# Every pattern is anchored: Transformers searches for them anywhere in a name, and `attn.in_proj_weight` alone would
# also catch what it must not.
RENAMINGS = [
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.query_abstractor\.", "model.query_transformer."),
    (r"^model\.layers\.", "model.language_model.layers."),
    (r"^model\.norm\.", "model.language_model.norm."),
    (r"^model\.embed_tokens\.", "model.language_model.embed_tokens."),
]
# The packed matrix of `nn.MultiheadAttention` is three here.
PACKED = ["weight", "bias"]

# Buffers that old checkpoints carry and that are computed now, and parts of a CLIP that are not its vision tower.
NOT_WEIGHTS = re.compile(
    r"(rotary_emb\.inv_freq|(^|\.)position_ids)$|^(text_model\.|text_projection|visual_projection|logit_scale)"
)

# Fields of the flat config that describe the language model.
TEXT_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)

# Fields of a CLIP's config that describe its tower. Old ones hold a hundred others, which newer classes stumble over.
VISION_FIELDS = (
    "attention_dropout",
    "hidden_act",
    "hidden_size",
    "image_size",
    "initializer_factor",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
    "projection_dim",
)

# Settings of the authors' code that change what the model computes, and the values that are read here.
KNOWN_SETTINGS: dict[str, tuple] = {
    "query_abstractor_type": (None, "matry_query"),
    "mm_use_im_start_end": (None, False),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "pad", "square"),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
    "pretraining_tp": (None, 1),
}


def weight_transforms() -> list[WeightRenaming | WeightConverter]:
    """The authors' names to ours, in the terms of Transformers' own checkpoint conversion."""
    return [
        *(WeightRenaming(source, target) for source, target in RENAMINGS),
        *(
            WeightConverter(
                rf"^model\.query_transformer\.attn\.in_proj_{kind}",
                [f"model.query_transformer.attn.{part}_proj.{kind}" for part in "qkv"],
                operations=[Chunk(dim=0)],
            )
            for kind in PACKED
        ),
    ]


def register_weight_transforms() -> None:
    """From here on, `from_pretrained` of this process reads the authors' names too."""
    register_checkpoint_conversion_mapping(MqtLlavaConfig.model_type, weight_transforms(), overwrite=True)


def is_released_config(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the authors' code."""
    return config.get("model_type") == RELEASED_MODEL_TYPE


def translate_config(
    released: dict[str, Any], shapes: dict[str, tuple[int, ...]], vision_config: CLIPVisionConfig | None = None
) -> MqtLlavaConfig:
    """
    The config of a checkpoint of the authors' code.

    Args:
        released (`dict`): their config.json.
        shapes (`dict`): shape of every tensor of the checkpoint, by the authors' names. What their code hard-codes
            (number of queries, size of the tower) is read off these.
        vision_config (`CLIPVisionConfig`, *optional*): of the tower, where it is known.

    Raises:
        ValueError: for settings that this project does not compute, and for sizes that the weights contradict.
    """
    for name, known in KNOWN_SETTINGS.items():
        if released.get(name) not in known:
            raise ValueError(
                f"`{name}` must be one of {known} in the checkpoint's config.json, got {released[name]!r}: "
                "this setting is not supported. Convert a checkpoint trained without it."
            )
    text_config = translate_text_config(released, shapes)
    max_visual_tokens, width = shapes[ABSTRACTOR + "query"]
    vision_config = vision_config or vision_config_from_shapes(shapes, released.get("mm_vision_tower"))
    return MqtLlavaConfig(
        vision_config=vision_config.to_dict(),
        text_config=text_config.to_dict(),
        image_token_index=text_config.vocab_size,
        max_visual_tokens=max_visual_tokens,
        query_num_attention_heads=num_heads(width, "`query_num_attention_heads`"),
        vision_feature_layer=released.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if released.get("mm_vision_select_feature") == "cls_patch" else "default",
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=released.get("dtype") or released.get("torch_dtype"),
    )


def translate_text_config(released: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> LlamaConfig:
    """The language model's part of the flat config. Sizes are held against the weights before anything is built."""
    check_sizes(released, "config")
    layers = count_layers(shapes, "model.layers.")
    embeddings = shapes.get("model.embed_tokens.weight", (None, None))
    for name, in_weights in (
        ("num_hidden_layers", layers),
        ("vocab_size", embeddings[0]),
        ("hidden_size", embeddings[1]),
    ):
        if released.get(name) != in_weights:
            raise ValueError(
                f"`{name}` is {released.get(name)!r} in the checkpoint's config.json, but the weights have "
                f"{in_weights}. The files do not belong together, or some are missing."
            )
    return LlamaConfig(**{name: released[name] for name in TEXT_FIELDS if released.get(name) is not None})


def vision_config_from_shapes(shapes: dict[str, tuple[int, ...]], tower_name: str | None) -> CLIPVisionConfig:
    """
    The config of a CLIP tower inside a checkpoint. Only the number of heads cannot be read off shapes.

    Raises:
        ValueError: if the tower is not in the checkpoint.
    """
    positions = shapes.get(TOWER + "embeddings.position_embedding.weight")
    patches = shapes.get(TOWER + "embeddings.patch_embedding.weight")
    if positions is None or patches is None:
        raise ValueError(
            f"The checkpoint holds no vision tower (it names {tower_name!r}). Give one with `vision_tower` "
            "(`--vision-tower` on the command line): a folder or Hub id of that CLIP."
        )
    side, patch_size = round((positions[0] - 1) ** 0.5), patches[-1]
    return CLIPVisionConfig(
        hidden_size=positions[1],
        intermediate_size=shapes[TOWER + "encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=count_layers(shapes, TOWER + "encoder.layers."),
        num_attention_heads=num_heads(positions[1], "`num_attention_heads` of the vision tower"),
        image_size=side * patch_size,
        patch_size=patch_size,
        hidden_act="quick_gelu",
        projection_dim=positions[1],
    )


def num_heads(width: int, what: str) -> int:
    """
    Heads of 64, as in CLIP's ViT-B and ViT-L and in the released query transformer. Widths that 64 does not divide
    are of no released model: four heads, and a warning, since a wrong number is no error anywhere.
    """
    if width % 64 == 0:
        return width // 64
    logger.warning(f"{what} is not in the checkpoint: 4 are assumed at width {width}, where heads of 64 do not fit.")
    return 4


def count_layers(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbered layers there are under a prefix."""
    numbers = {name[len(prefix) :].split(".", 1)[0] for name in shapes if name.startswith(prefix)}
    return len(numbers)


def default_budget(released: dict[str, Any], max_visual_tokens: int) -> int | None:
    """
    The budget that a checkpoint was saved with. In the authors' code the strings `"first_stage"` and `"second_stage"`
    stand here too, the second one for a random draw even at inference; here they mean nothing.
    """
    value = released.get("num_visual_tokens")
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= max_visual_tokens:
        return value
    return None
