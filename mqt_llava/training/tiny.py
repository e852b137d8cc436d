"""A toy: a model of a few hundred thousand parameters and pictures of one coloured shape, made without a download."""

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ..configuration_mqt_llava import MqtLlavaConfig
from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from ..processing_mqt_llava import MqtLlavaProcessor


SIZE, MAX_VISUAL_TOKENS = 24, 16
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square")


def tiny_model_and_processor():
    """A new model with weights from torch's generator, and its processor."""
    processor = tiny_processor()
    config = MqtLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": 4,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_index=processor.image_token_id,
        max_visual_tokens=MAX_VISUAL_TOKENS,
        query_num_attention_heads=4,
        query_init="local",
    )
    return MqtLlavaForConditionalGeneration(config), processor


def tiny_processor() -> MqtLlavaProcessor:
    """Every byte is a token."""
    vocab = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_pad=True
    )
    return MqtLlavaProcessor(image_processor, fast, max_visual_tokens=MAX_VISUAL_TOKENS)


class TinyRecords:
    """
    Conversations about pictures that are drawn when asked for; one record in eight is text alone.

    Args:
        number (`int`): of records.
        seed (`int`): other seeds give other pictures.
    """

    def __init__(self, number: int = 512, seed: int = 0):
        self.number, self.seed = number, seed

    def __len__(self) -> int:
        return self.number

    def __iter__(self):
        return (self[position] for position in range(self.number))

    def __getitem__(self, position: int) -> dict:
        generator = np.random.default_rng([self.seed, position])
        colour, shape = str(generator.choice(list(COLOURS))), str(generator.choice(SHAPES))
        if position % 8 == 7:
            return record(f"Say {colour}.", colour, [])
        question, answer = [("What colour?", colour), ("Which shape?", shape)][position % 2]
        return record(question, answer, [draw_shape(generator, colour, shape)])


def record(question: str, answer: str, images: list) -> dict:
    """One question and its answer, after a system message that is shorter than Vicuna's."""
    return {
        "messages": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "images": images,
    }


def draw_shape(generator: np.random.Generator, colour: str, shape: str) -> Image.Image:
    """One shape somewhere on a dark square."""
    image = Image.new("RGB", (SIZE, SIZE), (20, 20, 20))
    left, top = (int(value) for value in generator.integers(0, SIZE // 2, 2))
    box = (left, top, left + SIZE // 2 - 1, top + SIZE // 2 - 1)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
    return image
