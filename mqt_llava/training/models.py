"""
Which model is trained and which of its parts learn: loaded, or new from a tower and a language model; in full, with
adapters, or with adapters on quantized weights.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, set_seed
from transformers.integrations import deepspeed

from ..modeling_mqt_llava import MODULES_NOT_TO_QUANTIZE, MqtLlavaForConditionalGeneration
from ..processing_mqt_llava import MqtLlavaProcessor
from .arguments import PARTS
from .checkpoints import wait_for_all
from .recipe import STAGES, ModelArguments


TINY = "builtin:tiny"
BASE = "base"
"""Folder inside a run's with the model that its adapters belong to, when that model was made in the same run."""


def load_model_and_processor(arguments: ModelArguments, output_dir: str, seed: int):
    """
    The model, its parts frozen or not as the recipe says, and its processor.

    A new model that gets adapters is saved in `output_dir/base` first, since adapters name the model they belong to,
    and then loaded from there like any other.
    """
    set_seed(seed)
    if arguments.lora and is_new(arguments):
        base = os.path.join(output_dir, BASE)
        missing = not os.path.isfile(os.path.join(base, "config.json"))
        wait_for_all()  # no rank looks after another has saved
        if missing:
            model, processor = make(arguments)
            save_base(model, processor, base)
        arguments = replace(arguments, model_name_or_path=base, language_model=None, vision_tower=None)
    model, processor = make(arguments)
    if arguments.lora:
        set_seed(seed)  # new adapters start the same however the model was loaded
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

        with not_sharded_yet():
            return tiny_model_and_processor()
    if arguments.language_model is not None:
        with not_sharded_yet():
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
    from ..conversion.components import from_components

    heads = arguments.query_num_attention_heads
    config: dict[str, Any] = {} if heads is None else {"query_num_attention_heads": heads}
    return from_components(
        arguments.vision_tower,
        arguments.language_model,
        max_visual_tokens=arguments.max_visual_tokens,
        dtype=getattr(torch, arguments.dtype),
        query_init=arguments.query_init,
        vision_feature_layer=arguments.vision_feature_layer,
        **config,
    )


@contextmanager
def not_sharded_yet() -> Iterator[None]:
    """
    Under ZeRO-3, Transformers shards each model as it is made. One that is put together from parts, or whose weights
    are drawn, is made whole in here; DeepSpeed shards it when the Trainer hands it over.
    """
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


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
    """Saves a new model for the adapters to name. The folder has its name once it is whole."""
    from accelerate import PartialState

    state = PartialState()
    if state.is_main_process:
        staged = f"{folder}.incomplete"
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        os.replace(staged, folder)
    state.wait_for_everyone()
