"""What may differ between two MQT-LLaVA checkpoints, and the one rule for how many visual tokens may be asked for."""

import importlib
import math
import operator
from collections.abc import Iterable
from typing import Any, Literal

from huggingface_hub.dataclasses import strict, validated_field
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig


# A 256 x 256 grid of queries is far beyond any vision tower's patches; larger numbers in a config are typos or
# attacks.
LARGEST_MAX_VISUAL_TOKENS = 65536

# `model_type` in checkpoints of the authors' code (`LlavaConfig` in `language_model/llava_llama.py`).
RELEASED_MODEL_TYPE = "llava_llama"

# What a text model may do to its logits after the head, and the value that does nothing. The head here is one plain
# linear layer, so any other value is refused. Names as they stand in the text configs of Transformers.
PLAIN_HEAD_VALUES: dict[str, tuple] = {
    "final_logit_softcapping": (None,),  # Gemma 2 and later, NanoChat, VaultGemma
    "logits_soft_cap": (None,),  # RecurrentGemma
    "output_logit_soft_cap": (None,),  # xLSTM
    "logit_scale": (None, 1),  # Cohere
    "logits_scaling": (None, 1),  # Granite divides by it, HyperCLOVA X multiplies
    "lm_head_multiplier": (None, 1),  # Falcon-H1
    "logits_mup_width_multiplier": (None, 1),  # Inkling
    "unpadded_vocab_size": (None,),  # Inkling cuts the padded rows off
    "lm_head_bias": (None, False),  # Phi-MoE, Zaya
    "decoder_bias": (None, False),  # ModernBERT decoder
}
# Text models whose head always has a bias, or is not a linear layer over the vocabulary at all.
MODEL_TYPES_WITHOUT_PLAIN_HEAD = frozenset(
    ("codegen", "ctrl", "electra", "git", "gptj", "musicgen", "musicgen_melody", "phi", "prophetnet", "xlm", "xlnet")
)


# Larger than in any model; what lies outside is a typo or an attack, and would exhaust the machine before any weight
# is read.
LARGEST_SIZES = {
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**31,
    "vocab_size": 2**24,
    "image_size": 2**14,
    "patch_size": 2**14,
}

# Arguments of `from_pretrained` that say which files of the Hub are meant.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def _square_number(maximum: int) -> None:
    """`max_visual_tokens` is a perfect square in a sane range."""
    if not 1 <= maximum <= LARGEST_MAX_VISUAL_TOKENS or math.isqrt(maximum) ** 2 != maximum:
        raise ValueError(
            f"`max_visual_tokens` must be a perfect square between 1 and {LARGEST_MAX_VISUAL_TOKENS} (the queries "
            f"start on a square grid), got {maximum}."
        )


def _token_id(token: int) -> None:
    """`image_token_index` is a token id; -200, as in the authors' code, is a mark and not one."""
    if token < 0:
        raise ValueError(
            f"`image_token_index` must be a token id, 0 or more, got {token}. Add an `<image>` token to the tokenizer "
            "and give its id."
        )


