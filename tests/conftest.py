"""Tiny models, tokenizers and images, built in code. Every test starts from the same seed."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small lose more by waiting for threads than they gain

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration, MqtLlavaProcessor


IMAGE_SIZE, MAX_VISUAL_TOKENS = 24, 16
TEXT = "what is in the picture a red green blue square circle how many USER: ASSISTANT: and this that one two"
WORDS = TEXT.split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]


@pytest.fixture(autouse=True)
def seed():
    transformers.set_seed(0)


def vision_config(**changes):
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        **changes,
    }


def text_config(model_type="llama", **changes):
    return {
        "model_type": model_type,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": len(SPECIAL) + len(WORDS),
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def tiny_config(**changes):
    config = {
        "vision_config": vision_config(),
        "text_config": text_config(),
        "image_token_index": SPECIAL.index("<image>"),
        "max_visual_tokens": MAX_VISUAL_TOKENS,
        "query_num_attention_heads": 4,
    }
    return MqtLlavaConfig(**{**config, **changes})


def sharpen(model):
    """
    Random weights so large that every part shows in the output: with the usual 0.02 all pictures look the same to the
    language model, and a test of pictures would compare nothing.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.5 if "embed" in name or "query" in name else 0.25)
    return model


def tiny_model(**changes):
    return sharpen(MqtLlavaForConditionalGeneration(tiny_config(**changes))).eval()


def tiny_tokenizer():
    vocab = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def tiny_processor(**changes):
    return MqtLlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            do_pad=True,
        ),
        tokenizer=tiny_tokenizer(),
        **{"max_visual_tokens": MAX_VISUAL_TOKENS, **changes},
    )


def picture(seed=0, size=(IMAGE_SIZE, IMAGE_SIZE), mode="RGB"):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def processor():
    return tiny_processor()
