"""A new model from parts that exist: any vision tower and any language model, or the two halves of a LLaVA."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import logging

from ..configuration_mqt_llava import MqtLlavaConfig
from ..modeling_mqt_llava import (
    MqtLlavaForConditionalGeneration,
    MqtLlavaQueryTransformer,
    cut_above_selected_layer,
    init_query_transformer,
)
from ..processing_mqt_llava import PLAIN_CHAT_TEMPLATE, VICUNA_V1_CHAT_TEMPLATE, MqtLlavaProcessor
from .convert import folder_in_the_making
from .processor import IMAGE_TOKEN
from .templates import CHATML_CHAT_TEMPLATE


logger = logging.get_logger(__name__)

# Rows of the embeddings are a multiple of this, which matrix units like.
VOCABULARY_MULTIPLE = 64
# Means and deviations of pixels, where a tower's folder does not say.
MEAN_AND_STD = {
    "clip_vision_model": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip_vision_model": ([0.5] * 3, [0.5] * 3),
}
IMAGENET_MEAN_AND_STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def from_components(
    vision: str | Path | PreTrainedModel,
    language: str | Path | PreTrainedModel,
    *,
    max_visual_tokens: int = 256,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> tuple[MqtLlavaForConditionalGeneration, MqtLlavaProcessor]:
    """
    Model and processor from a pretrained vision tower and a pretrained language model, with a new query transformer.

    Args:
        vision: folder or Hub id of a tower or of a two-tower model that has one; or the tower itself.
        language: folder or Hub id of a causal language model; or the model itself. Its embeddings are resized in
            place.
        max_visual_tokens: M, a perfect square.
        tokenizer (*optional*): needed where `language` is a model without a folder. `<image>` is added if it lacks it.
        chat_template (*optional*): must mark answers with `{% generation %}` to be trained on. Defaults to ChatML
            where the tokenizer knows its tokens, else to Vicuna-v1.
        dtype (*optional*): number format of all weights. Defaults to that of the language model.
        config: other fields of [`MqtLlavaConfig`], such as `vision_feature_layer` and `query_init`.

    Raises:
        ValueError: if the parts cannot be put together.
        huggingface_hub.errors.StrictDataclassError: if the config of the two breaks a rule of [`MqtLlavaConfig`].
    """
    tower, image_settings = _load_tower(vision)
    if isinstance(language, PreTrainedModel):
        model, source = language, language.config._name_or_path
    else:
        model, source = AutoModelForCausalLM.from_pretrained(language), str(language)
    if tokenizer is None:
        if not source:
            raise ValueError("`tokenizer` must be given with a `language` model that was not loaded from a folder.")
        tokenizer = AutoTokenizer.from_pretrained(source)
    prepare_tokenizer(tokenizer)
    rows = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(rows, pad_to_multiple_of=VOCABULARY_MULTIPLE)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"`language` must have a plain linear head, got {head}.")
    defaults = {
        "vision_feature_select_strategy": select_strategy(tower),
        "query_num_attention_heads": _query_heads(tower.config),
    }
    whole = MqtLlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=model.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        max_visual_tokens=max_visual_tokens,
        **{**defaults, **config},
    )
    joined = assemble(whole, tower, model.base_model, head, dtype or model.dtype)
    joined.generation_config = _generation_config(model, tokenizer)
    chat_template = chat_template or pick_chat_template(tokenizer)
    return joined, make_processor(whole, tokenizer, image_settings, chat_template)


def _load_tower(vision: str | Path | PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The tower, and what its folder says about pictures."""
    if isinstance(vision, PreTrainedModel):
        source, tower = vision.config._name_or_path, vision
    else:
        config = AutoConfig.from_pretrained(vision)
        config = getattr(config, "vision_config", config)
        source, tower = str(vision), AutoModel.from_pretrained(vision, config=config)
    return getattr(tower, "vision_model", tower), _image_settings(source)


def _image_settings(source: str) -> dict[str, Any]:
    try:
        saved, _ = ImageProcessingMixin.get_image_processor_dict(source) if source else ({}, {})
    except OSError:
        logger.warning(f"`{source}` has no image processor: pixels are normalised as usual for its kind of tower.")
        saved = {}
    return {name: saved[name] for name in ("image_mean", "image_std", "resample") if saved.get(name) is not None}


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds `<image>`, and a token for padding where there is none."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"