@strict
class MqtLlavaConfig(PreTrainedConfig):
    r"""
    Configuration of MQT-LLaVA: a LLaVA whose visual tokens are nested, so that any prefix of them is an image.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to CLIP ViT-L/14 at 336 px):
            The vision tower. It describes the whole tower; the model builds only the layers that it reads.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to `LlamaConfig()`):
            The language model. Its head must be one plain linear layer (no bias, logit scaling or soft-capping).
        image_token_index (`int`, *optional*, defaults to 32000):
            Id of the `<image>` placeholder; `image_token_id` is another name for it. It may lie outside the
            vocabulary, since no embedding is ever looked up for it.
        max_visual_tokens (`int`, *optional*, defaults to 256):
            M: the number of learned queries, and so the most visual tokens that an image can have. A perfect square:
            the queries start on the cells of a `sqrt(M)` x `sqrt(M)` grid. Fixed by the checkpoint.
        query_num_attention_heads (`int`, *optional*, defaults to 16):
            Heads of the cross-attention. Must divide `vision_config.hidden_size`.
        vision_feature_layer (`int`, *optional*, defaults to -2):
            Which hidden state of the tower is read, counted as in `output_hidden_states`: 0 would be the embeddings,
            -1 the last layer. Nothing above it is built.
        vision_feature_select_strategy (`"default"` or `"full"`, *optional*, defaults to `"default"`):
            `"default"` drops the tower's CLS (and register) tokens, `"full"` keeps everything, for towers without any.
        query_init (`"authors"` or `"local"`, *optional*, defaults to `"authors"`):
            Starting values of a new query transformer, nothing else. `"authors"`: as released. `"local"`: each query
            attends near its own place from the first step, and places are ordered coarse to fine.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the head shares the input embeddings. `True` as soon as `text_config` says so.

    Raises:
        huggingface_hub.errors.StrictDataclassError: when a value breaks one of these rules. The message names the rule
            and the value.

    Example:

    ```python
    >>> from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration

    >>> config = MqtLlavaConfig()  # the shape of the released 7B model
    >>> config.max_visual_tokens
    256
    ```"""

    model_type = "mqt_llava"
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_index: int = validated_field(_token_id, default=32000)
    max_visual_tokens: int = validated_field(_square_number, default=256)
    query_num_attention_heads: int = 16
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    query_init: Literal["authors", "local"] = "authors"
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        [`~transformers.PreTrainedConfig.from_dict`], for configs of this model only: another model's fields would be
        taken over without a word, and the defaults kept where they should not be.

        Raises:
            ValueError: if the dictionary is of another model type.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"`model_type` must be {cls.model_type!r}, got {model_type!r}. Checkpoints of the authors' code "
                f"({RELEASED_MODEL_TYPE!r}) are read by `MqtLlavaForConditionalGeneration.from_pretrained` and by "
                "`mqt-llava convert`."
            )
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        try:
            super().__post_init__(**kwargs)
        except ZeroDivisionError as error:  # other config classes divide by heads and patches without a look
            raise ValueError("`vision_config` and `text_config` must be of positive sizes, got a 0.") from error
        # Text configs carry their own flag; the composite model has to follow it (as LlavaConfig does).
        self.tie_word_embeddings = self.tie_word_embeddings or bool(
            getattr(self.text_config, "tie_word_embeddings", False)
        )

    @property
    def num_vision_layers(self) -> int:
        """Number of layers of the tower that are built: `vision_feature_layer` counted from the bottom."""
        layers = self.vision_config.num_hidden_layers
        return self.vision_feature_layer if self.vision_feature_layer >= 0 else layers + 1 + self.vision_feature_layer

    @property
    def num_vision_prefix_tokens(self) -> int:
        """Tokens that the tower puts before its patches and that are dropped: CLS and registers (DINOv2, DINOv3)."""
        if self.vision_feature_select_strategy == "full":
            return 0
        return 1 + (getattr(self.vision_config, "num_register_tokens", 0) or 0)

    def validate_sizes(self):
        """Tower and language model have sizes that a machine can hold."""
        for name in ("vision_config", "text_config"):
            config = getattr(self, name)
            sizes = {size: vars(config).get(config.attribute_map.get(size, size)) for size in LARGEST_SIZES}
            check_sizes(sizes, name)

    def validate_query_heads(self):
        """The tower's width can carry the queries: heads divide it, and so do the 4 parts of the position table."""
        self.validate_vision_tower()  # validators run by name; the width is there only in a tower
        width, heads = self.vision_config.hidden_size, self.query_num_attention_heads
        if heads < 1 or width % heads:
            raise ValueError(
                f"`query_num_attention_heads` must be positive and divide `vision_config.hidden_size` ({width}), "
                f"got {heads}."
            )
        if width % 4:
            raise ValueError(
                "`vision_config.hidden_size` must be a multiple of 4 (sine and cosine of two axes make up a "
                f"position), got {width}."
            )

    def validate_vision_tower(self):
        """The tower takes plain pixels and has the layer that `vision_feature_layer` names."""
        layers, width = (getattr(self.vision_config, name, None) for name in ("num_hidden_layers", "hidden_size"))
        plain = isinstance(layers, int) and isinstance(width, int) and layers > 0 and width > 0
        if not plain or self.vision_config.model_type == "siglip2_vision_model":
            raise ValueError(
                "`vision_config` must be a tower of equal layers over `[3, H, W]` pixels (CLIP, SigLIP, DINOv2, "
                f"DINOv3, ViT, ...), got `model_type={self.vision_config.model_type!r}` with `num_hidden_layers="
                f"{layers}` and `hidden_size={width}`. For SigLIP 2 use a fixed-resolution checkpoint, whose type is "
                "`siglip_vision_model`."
            )
        if not 1 <= self.num_vision_layers <= layers:
            raise ValueError(
                f"`vision_feature_layer` must be between 1 and {layers}, or between {-layers} and -1, for a tower of "
                f"{layers} layers, got {self.vision_feature_layer}."
            )

    def validate_language_model(self):
        """The language model has layers and a vocabulary."""
        for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
            value = getattr(self.text_config, name, None)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"`text_config.{name}` must be a positive number, got {value!r} in a config of type "
                    f"{self.text_config.model_type!r}. Give the config of a causal language model."
                )

    def validate_language_head(self):
        """The language model's head is one plain linear layer; anything more would be lost without a word."""
        text = self.text_config
        if text.model_type in MODEL_TYPES_WITHOUT_PLAIN_HEAD:
            raise ValueError(
                f"`text_config` of type {text.model_type!r} has a head with a bias or of another kind; only a plain "
                "linear head without bias is supported. Use another language model."
            )
        for name, plain in PLAIN_HEAD_VALUES.items():
            value = getattr(text, name, None)
            if value not in plain:
                raise ValueError(
                    f"`text_config.{name}` must be one of {plain} because the head is a plain linear layer, got "
                    f"{value!r}. Logit scaling, soft-capping and head biases are not supported: use another language "
                    "model."
                )
        if text.model_type == "ernie4_5_moe" and text.use_bias:
            raise ValueError("`text_config.use_bias` must be False because the head is a plain linear layer, got True.")


