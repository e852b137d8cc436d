"""Images and text in, tensors out: each `<image>` of a prompt becomes as many placeholders as it has visual tokens."""

import numpy as np
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_mqt_llava import LARGEST_MAX_VISUAL_TOKENS, check_num_visual_tokens, installed, released_config


# The conversation format that released checkpoints were tuned on (`conv_vicuna_v1` in `conversation.py` of the authors'
# code): an optional system message, then turns. The text of an answer and its end token are marked for the loss.
VICUNA_V1_CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
{{ text_of(messages[0]) }}{{ ' ' }}
{%- else -%}
{{ "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ 'USER: ' }}{{ text_of(message) }}{{ ' ' }}
{%- elif message.role == 'assistant' -%}
{{ 'ASSISTANT:' }}{% generation %}{{ ' ' }}{{ text_of(message) }}{{ eos_token }}{% endgeneration %}
{%- elif not loop.first or message.role != 'system' -%}
{{ raise_exception('Roles must be user or assistant, with one system message at the start; got ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

# What the first training stage sees (`preprocess_plain` in `train/train.py` of the authors' code): an image and its
# caption. What the user asked is left out.
PLAIN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' and message.content is string -%}
{{ '<image>' }}
{%- elif message.role == 'user' -%}
{%- for part in message.content if part.type == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- elif message.role == 'assistant' -%}
{%- generation -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{{ '\\n' }}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""


class MqtLlavaImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Image arguments of [`MqtLlavaProcessor`]: those of the image processor, and the budget."""

    num_visual_tokens: int | list[int] | None


class MqtLlavaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of [`MqtLlavaProcessor`], by modality."""

    images_kwargs: MqtLlavaImagesKwargs


class MqtLlavaProcessor(ProcessorMixin):
    r"""
    A CLIP-style image processor and a tokenizer in one.

    `processor(images=..., text=..., num_visual_tokens=m)` returns `input_ids` and `attention_mask` with m placeholders
    for each `<image>`, `pixel_values` of shape `(num_images, 3, H, W)` and `visual_token_counts` of shape
    `(num_images,)`. `num_visual_tokens` is a number for all images or a list with one per image, in flat order over the
    batch. The same goes through `apply_chat_template(..., processor_kwargs={"num_visual_tokens": m})`.

    Args:
        image_processor ([`LlavaImageProcessor`]): with `do_pad`, an image is put on a square of the mean colour.
        tokenizer ([`PreTrainedTokenizerBase`]): must know `image_token`.
        chat_template (`str`, *optional*): defaults to the tokenizer's, else to Vicuna-v1.
        image_token (`str`, *optional*, defaults to `"<image>"`): the placeholder.
        max_visual_tokens (`int`, *optional*, defaults to 256): M of the checkpoint.
        num_visual_tokens (`int`, *optional*, defaults to `max_visual_tokens`): the budget when a call names none.

    Raises:
        ValueError: if the tokenizer lacks `image_token`, or a budget is not between 1 and M.
    """

    valid_processor_kwargs = MqtLlavaProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        max_visual_tokens=256,
        num_visual_tokens=None,
        **kwargs,
    ):
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` must know the image token {self.image_token!r}. Add it with "
                f"`tokenizer.add_tokens([{self.image_token!r}], special_tokens=True)`."
            )
        if isinstance(max_visual_tokens, bool) or not 1 <= max_visual_tokens <= LARGEST_MAX_VISUAL_TOKENS:
            raise ValueError(
                f"`max_visual_tokens` must be between 1 and {LARGEST_MAX_VISUAL_TOKENS}, got {max_visual_tokens}."
            )
        if num_visual_tokens is not None:
            check_num_visual_tokens(num_visual_tokens, 1, max_visual_tokens)
        self.max_visual_tokens = max_visual_tokens
        self.num_visual_tokens = num_visual_tokens
        chat_template = chat_template or getattr(tokenizer, "chat_template", None) or VICUNA_V1_CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes; ids first, because samplers by length measure the first."""
        return [*self.tokenizer.model_input_names, "pixel_values", "visual_token_counts"]

    def validate_inputs(self, images: ImageInput | None = None, text=None, **kwargs) -> None:
        """Upstream compares the totals of a batch; images given as a list per prompt are compared prompt by prompt."""
        super().validate_inputs(images=images, text=text, **kwargs)
        if not isinstance(images, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in images):
            return
        in_text = [prompt.count(self.image_token) for prompt in text or []]
        given = [len(group) for group in images]
        if text is not None and in_text != given:
            raise ValueError(
                f"`images` must have one list per prompt with an image for each {self.image_token}, got {given} images "
                f"for prompts with {in_text}."
            )

    def _process_images(self, images: ImageInput, num_visual_tokens=None, **kwargs) -> tuple[BatchFeature, list[str]]:
        """Pixels and counts, and the placeholders that stand for each image."""
        images = [upright_rgb(image) for image in make_flat_list_of_images(images)]
        counts = self._counts(num_visual_tokens, len(images))
        if all(isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == 3 for image in images):
            kwargs.setdefault("input_data_format", "channels_last")  # cannot be told from the shape of a tiny image
        processed = self.image_processor(images, **kwargs)
        processed["visual_token_counts"] = counts
        return processed, [self.image_token * count for count in counts]

    def _counts(self, num_visual_tokens: int | list[int] | None, num_images: int) -> list[int]:
        """The budget of each image: from the call, else the processor's own, else M."""
        for default in (self.num_visual_tokens, self.max_visual_tokens):
            num_visual_tokens = default if num_visual_tokens is None else num_visual_tokens
        return check_num_visual_tokens(num_visual_tokens, num_images, self.max_visual_tokens)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, vision_tower=None, **kwargs):
        """
        [`~transformers.ProcessorMixin.from_pretrained`], which also reads checkpoints of the authors' code.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub id, in this project's layout or the authors'.
            vision_tower (`str`, *optional*): as for the model's `from_pretrained`.
            kwargs: everything else that `from_pretrained` takes.
        """
        if released_config(pretrained_model_name_or_path, kwargs) is None:
            if vision_tower is not None:
                raise ValueError("`vision_tower` is for checkpoints of the authors' code; this one has its own tower.")
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        foreign = installed("conversion.load")
        return foreign.load_released_processor(pretrained_model_name_or_path, vision_tower, **kwargs)

    def push_to_hub(self, repo_id: str, *, include_code: bool = False, **kwargs) -> str:
        """As the model's `push_to_hub`, for the processor alone."""
        return installed("hub").push_to_hub([self], repo_id, include_code=include_code, **kwargs)

    def get_text_with_replacements(self, text, images_replacements=(), *args, **kwargs):
        """
        Texts with their placeholders, and where these are. Sentencepiece tokenizers (Llama's) put a space in front of a
        text; released checkpoints were trained with the text after an image as a text of its own. Where the tokenizer
        would not do so by itself, the space is put in here, and marked in the offsets.
        """
        text, offsets = super().get_text_with_replacements(text, list(images_replacements), *args, **kwargs)
        scheme = metaspace_scheme(self.tokenizer)
        if scheme in ("first", "always"):
            for row, (prompt, replaced) in enumerate(zip(text, offsets)):
                text[row] = self._with_leading_spaces(prompt, replaced, scheme)
        return text, offsets

    def _with_leading_spaces(self, prompt: str, replaced: list[dict], scheme: str) -> str:
        """The prompt with a space where a piece of text begins and the tokenizer adds none; `replaced` moves along."""
        no_text = (self.image_token, *self.tokenizer.all_special_tokens)
        pieces, last = [], 0
        starts = [(0, None), *((offset["new_span"][1], offset) for offset in replaced)]
        shifts = 0
        for start, offset in starts:
            if offset is not None:
                offset["new_span"] = tuple(place + shifts for place in offset["new_span"])
            pieces.append(prompt[last:start])
            last = start
            by_itself = offset is None or scheme == "always"  # but not before another space
            begins_text = start < len(prompt) and not prompt.startswith(no_text, start)
            if begins_text and (not by_itself or prompt[start] in " \u2581"):
                pieces.append(" ")
                shifts += 1
                if offset is None:
                    replaced.insert(0, {"type": "text", "span": (0, 0), "new_span": (0, 1), "replacement": " "})
                else:
                    offset["space_after"] = True
        return "".join([*pieces, prompt[last:]])

    def _adjust_assistant_masks_indices(self, processed_dict, generation_indices):
        """An answer right after an image owns the space between the two, as any other token of its text."""
        for offsets in processed_dict.get("text_replacement_offsets") or []:
            for place, offset in reversed(list(enumerate(offsets))):
                if offset.get("space_after"):
                    end, new_end = offset["span"][1], offset["new_span"][1]
                    offsets.insert(place + 1, {"span": (end, end + 1), "new_span": (new_end, new_end + 2)})
        return super()._adjust_assistant_masks_indices(processed_dict, generation_indices)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Placeholders and tiles per image, for serving engines: the budget, whatever the size."""
        if image_sizes is None:
            return MultiModalData()
        num_visual_tokens = self._merge_kwargs(**kwargs)["images_kwargs"].get("num_visual_tokens")
        return MultiModalData(
            num_image_tokens=self._counts(num_visual_tokens, len(image_sizes)),
            num_image_patches=[1] * len(image_sizes),
        )


def metaspace_scheme(tokenizer) -> str | None:
    """
    When a sentencepiece-like tokenizer puts a space in front of text: `"first"` (at the start of a prompt), `"always"`
    (after special tokens too), `"never"`; `None` for other tokenizers, and those whose normalizer does it.
    """
    pre_tokenizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    return getattr(pre_tokenizer, "prepend_scheme", None)


def upright_rgb(image):
    """
    A PIL image as `(H, W, 3)` bytes, turned as its EXIF tag says; anything else as it came.

    Transparency is dropped as in the authors' `convert("RGB")`. 16-bit greys are scaled to 8 bits, which a plain
    conversion would clip to white.

    Raises:
        ValueError: for modes that have no fixed range (32 bits a pixel) or that Pillow cannot convert.
    """
    if not isinstance(image, Image.Image):
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8))
    try:
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel have no fixed range")
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise ValueError(
            f"`images` must be convertible to RGB, got mode {image.mode!r} ({error}). Scale the image to 0-255 and "
            "convert it to 'L' or 'RGB'."
        ) from error


__all__ = ["MqtLlavaProcessor"]
