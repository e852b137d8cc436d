"""The tiny model and its processor, built from the public classes. Its sizes stand here and nowhere else."""

from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ..configuration_mqt_llava import MqtLlavaConfig
from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration, sincos_position_table
from ..processing_mqt_llava import MqtLlavaProcessor
from .scenes import IMAGE_SIZE
from .vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, IMAGE_TOKEN_ID, PAD_TOKEN_ID, SPECIAL_TOKENS, WORDS, build_tokenizer


MAX_VISUAL_TOKENS = 16
WIDTH = 128
PATCH_SIZE = 8

# Both at their usual 0.02 a model this narrow spends most of its few steps on growing its weights.
VISION_INITIALIZER_RANGE = 0.15
TEXT_INITIALIZER_RANGE = 0.06

# The tower's learned positions start as a sine table of this height. Values carry no positions of their own, so what
# the tower says about places is all that the language model gets to know about them.
VISION_POSITION_SCALE = 0.5


def build_config() -> MqtLlavaConfig:
    """0.7 million parameters: a CLIP tower of 64 patches, 16 queries, a Llama of two layers."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
        initializer_range=VISION_INITIALIZER_RANGE,
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=TEXT_INITIALIZER_RANGE,
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
    )
    return MqtLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        max_visual_tokens=MAX_VISUAL_TOKENS,
        query_num_attention_heads=4,
        vision_feature_layer=-1,
        query_init="local",
    )


def build_model() -> MqtLlavaForConditionalGeneration:
    """A new model, its starting values drawn from torch's global generator."""
    model = MqtLlavaForConditionalGeneration(build_config())
    positions = model.model.vision_tower.embeddings.position_embedding.weight  # (1 + N, C), the CLS token first
    positions.data[1:] = VISION_POSITION_SCALE * sincos_position_table(IMAGE_SIZE // PATCH_SIZE, WIDTH)
    return model


def build_processor() -> MqtLlavaProcessor:
    """Words to ids; any picture to 64 x 64 pixels between -1 and 1."""
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return MqtLlavaProcessor(
        image_processor=image_processor, tokenizer=build_tokenizer(), max_visual_tokens=MAX_VISUAL_TOKENS
    )
