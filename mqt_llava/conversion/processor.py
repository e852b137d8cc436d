"""The processor of a checkpoint of the authors' code: the same tokens for the same text, the same pixels."""

from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from ..processing_mqt_llava import PLAIN_CHAT_TEMPLATE, VICUNA_V1_CHAT_TEMPLATE, MqtLlavaProcessor
from .files import read_json
from .released import default_budget
from .sources import Source


IMAGE_TOKEN = "<image>"


def build_processor(source: Source, *, legacy: bool | None = None, **changes: Any) -> MqtLlavaProcessor:
    """
    Tokenizer, image processor and chat templates (Vicuna-v1 by default, and `"plain"`) of a checkpoint.

    Args:
        source: the checkpoint.
        legacy (*optional*): see [`released_tokenizer`].
        changes: arguments of [`MqtLlavaProcessor`] that win over the checkpoint's.

    Raises:
        ValueError: if the tokenizer is missing.
    """
    parts = {
        "image_processor": released_image_processor(source),
        "tokenizer": released_tokenizer(source.tokenizer_folder, source.config.image_token_id, legacy),
        "chat_template": {"default": VICUNA_V1_CHAT_TEMPLATE, "plain": PLAIN_CHAT_TEMPLATE},
        "max_visual_tokens": source.config.max_visual_tokens,
        "num_visual_tokens": default_budget(source.released, source.config.max_visual_tokens),
    }
    return MqtLlavaProcessor(**{**parts, **changes})


def released_image_processor(source: Source) -> LlavaImageProcessorPil:
    """Pillow's own resizing, as in the authors' code; sizes and colours from the tower's folder where there is one."""
    size = source.config.vision_config.image_size
    settings = {}
    if source.vision_folder is not None and (source.vision_folder / "preprocessor_config.json").is_file():
        saved = read_json(source.vision_folder / "preprocessor_config.json")
        settings = {name: saved[name] for name in ("image_mean", "image_std", "resample") if name in saved}
    return LlavaImageProcessorPil(
        do_pad=source.released.get("image_aspect_ratio") == "pad",
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        **settings,
    )


def released_tokenizer(folder: Path, image_token_id: int, legacy: bool | None = None) -> PreTrainedTokenizerBase:
    """
    The sentencepiece tokenizer of a folder, with `<image>` as its next token.

    Args:
        folder (`Path`): with `tokenizer.model`, or with `tokenizer.json`.
        image_token_id (`int`): the id that `<image>` must get.
        legacy (`bool`, *optional*): whether text after a special token starts like new text. Defaults to what the
            folder says; where it says nothing, to `True`, as in the authors' version of Transformers.

    Raises:
        ValueError: if there is no tokenizer, or it has more tokens than the model.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise ValueError(f"`{folder}` must hold the tokenizer (tokenizer.model), but does not.")
    if not (folder / "tokenizer.json").is_file() and not (is_sentencepiece_available() and is_protobuf_available()):
        raise ValueError(
            f"`{folder}` has a tokenizer.model, which needs two packages: pip install sentencepiece protobuf"
        )
    saved = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    legacy = saved.get("legacy") if legacy is None else legacy
    llama = LlamaTokenizer.from_pretrained(folder, legacy=legacy is not False)
    tokenizer = frozen_tokenizer(llama, legacy=legacy is not False)
    add_image_token(tokenizer, image_token_id)
    return tokenizer


def frozen_tokenizer(llama: LlamaTokenizer, legacy: bool) -> PreTrainedTokenizerFast:
    """
    The same tokenizer as one that is loaded back exactly as saved. With `legacy`, sentencepiece puts its space in
    front of every piece of text between special tokens, whatever the piece starts with; Llama's own class leaves it
    out before a space.
    """
    backend = llama.backend_tokenizer
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=llama.model_max_length,
        padding_side="left",  # prompts of different lengths end at the same place, where generation goes on
        **{name: getattr(llama, name) for name in names if getattr(llama, name) is not None},
    )


def add_image_token(tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> None:
    """
    Gives `<image>` the id that the model knows.

    Raises:
        ValueError: if another token has this id, or ids below it are free.
    """
    known = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if known is None:
        fill = [f"<unused_{number}>" for number in range(len(tokenizer), image_token_id)]
        tokenizer.add_tokens([*fill, IMAGE_TOKEN], special_tokens=True)
        known = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if known != image_token_id:
        raise ValueError(
            f"`{IMAGE_TOKEN}` must be token {image_token_id}, the first after the model's vocabulary, but the "
            f"tokenizer gives it {known}. Use the tokenizer that the checkpoint was trained with."
        )