def installed(module: str) -> Any:
    """
    A module of the installed package that does not travel to the Hub with this one, and so is found by name.

    Raises:
        ImportError: if the package is not installed, and this file came from the Hub alone.
    """
    try:
        return importlib.import_module(f"mqt_llava.{module}")
    except ModuleNotFoundError as error:
        raise ImportError("This needs the package `mqt_llava`, which is more than the code in a repository.") from error


def check_sizes(config: dict[str, Any], name: str) -> None:
    """
    The sizes in a config are of a model that a machine can hold. Those that are not there are not looked at.

    Args:
        config (`dict`): of a vision tower or a language model.
        name (`str`): what to call it.

    Raises:
        ValueError: naming the size, its range and the value.
    """
    for size, largest in LARGEST_SIZES.items():
        value = config.get(size)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and (isinstance(one, bool) or not isinstance(one, int) or not 1 <= one <= largest):
                raise ValueError(f"`{name}.{size}` must be a whole number between 1 and {largest}, got {one!r}.")


def released_config(pretrained_model_name_or_path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """
    The config.json of a checkpoint of the authors' code, `None` for any other folder or Hub id.

    Args:
        pretrained_model_name_or_path: as for `from_pretrained`.
        kwargs (`dict`): its arguments, of which those about the Hub are used.
    """
    if pretrained_model_name_or_path is None:
        return None
    hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
        model_type = config_dict.get("model_type")
    except (OSError, ValueError):
        return None  # no config there, as with a lone adapter; what is wrong with it is for the caller to say
    except (TypeError, AttributeError) as error:
        raise ValueError(f"The config.json of `{pretrained_model_name_or_path}` must hold a JSON object.") from error
    return config_dict if model_type == RELEASED_MODEL_TYPE else None


def check_num_visual_tokens(value: Any, num_images: int, max_visual_tokens: int) -> list[int]:
    """
    The number of visual tokens of each image, from what a user may write.

    Args:
        value (`int`, or an iterable of `int`): one number for all images, or one per image in flat batch order.
        num_images (`int`): images in the batch.
        max_visual_tokens (`int`): M of the checkpoint.

    Returns:
        `list[int]`: `num_images` numbers, each between 1 and `max_visual_tokens`.

    Raises:
        ValueError: for anything that is not a whole number in that range, or a list of another length.
    """
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0:
        counts = [_check_one(item, max_visual_tokens, value) for item in value]
        if len(counts) != num_images:
            raise ValueError(
                f"`num_visual_tokens` must be one number or one per image ({num_images}, in flat batch order), got "
                f"{len(counts)} numbers: {value}."
            )
        return counts
    return [_check_one(value, max_visual_tokens, value)] * num_images


def _check_one(item: Any, max_visual_tokens: int, value: Any) -> int:
    """`item` as an `int` in range. `operator.index` takes NumPy and torch integers, and refuses 2.5 and "16"."""
    try:
        count = None if isinstance(item, bool) else operator.index(item)
    except TypeError:
        count = None
    if count is None or not 1 <= count <= max_visual_tokens:
        raise ValueError(
            f"`num_visual_tokens` must be a whole number between 1 and {max_visual_tokens} (`max_visual_tokens` of "
            f"this checkpoint), or a list of them, got {value!r}."
        )
    return count


__all__ = ["MqtLlavaConfig"]