def pick_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML where its tokens are known, else Vicuna-v1: both mark answers and know pictures, as few templates do."""
    vocabulary = tokenizer.get_vocab()
    chatml = "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary
    return CHATML_CHAT_TEMPLATE if chatml else VICUNA_V1_CHAT_TEMPLATE


@torch.no_grad()
def select_strategy(tower: PreTrainedModel) -> str:
    """
    Whether the tower puts tokens before its patches (`"default"` drops them), seen on one black picture.

    Raises:
        ValueError: if it returns other numbers of tokens than patches, with or without CLS and registers.
    """
    config = tower.config
    size = config.image_size
    pixels = torch.zeros(1, getattr(config, "num_channels", 3), size, size, dtype=tower.dtype, device=tower.device)
    num_tokens = tower(pixels).last_hidden_state.shape[1]
    num_patches = (size // config.patch_size) ** 2
    extra = 1 + (getattr(config, "num_register_tokens", 0) or 0)
    if num_tokens == num_patches:
        return "full"
    if num_tokens == num_patches + extra:
        return "default"
    raise ValueError(
        f"`vision` must return one token per patch, with or without CLS and registers. It has {num_patches} "
        f"patches and returned {num_tokens} tokens."
    )


def _query_heads(vision_config) -> int:
    """Heads of 64, as released; where that does not go, as many as the tower has."""
    width = vision_config.hidden_size
    return width // 64 if width % 64 == 0 else vision_config.num_attention_heads


def assemble(
    config: MqtLlavaConfig, tower: PreTrainedModel, language: PreTrainedModel, head: nn.Linear, dtype: torch.dtype
) -> MqtLlavaForConditionalGeneration:
    """The parts in one model. Their weights are taken over, not copied; the query transformer is new."""
    with torch.device("meta"):
        model = MqtLlavaForConditionalGeneration(config)
    cut_above_selected_layer(tower, config)
    model.model.vision_tower, model.config.vision_config = tower, tower.config
    model.model.language_model, model.config.text_config = language, language.config
    model.lm_head = head
    output_size = language.get_input_embeddings().weight.shape[1]
    model.model.query_transformer = MqtLlavaQueryTransformer(config, output_size)
    init_query_transformer(model.model.query_transformer)
    model.tie_weights()
    return model.to(dtype).eval()


def make_processor(
    config: MqtLlavaConfig, tokenizer: PreTrainedTokenizerBase, image_settings: dict[str, Any], chat_template: str
) -> MqtLlavaProcessor:
    """The processor of a new model: pictures padded to a square, as in the second stage of training."""
    size = config.vision_config.image_size
    mean, std = MEAN_AND_STD.get(config.vision_config.model_type, IMAGENET_MEAN_AND_STD)
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        **{"image_mean": mean, "image_std": std, **image_settings},
    )
    return MqtLlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template={"default": chat_template, "plain": PLAIN_CHAT_TEMPLATE},
        max_visual_tokens=config.max_visual_tokens,
    )


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, with the token ids of the language model."""
    saved = model.generation_config
    eos = saved.eos_token_id if saved.eos_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)


def upcycle(source: str | Path, destination: str | Path, *, max_visual_tokens: int = 256, seed: int = 0) -> Path:
    """
    Writes a model with the tower and the tuned language model of a LLaVA, and a query transformer that starts from
    what LLaVA's projector does (see [`init_from_projector`]). It is ready to be trained, not to answer.

    Args:
        source: folder or Hub id of a LLaVA in Transformers' layout (`model_type: llava`).
        destination: folder to write, which must not hold anything yet.
        max_visual_tokens: M, a perfect square.
        seed: of the weights that are drawn.

    Raises:
        ValueError: if `source` is no LLaVA, or `destination` is not empty.
    """
    llava_config = AutoConfig.from_pretrained(source)
    if llava_config.model_type != "llava":
        raise ValueError(f"`source` must be a LLaVA (model type 'llava'), got {llava_config.model_type!r}.")
    with folder_in_the_making(destination) as folder:
        torch.manual_seed(seed)
        llava, loading_info = LlavaForConditionalGeneration.from_pretrained(source, output_loading_info=True)
        if loading_info["missing_keys"]:
            raise ValueError(f"`source` lacks weights: {', '.join(sorted(loading_info['missing_keys']))}.")
        tokenizer = AutoTokenizer.from_pretrained(source)
        prepare_tokenizer(tokenizer)
        config = _upcycled_config(llava.config, tokenizer, max_visual_tokens)
        model = assemble(config, llava.model.vision_tower, llava.model.language_model, llava.lm_head, llava.dtype)
        init_from_projector(model.model.query_transformer, llava.model.multi_modal_projector)
        model.generation_config = _generation_config(llava, tokenizer)
        model.save_pretrained(folder)
        image_settings = _image_settings(str(source))
        make_processor(config, tokenizer, image_settings, VICUNA_V1_CHAT_TEMPLATE).save_pretrained(folder)
    return Path(destination)


def _upcycled_config(llava_config, tokenizer: PreTrainedTokenizerBase, max_visual_tokens: int) -> MqtLlavaConfig:
    return MqtLlavaConfig(
        vision_config=llava_config.vision_config.to_dict(),
        text_config=llava_config.text_config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        max_visual_tokens=max_visual_tokens,
        query_num_attention_heads=_query_heads(llava_config.vision_config),
        vision_feature_layer=llava_config.vision_feature_layer,
        vision_feature_select_strategy=llava_config.vision_feature_select_strategy,
        query_init="local",
    )


@torch.no_grad()
def init_from_projector(query_transformer: MqtLlavaQueryTransformer, projector: nn.Module) -> None:
    """
    A start near what the language model knows: each query reads its own place (`query_init="local"`), features pass
    through unchanged, and the last matrix is the linear map closest to LLaVA's projector, by least squares over normal
    features of unit size, which is what the layer norm before it lets through.

    Args:
        query_transformer: changed in place.
        projector: maps `(..., C)` features to `(..., D)` embeddings.
    """
    attn, width = query_transformer.attn, query_transformer.width
    for linear in (attn.v_proj, attn.out_proj):
        linear.weight.copy_(torch.eye(width))
        linear.bias.zero_()
    parameter = next(projector.parameters())
    features = torch.randn(8 * width, width).to(parameter.device, parameter.dtype)
    wanted = projector(features).float()
    # With a constant beside the features, so that the projector's mean does not distort the map; it has no place here.
    constant = torch.ones(len(features), 1, device=features.device)
    solution = torch.linalg.lstsq(torch.cat([features.float(), constant], dim=1), wanted).solution
    query_transformer.proj.copy_(solution[:width])
