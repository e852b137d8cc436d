"""
Which model is trained and which of its parts learn: loaded, or new from a tower and a language model; in full, with
adapters, or with adapters on quantized weights.
"""

import importlib.util
import os
from dataclasses import replace

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    set_seed,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ..configuration_mqt_llava import MqtLlavaConfig
from ..modeling_mqt_llava import MODULES_NOT_TO_QUANTIZE, MqtLlavaForConditionalGeneration
from ..processing_mqt_llava import MqtLlavaProcessor
from .arguments import PARTS
from .recipe import STAGES, ModelArguments


TINY = "builtin:tiny"
BASE = "base"
"""Folder inside a run's with the model that its adapters belong to, when that model was made in the same run."""


def load_model_and_processor(arguments: ModelArguments, output_dir: str, seed: int):
    """
    The model, its parts frozen or not as the recipe says, and its processor.

    A new model that gets adapters is saved in `output_dir/base` first, since adapters name the model they belong to.
    """
    set_seed(seed)
    base = os.path.join(output_dir, BASE)
    if os.path.isfile(os.path.join(base, "config.json")) and arguments.lora and is_new(arguments):
        arguments = replace(arguments, model_name_or_path=base, language_model=None, vision_tower=None)
    model, processor = make(arguments)
    if arguments.lora:
        if is_new(arguments):
            save_base(model, processor, base)
        return add_adapters(model, arguments), processor
    freeze_all_but(model, trainable_parts(arguments))
    return model, processor


def is_new(arguments: ModelArguments) -> bool:
    """Whether the model is made in this run, rather than loaded."""
    return arguments.language_model is not None or arguments.model_name_or_path == TINY


def make(arguments: ModelArguments):
    """Model and processor, everything as loaded or new."""
    if arguments.model_name_or_path == TINY:
        from .tiny import tiny_model_and_processor

        return tiny_model_and_processor()
    if arguments.language_model is not None:
        return new_from_parts(arguments)
    processor = MqtLlavaProcessor.from_pretrained(arguments.model_name_or_path)
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.quantization:
        options["quantization_config"] = quantization_config(arguments)
    model = MqtLlavaForConditionalGeneration.from_pretrained(
        arguments.model_name_or_path, dtype=getattr(torch, arguments.dtype), **options
    )
    return model, processor


def new_from_parts(arguments: ModelArguments):
    """A pretrained tower and language model, with a new query transformer between them."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.language_model)
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    processor = MqtLlavaProcessor(
        AutoImageProcessor.from_pretrained(arguments.vision_tower),
        tokenizer,
        max_visual_tokens=arguments.max_visual_tokens,
    )
    dtype = getattr(torch, arguments.dtype)
    language_model = AutoModelForCausalLM.from_pretrained(arguments.language_model, dtype=dtype)
    tower = AutoModel.from_pretrained(arguments.vision_tower, dtype=dtype)
    tower = getattr(tower, "vision_model", tower)
    config = new_config(arguments, processor, language_model.config)
    model = MqtLlavaForConditionalGeneration(config).to(dtype)
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    missing = model.model.vision_tower.load_state_dict(tower.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(
            f"`vision_tower` {arguments.vision_tower!r} lacks the weights {missing[:3]}. Name another tower."
        )
    model.generation_config = language_model.generation_config
    return model, processor


def image_processor_for(vision_tower: str) -> LlavaImageProcessorPil:
    """Pixels as the tower wants them, from an image padded to a square (or, without `do_pad`, cut to one)."""
    own = AutoImageProcessor.from_pretrained(vision_tower)
    size = getattr(own, "crop_size", None) or own.size
    side = size["height"] if "height" in size else size["shortest_edge"]
    return LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=own.image_mean,
        image_std=own.image_std,
        resample=own.resample,
        do_pad=True,
    )


def new_config(arguments: ModelArguments, processor: MqtLlavaProcessor, text_config) -> MqtLlavaConfig:
    """What the new model is, from its two parts."""
    vision_config = AutoConfig.from_pretrained(arguments.vision_tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    heads = arguments.query_num_attention_heads
    with_cls = not vision_config.model_type.startswith("siglip")
    return MqtLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=processor.image_token_id,
        max_visual_tokens=arguments.max_visual_tokens,
        query_num_attention_heads=vision_config.hidden_size // 64 if heads is None else heads,
        query_init=arguments.query_init,
        vision_feature_layer=arguments.vision_feature_layer,
        vision_feature_select_strategy="default" if with_cls else "full",
    )


# ---- which parts learn ----


def trainable_parts(arguments: ModelArguments) -> tuple[str, ...]:
    """
    The parts of the stage, or those that the recipe names.

    Raises:
        ValueError: for a part that there is not.
    """
    parts = tuple(arguments.trainable) if arguments.trainable is not None else STAGES[arguments.stage]
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"`trainable` must name parts among {', '.join(PARTS)}, got {part!r}.")
    return parts


def freeze_all_but(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Only these parts learn; the head with the language model."""
    for name, parameter in model.named_parameters():
        learns = any(f"{part}." in name for part in parts) or ("lm_head" in name and "language_model" in parts)
        parameter.requires_grad_(learns and parameter.is_floating_point())


# ---- adapters ----


def add_adapters(model: MqtLlavaForConditionalGeneration, arguments: ModelArguments):
    """LoRA on every linear layer of the language model; other parts that learn do so in full, inside the adapter."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    parts = trainable_parts(arguments)
    if "language_model" not in parts:
        raise ValueError("`lora` needs the language model among the parts that learn. Use `stage: finetune`.")
    if arguments.quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=linear_layers_of(model.model.language_model, "model.language_model"),
        modules_to_save=[part for part in parts if part != "language_model"] or None,
    )
    return get_peft_model(model, config)


def linear_layers_of(module: nn.Module, prefix: str) -> list[str]:
    """Full names of the linear layers inside a part. (`all-linear` would reach the tower and the query transformer.)"""
    return [f"{prefix}.{name}" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def quantization_config(arguments: ModelArguments) -> BitsAndBytesConfig:
    """
    4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314) or 8-bit, of the language model alone.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("`quantization` needs bitsandbytes. Install it with `pip install 'mqt-llava[qlora]'`.")
    if arguments.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=MODULES_NOT_TO_QUANTIZE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=MODULES_NOT_TO_QUANTIZE,
    )


def save_base(model, processor, folder: str) -> None:
    """Saves a new model for the adapters to name; `config.json` comes last, so a folder with one is whole."""
    from accelerate import PartialState

    state = PartialState()
    if state.is_main_process:
        staged = f"{folder}.incomplete"
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        os.replace(staged, folder) if not os.path.isdir(folder) else None
    state.wait_for_everyone()
    model.name_or_path = folder
    model.config._name_or_path = folder
