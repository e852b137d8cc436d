"""
MQT-LLaVA: pixels and token ids in, logits out; `generate(num_visual_tokens=m)` at any budget.

Axes: B prompts, S prompt length, I images, N patches (24 * 24 = 576), M learned queries (256), m <= M tokens kept of
an image, C vision width (1024), D language width (4096). Numbers in brackets are those of the released 7B model.
"""

import copy
import functools
import glob
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_compiling

from .configuration_mqt_llava import MqtLlavaConfig, check_num_visual_tokens, installed, released_config


# Scale of the shared orthogonal start of the query and key projections under `query_init="local"`: sharp enough that a
# query reads its own place and little else.
LOCAL_INIT_SCALE = 6.0

# Give these to a quantization config (`llm_int8_skip_modules` of bitsandbytes, `modules_to_not_convert` elsewhere):
# the query transformer holds bare parameters beside its linear layers, and the tower is small beside the language
# model.
MODULES_NOT_TO_QUANTIZE = [
    "vision_tower",
    "query_transformer",
    "model.vision_tower",
    "model.query_transformer",
    "lm_head",
]

# Parts of a vision tower that come after its layers. No hidden state passes through them, so they are taken out.
PARTS_ABOVE_THE_LAYERS = ("post_layernorm", "layernorm", "norm", "head", "pooler")


# ---------------------------------------------------------------------------------------------------------------------
# The query transformer
# ---------------------------------------------------------------------------------------------------------------------


def sincos_position_table(side: int, width: int) -> torch.Tensor:
    """
    `(side * side, width)` fixed positions of a square grid: the first half of the width for the column, the second for
    the row, each as sines then cosines (`get_2d_sincos_pos_embed` of MAE, which puts the w axis first).
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()  # (side * side, width)


def coarse_to_fine_cells(side: int) -> torch.Tensor:
    """
    The cells of a `side x side` grid in the order of the Bayer matrix: every prefix of the order covers the whole grid
    about evenly. Sides that are no power of two take the order of the next one and leave out what falls outside.
    """
    bits = max(side - 1, 1).bit_length()

    def bayer_rank(cell: int) -> int:
        row, column = divmod(cell, side)
        rank = 0
        for bit in range(bits):  # the lowest bits of the place decide first
            rank = rank << 2 | ((row ^ column) >> bit & 1) << 1 | (row >> bit & 1)
        return rank

    return torch.tensor(sorted(range(side * side), key=bayer_rank))


class MqtLlavaQueryTransformer(nn.Module):
    """
    Reads an image into M visual tokens: M learned queries, one cross-attention over the patches.

    Keys are positions only and values are features only, as in the released checkpoints (`Resampler` in
    `multimodal_projector/builder.py` of the authors' code). So the attention map is the same for every image, it
    explains nothing about one, and everything up to the keys is computed once per call, not per image. Queries never
    see each other: the first m of M outputs are the outputs for m.
    """

    def __init__(self, config: MqtLlavaConfig, output_size: int):
        super().__init__()
        self.config = config
        self.side = math.isqrt(config.max_visual_tokens)
        self.width = config.vision_config.hidden_size
        self.query = nn.Parameter(torch.empty(config.max_visual_tokens, self.width))
        # Saved with the weights: released checkpoints hold a table rounded to half precision, and must keep it.
        self.register_buffer("pos_embed", torch.empty(config.max_visual_tokens, self.width))
        self.ln_q = nn.LayerNorm(self.width, eps=1e-6)
        self.ln_k = nn.LayerNorm(self.width, eps=1e-6)
        self.ln_v = nn.LayerNorm(self.width, eps=1e-6)
        self.attn = MqtLlavaCrossAttention(config)
        self.proj = nn.Parameter(torch.empty(self.width, output_size))

    def fresh_pos_embed(self) -> torch.Tensor:
        """`(M, C)` table of a new model, rounded to half as the authors' is."""
        return sincos_position_table(self.side, self.width).half().float()

    def patch_positions(self, num_patches: int) -> torch.Tensor:
        """`(N, C)`: the position table stretched from the queries' grid to the patches'."""
        patch_side = math.isqrt(num_patches)
        if patch_side**2 != num_patches:
            raise ValueError(
                f"`pixel_values` must give a square grid of patches, got {num_patches} patches. Use square images; if "
                "the vision tower has no CLS token, set `vision_feature_select_strategy='full'`."
            )
        grid = self.pos_embed.float().view(1, self.side, self.side, self.width).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(patch_side, patch_side), mode="bicubic", align_corners=False)
        return grid[0].flatten(1).T.to(self.query.dtype)  # (N, C)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        `(I, N, C)` patch features to `(I, M, D)` visual tokens. A budget m is a slice of the result: computing fewer
        queries would save nothing that matters and change the last bits.
        """
        features = features.to(self.query.dtype)
        queries = self.ln_q(self.query + self.pos_embed.to(self.query.dtype))  # (M, C)
        keys = self.ln_k(self.patch_positions(features.shape[1]))  # (N, C)
        values = self.ln_v(features)  # (I, N, C)
        return self.attn(queries, keys, values) @ self.proj  # (I, M, D)


class MqtLlavaCrossAttention(nn.Module):
    """Multi-head attention whose queries and keys are shared by all images."""

    is_causal = False

    def __init__(self, config: MqtLlavaConfig):
        super().__init__()
        self.config = config
        width = config.vision_config.hidden_size
        self.num_heads = config.query_num_attention_heads
        self.head_dim = width // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1  # read by some attention backends
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`(M, C)`, `(N, C)`, `(I, N, C)` to `(I, M, C)`."""
        num_images = values.shape[0]
        q = self._heads(self.q_proj(queries)[None]).expand(num_images, -1, -1, -1)  # (I, heads, M, C / heads)
        k = self._heads(self.k_proj(keys)[None]).expand(num_images, -1, -1, -1)  # (I, heads, N, C / heads)
        v = self._heads(self.v_proj(values))  # (I, heads, N, C / heads)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        pooled, _ = attend(self, q, k, v, None, scaling=self.scaling, dropout=0.0, is_causal=False)
        return self.out_proj(pooled.flatten(2))  # (I, M, C)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def init_query_transformer(module: MqtLlavaQueryTransformer) -> None:
    """
    Starting values as released: queries truncated normal 0.02, `proj` normal `D ** -0.5`, the packed query-key-value
    matrix Xavier-uniform as `nn.MultiheadAttention` draws it (over `3 C` outputs, so narrower than for one matrix),
    all other linear layers truncated normal 0.02. Then `query_init="local"` moves the queries to their places.
    """
    attn, width = module.attn, module.width
    init.copy_(module.pos_embed, module.fresh_pos_embed())
    init.trunc_normal_(module.query, std=0.02)
    init.normal_(module.proj, std=module.proj.shape[1] ** -0.5)
    init.trunc_normal_(attn.out_proj.weight, std=0.02)
    bound = math.sqrt(6 / (width + 3 * width))
    for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
        init.uniform_(linear.weight, -bound, bound)
    for linear in (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj):
        init.zeros_(linear.bias)
    if module.config.query_init == "local":
        _init_local(module)


def _init_local(module: MqtLlavaQueryTransformer) -> None:
    """
    Query i starts as `P[cell i] - P[i]`, which turns its position into that of the i-th cell from coarse to fine, and
    queries and keys share one scaled rotation, so that their product is largest where the two places are the same.
    """
    table = module.fresh_pos_embed()
    init.copy_(module.query, table[coarse_to_fine_cells(module.side)] - table)
    rotation = nn.init.orthogonal_(torch.empty(module.width, module.width)) * LOCAL_INIT_SCALE
    init.copy_(module.attn.q_proj.weight, rotation)
    init.copy_(module.attn.k_proj.weight, rotation)


# ---------------------------------------------------------------------------------------------------------------------
# Which placeholder takes which visual token
# ---------------------------------------------------------------------------------------------------------------------


def count_placeholders_per_image(is_image: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """
    How many placeholders each image has, read off the prompts alone.

    Args:
        is_image (`torch.Tensor` of shape `(B, S)`): where the placeholders stand.
        lengths (`list[int]`): visual tokens at hand for each image, in flat order.

    Returns:
        `torch.Tensor` of shape `(I,)`: `lengths` if the placeholders are exactly as many, else one run of placeholders
        per image, else (images side by side) equal shares.

    Raises:
        ValueError: if none of the three readings is possible.
    """
    starts = run_starts(is_image)
    run = (starts.flatten().cumsum(0) - 1).clamp(min=0, max=len(lengths) - 1)
    one_run_each = run.new_zeros(len(lengths)).scatter_add(0, run, is_image.flatten().to(run.dtype))
    all_tokens = torch.tensor(lengths, device=is_image.device, dtype=run.dtype)
    counts = torch.where(is_image.sum() == sum(lengths), all_tokens, one_run_each)
    if is_torchdynamo_compiling():  # a graph takes the first two readings; `visual_token_counts` settles the third
        return counts
    num_runs, total = int(starts.sum()), int(is_image.sum())
    if num_runs == len(lengths) or total == sum(lengths):
        return counts
    per_prompt = is_image.sum(-1).tolist()
    share, rest = divmod(total, len(lengths))
    if rest or any(length % max(share, 1) for length in run_lengths(is_image, starts)):
        raise ValueError(
            f"The prompts have {per_prompt} image placeholders in {num_runs} runs for {len(lengths)} images, which can "
            "be shared out in more than one way or in none. Give one run of placeholders per image, or pass "
            "`visual_token_counts` from the processor."
        )
    return torch.full_like(counts, share)


def run_starts(is_image: torch.Tensor) -> torch.Tensor:
    """`(B, S)`: the first placeholder of each run."""
    return is_image & ~F.pad(is_image, (1, 0))[:, :-1]


def run_lengths(is_image: torch.Tensor, starts: torch.Tensor) -> list[int]:
    """Lengths of the runs of placeholders, in flat order."""
    run = starts.flatten().cumsum(0)[is_image.flatten()]
    return torch.unique_consecutive(run, return_counts=True)[1].tolist()


def check_prompts_fit(is_image: torch.Tensor, counts: list[int], lengths: list[int]) -> None:
    """
    Every run of placeholders is that of whole images, and no image is asked for more tokens than it has.

    Args:
        is_image (`torch.Tensor` of shape `(B, S)`): where the placeholders stand.
        counts (`list[int]`): placeholders of each image, in flat order.
        lengths (`list[int]`): visual tokens at hand for each image.

    Raises:
        ValueError: naming the prompt, both numbers and the way out.
    """
    if len(counts) != len(lengths):
        raise ValueError(
            f"`visual_token_counts` must have one number per image, got {len(counts)} for {len(lengths)} images."
        )
    for image, (count, length) in enumerate(zip(counts, lengths)):
        if not 1 <= count <= length:
            raise ValueError(
                f"Image {image} has {count} placeholders in its prompt, but must have between 1 and {length}. Process "
                "the prompt with `num_visual_tokens` in that range."
            )
    starts = run_starts(is_image)
    runs = iter(run_lengths(is_image, starts))
    image = 0
    for prompt, num_runs in enumerate(starts.sum(-1).tolist()):
        for run in (next(runs) for _ in range(num_runs)):
            taken: list[int] = []
            while image < len(counts) and sum(taken) < run:
                taken.append(counts[image])
                image += 1
            if sum(taken) != run:
                raise ValueError(
                    f"Prompt {prompt} has {run} image placeholders in a row, but the images there take {taken} = "
                    f"{sum(taken)}. Process text and images in one call, and keep images in the order of the prompts."
                )
    if image < len(counts):
        raise ValueError(
            f"The prompts have placeholders for {image} images, but {len(counts)} images were given. Each image needs "
            "its placeholders in a prompt."
        )


def place_visual_tokens(
    inputs_embeds: torch.Tensor,
    is_image: torch.Tensor,
    visual_tokens: torch.Tensor,
    counts: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    """
    `inputs_embeds` with visual tokens at the placeholders: the k-th placeholder of an image takes its k-th token.

    A gather rather than a masked scatter: no shape depends on the data, so one graph serves every budget.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(B, S, D)`): embeddings of the prompts.
        is_image (`torch.Tensor` of shape `(B, S)`): where the placeholders stand.
        visual_tokens (`torch.Tensor` of shape `(sum(lengths), D)`): tokens of all images, one after the other.
        counts (`torch.Tensor` of shape `(I,)`): placeholders of each image.
        lengths (`list[int]`): tokens of each image in `visual_tokens`.
    """
    lengths_ = torch.tensor(lengths, device=counts.device)
    first_token, last_placeholder = lengths_.cumsum(0) - lengths_, counts.cumsum(0)  # (I,), (I,)
    placeholder = (is_image.flatten().cumsum(0) - 1).clamp(min=0)  # (B * S,)
    image = torch.searchsorted(last_placeholder, placeholder, right=True).clamp(max=len(lengths) - 1)
    token = first_token[image] + placeholder - (last_placeholder - counts)[image]
    chosen = visual_tokens[token.clamp(max=len(visual_tokens) - 1)].view_as(inputs_embeds)  # (B, S, D)
    return torch.where(is_image[..., None], chosen, inputs_embeds)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class MqtLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """
    Outputs of [`MqtLlavaModel`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(sum of lengths, D)`, *optional*):
            Visual tokens of all images, one after the other, before the prompts' budgets cut them.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MqtLlavaCausalLMOutputWithPast(ModelOutput):
    """
    Outputs of [`MqtLlavaForConditionalGeneration`]: `loss` (scalar, with `labels`), `logits` of shape
    `(B, S, vocab_size)`, `past_key_values`, `hidden_states` and `attentions` of the language model, and
    `image_hidden_states` as in [`MqtLlavaModelOutputWithPast`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class MqtLlavaPlacedFeatures(BaseModelOutputWithPooling):
    """
    Image features that `generate` has already cut to the prompts: `pooler_output` holds exactly one token per
    placeholder, in order. A type of its own, because chunked prefill regroups the rows and keeps only the type.
    """


class MqtLlavaPreTrainedModel(PreTrainedModel):
    """What all MQT-LLaVA models share: loading, saving, initialisation and what they support."""

    config: MqtLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MqtLlavaQueryTransformer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MqtLlavaQueryTransformer):
            init_query_transformer(module)


class MqtLlavaModel(MqtLlavaPreTrainedModel):
    """Vision tower, query transformer and language model, without a language modeling head."""

    def __init__(self, config: MqtLlavaConfig):
        super().__init__(config)
        config.validate()  # values may have been changed since it was built
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.weights_above_selected_layer = cut_above_selected_layer(self.vision_tower, config)
        self.language_model = AutoModel.from_config(config.text_config)
        # The width of the embeddings, not `hidden_size`: some OPT models embed narrower than they compute. Not that of
        # their weight, which is empty here under ZeRO-3.
        self.query_transformer = MqtLlavaQueryTransformer(
            config, output_size=self.language_model.get_input_embeddings().embedding_dim
        )
        self.post_init()

    def patch_features(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """`(I, 3, H, W)` pixels to `(I, N, C)`: the selected hidden state of the tower, patches only."""
        if pixel_values.ndim != 4:
            raise ValueError(
                "`pixel_values` must have shape `(num_images, channels, height, width)`, got "
                f"{tuple(pixel_values.shape)}."
            )
        # The tower ends at the selected layer and its final norm is gone, so its output is that hidden state.
        hidden_states = self.vision_tower(pixel_values, return_dict=True, **kwargs).last_hidden_state
        return hidden_states[:, self.config.num_vision_prefix_tokens :]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        visual_token_counts: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Visual tokens of images, to be placed in prompts or given to `generate(mm_encoder_outputs=...)` at many
        budgets.

        Args:
            pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`): from the processor.
            visual_token_counts (`torch.Tensor` of shape `(I,)`, *optional*, defaults to M for every image):
                Tokens to keep of each image.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` is a list with one `(m_i,
            D)` tensor per image, `last_hidden_state` the `(I, N, C)` patch features behind them.

        Raises:
            ValueError: if a count is not between 1 and M, or there is not one per image.
        """
        features = self.patch_features(pixel_values, **kwargs)
        tokens = list(self.query_transformer(features))  # I times (M, D)
        if visual_token_counts is not None:
            counts = check_num_visual_tokens(visual_token_counts, len(tokens), self.config.max_visual_tokens)
            tokens = [image[:count] for image, count in zip(tokens, counts)]
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.BoolTensor:
        """`(B, S)` mask of the `<image>` placeholders, found by id or, without ids, by their embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def _fill_placeholders(
        self,
        inputs_embeds: torch.Tensor,
        is_image: torch.Tensor,
        image_outputs: BaseModelOutputWithPooling,
        visual_token_counts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings with the visual tokens in place, and the visual tokens themselves."""
        tokens = [image.to(inputs_embeds.device, inputs_embeds.dtype) for image in image_outputs.pooler_output]
        lengths = [len(image) for image in tokens]
        if isinstance(image_outputs, MqtLlavaPlacedFeatures):
            counts = torch.tensor(lengths, device=is_image.device)
        else:
            counts = self._placeholders_per_image(is_image, lengths, visual_token_counts)
        visual_tokens = torch.cat(tokens)  # (sum of lengths, D)
        return place_visual_tokens(inputs_embeds, is_image, visual_tokens, counts, lengths), visual_tokens

    def _placeholders_per_image(
        self, is_image: torch.Tensor, lengths: list[int], visual_token_counts: torch.Tensor | None
    ) -> torch.Tensor:
        """`(I,)` placeholders of each image, checked prompt by prompt (not inside a graph: it reads the data)."""
        if visual_token_counts is None:
            counts = count_placeholders_per_image(is_image, lengths)
        else:
            counts = torch.as_tensor(visual_token_counts, device=is_image.device)
        if not is_torchdynamo_compiling():
            check_prompts_fit(is_image, counts.tolist(), lengths)
        return counts

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_token_counts: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MqtLlavaModelOutputWithPast:
        """
        The prompt is never rewritten here: its placeholders say how many tokens each image gets.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): prompts with their placeholders.
            pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`, *optional*): all images, in flat batch order.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): as in any causal model; also 4-D.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): as in any causal model.
            past_key_values (`Cache`, *optional*): keys and values of earlier tokens, visual ones included.
            inputs_embeds (`torch.Tensor` of shape `(B, S, D)`, *optional*): instead of `input_ids`.
            visual_token_counts (`torch.Tensor` of shape `(I,)`, *optional*):
                Placeholders of each image, from the processor. Needed only where images stand side by side with
                different budgets.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}` instead of `pixel_values`. The prompt takes a prefix of each.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if both `pixel_values` and
                `mm_encoder_outputs` are, or if a prompt's placeholders do not fit its images.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("Give `pixel_values` or `mm_encoder_outputs`, not both: they are the same images.")
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)

        visual_tokens, is_image = None, None
        if input_ids is not None:
            is_image = self.get_placeholder_mask(input_ids, None)
            # The placeholder's own embedding is never used, and its id may lie outside the vocabulary.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # (B, S, D)
        if image_outputs is not None:
            is_image = self.get_placeholder_mask(None, inputs_embeds) if is_image is None else is_image
            inputs_embeds, visual_tokens = self._fill_placeholders(
                inputs_embeds, is_image, image_outputs, visual_token_counts
            )
        elif is_image is not None and past_key_values is None:
            check_no_placeholders(is_image)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return MqtLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_tokens,
        )


def check_no_placeholders(is_image: torch.Tensor) -> None:
    """
    A prompt without images has no placeholders either.

    Raises:
        ValueError: naming the first prompt that has some.
    """
    if is_torchdynamo_compiling():
        return
    for prompt, placeholders in enumerate(is_image.sum(-1).tolist()):
        if placeholders:
            raise ValueError(
                f"Prompt {prompt} has {placeholders} image placeholders, but there are no images. Pass `pixel_values` "
                "or `mm_encoder_outputs`."
            )


def cut_above_selected_layer(tower: PreTrainedModel, config: MqtLlavaConfig) -> list[str]:
    """
    Takes out what lies above the hidden state that is read: no compute, no memory, no parameters without a gradient.
    The tower's config keeps describing the whole tower, since that is what checkpoints name it by. Returns the names
    of the weights that are gone.
    """
    whole = tower.state_dict().keys()
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.vision_config.num_hidden_layers:
            del module[config.num_vision_layers :]
    for name in PARTS_ABOVE_THE_LAYERS:
        if isinstance(getattr(tower, name, None), nn.Module):
            setattr(tower, name, nn.Identity())
    left = tower.state_dict().keys()
    return [name for name in whole if name not in left]


def check_index_stays_inside(folder) -> None:
    """
    The index of a local sharded checkpoint names files of its own folder only. (The Hub client sees to its own cache.)

    Raises:
        ValueError: naming the file that lies elsewhere.
    """
    if folder is None or not os.path.isdir(folder):
        return
    for index in glob.glob(os.path.join(glob.escape(os.fspath(folder)), "*.index.json")):
        with open(index, encoding="utf-8") as file:
            shards = set(json.load(file).get("weight_map", {}).values())
        for shard in shards:
            if os.path.basename(shard) != shard or "\\" in shard:
                raise ValueError(f"`{index}` names the file {shard!r}, which is not in its own folder: refused.")


def refuse_half_loaded(loading_info: dict) -> None:
    """
    A checkpoint fills the model exactly.

    Args:
        loading_info (`dict`): `missing_keys`, `unexpected_keys` and `mismatched_keys`, as `from_pretrained` reports
            them.

    Raises:
        ValueError: listing the keys that say otherwise.
    """
    mismatched = [
        f"{name} (is {tuple(found)}, must be {tuple(expected)})"
        for name, found, expected in loading_info["mismatched_keys"]
    ]
    problems = {
        "missing": sorted(loading_info["missing_keys"]),
        "unexpected": sorted(loading_info["unexpected_keys"]),
        "of the wrong shape": sorted(mismatched),
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"The checkpoint does not fit the model, so nothing was loaded. Weights {listed}. Use the config that the "
            "weights were saved with, or convert the checkpoint anew."
        )


class MqtLlavaForConditionalGeneration(MqtLlavaPreTrainedModel, GenerationMixin):
    """
    MQT-LLaVA with its language modeling head: one model that answers with any number of visual tokens.

    Example:

    ```python
    >>> inputs = processor(images=image, text=prompt, return_tensors="pt")
    >>> output = model.generate(**inputs, num_visual_tokens=16)
    >>> answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ```"""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MqtLlavaConfig):
        super().__init__(config)
        self.model = MqtLlavaModel(config)
        embeddings = self.model.language_model.get_input_embeddings()
        # Text models name their embeddings differently, and a tied head must find them.
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        # Checkpoints of others hold the whole tower. Exactly these weights of theirs have no place here.
        self._keys_to_ignore_on_load_unexpected = {
            rf"^model\.vision_tower\.(vision_model\.)?{re.escape(name)}$"
            for name in self.model.weights_above_selected_layer
        }
        self.lm_head = nn.Linear(embeddings.embedding_dim, embeddings.num_embeddings, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        visual_token_counts: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`MqtLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, visual_token_counts=visual_token_counts, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        visual_token_counts: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MqtLlavaCausalLMOutputWithPast:
        """
        [`MqtLlavaModel.forward`], then the head.

        Args:
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Token ids to predict, -100 where there is nothing to learn (placeholders among them).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions whose logits are computed: the last so many (0 for all), or which ones.

        Returns:
            [`MqtLlavaCausalLMOutputWithPast`]
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual_token_counts=visual_token_counts,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return MqtLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, vision_tower=None, **kwargs):
        """
        [`~transformers.PreTrainedModel.from_pretrained`], which also reads checkpoints of the authors' code.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub id, in this project's layout or the authors'.
            vision_tower (`str`, *optional*):
                Folder or Hub id of the CLIP, for a checkpoint of the authors that holds no tower and whose config does
                not name it.
            kwargs: everything else that `from_pretrained` takes.

        Raises:
            ValueError: if a weight is missing, unexpected or of the wrong shape (unless `ignore_mismatched_sizes` is
                set). All of them are listed, and nothing half-loaded is returned.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # Mismatches are reported with the rest, rather than as a bare error.
        ignore_mismatches = kwargs.pop("ignore_mismatched_sizes", False)
        check_index_stays_inside(pretrained_model_name_or_path)
        load = functools.partial(super().from_pretrained, output_loading_info=True, ignore_mismatched_sizes=True)
        if kwargs.get("config") is None and released_config(pretrained_model_name_or_path, kwargs) is not None:
            foreign = installed("conversion.load")
            model, info = foreign.load_released_model(load, pretrained_model_name_or_path, vision_tower, kwargs)
        elif vision_tower is not None:
            raise ValueError("`vision_tower` is for checkpoints of the authors' code; this one has its own tower.")
        else:
            model, info = load(pretrained_model_name_or_path, *args, **kwargs)
        if not ignore_mismatches:
            refuse_half_loaded(info)
        return (model, info) if wants_info else model

    @classmethod
    def from_components(cls, vision, language, max_visual_tokens: int = 256, **kwargs):
        """
        A new model and its processor, from any pretrained vision tower and language model.

        Args:
            vision (`str` or `PreTrainedModel`): folder, Hub id or the tower itself.
            language (`str` or `PreTrainedModel`): folder, Hub id or the causal language model itself.
            max_visual_tokens (`int`, *optional*, defaults to 256): M, a perfect square.
            kwargs: `tokenizer`, `chat_template`, `dtype`, and any other field of [`MqtLlavaConfig`].

        Returns:
            [`MqtLlavaForConditionalGeneration`] and [`MqtLlavaProcessor`].
        """
        components = installed("conversion.components")
        return components.from_components(vision, language, max_visual_tokens=max_visual_tokens, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        """
        [`~transformers.PreTrainedModel.save_pretrained`] in this project's own layout, with the default budget kept: a
        generation config that was made from the model config would drop `num_visual_tokens` when loaded.
        """
        if getattr(self.generation_config, "num_visual_tokens", None) is not None:
            self.generation_config._from_model_config = False
        if kwargs.pop("save_original_format", False):
            raise ValueError("`save_original_format` must be False: only this project's own layout is written.")
        super().save_pretrained(*args, save_original_format=False, **kwargs)

    def push_to_hub(self, repo_id: str, *, include_code: bool = False, processor=None, **kwargs) -> str:
        """
        [`~transformers.utils.PushToHubMixin.push_to_hub`], with a model card and, on request, the code.

        Args:
            repo_id (`str`): Hub id, created if it does not exist.
            include_code (`bool`, *optional*, defaults to `False`):
                Upload the code too, so that `trust_remote_code=True` loads the model without this package.
            processor ([`MqtLlavaProcessor`], *optional*): uploaded in the same commit.
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message`, `max_shard_size`; and for the card
                `base_model`, `datasets`, `license`, `evaluation`.
        """
        parts = [self] if processor is None else [self, processor]
        return installed("hub").push_to_hub(parts, repo_id, include_code=include_code, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        num_visual_tokens: int | list[int] | None = None,
        **kwargs,
    ) -> ModelOutput | torch.LongTensor:
        """
        [`~transformers.GenerationMixin.generate`] at any budget of visual tokens.

        The prompt is rewritten to the budget, whatever number of placeholders the processor put in, and the result is
        that of a prompt processed at this budget. Returned sequences start with the caller's own `input_ids`, so
        `output[:, inputs["input_ids"].shape[1]:]` is the answer at every budget. `max_length` counts the rewritten
        prompt; prefer `max_new_tokens`.

        Args:
            inputs (`torch.LongTensor` of shape `(B, S)`, *optional*): the same as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): may carry `num_visual_tokens`.
            num_visual_tokens (`int` or `list[int]`, *optional*):
                Visual tokens for every image, or for each in flat batch order; 1 to M. Defaults to
                `generation_config.num_visual_tokens`, else to the model's own, else to the prompt's placeholders.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": model.get_image_features(pixel_values)}` instead of `pixel_values`: the tower runs once for
                many budgets.
            kwargs: everything else that `generate` and `forward` take. The image token is never generated.

        Raises:
            ValueError: if `num_visual_tokens` is not in range or not one per image, if prompts and images do not fit,
                if a non-empty `past_key_values` holds another number of visual tokens, or for unknown arguments.
        """
        if generation_config is not None and generation_config.is_assistant:
            # A drafting call inside assisted generation: its prompt is already rewritten, its images not passed on.
            return super().generate(inputs, generation_config, *args, **kwargs)

        num_visual_tokens = self._default_num_visual_tokens(num_visual_tokens, generation_config)
        generation_config, kwargs = self._without_image_token(generation_config, kwargs)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        kwargs.pop("mm_token_type_ids", None)  # the processor may emit them; this model needs none
        if input_ids is None or input_ids.shape[1] == 0 or "inputs_embeds" in kwargs:
            if num_visual_tokens is not None and "inputs_embeds" in kwargs:
                raise ValueError("`num_visual_tokens` needs `input_ids`: embeddings of a prompt cannot be rewritten.")
            return super().generate(input_ids, generation_config, *args, **kwargs)

        prompt = _Prompt.from_generate(self, input_ids, generation_config, kwargs)
        prompt.resize(num_visual_tokens)
        output = super().generate(prompt.input_ids, generation_config, *args, **prompt.kwargs)
        return prompt.restore(output)

    def _default_num_visual_tokens(self, num_visual_tokens, generation_config: GenerationConfig | None):
        """The first budget given: by the call, by its generation config, by the model's; `None` keeps the prompt's."""
        for config in (generation_config, self.generation_config):
            if num_visual_tokens is None:
                num_visual_tokens = getattr(config, "num_visual_tokens", None)
        return num_visual_tokens

    def _without_image_token(self, generation_config: GenerationConfig | None, kwargs: dict):
        """The same generation settings, with the image token among the suppressed ones."""
        image_token_id = self.config.image_token_id
        if image_token_id >= self.lm_head.weight.shape[0]:
            return generation_config, kwargs  # the head cannot produce it
        suppressed = kwargs.get("suppress_tokens")
        for config in (generation_config, self.generation_config):
            if suppressed is None:
                suppressed = getattr(config, "suppress_tokens", None)
        suppressed = sorted({*(suppressed or []), image_token_id})
        if generation_config is None or "suppress_tokens" in kwargs:
            return generation_config, {**kwargs, "suppress_tokens": suppressed}
        generation_config = copy.deepcopy(generation_config)
        generation_config.suppress_tokens = suppressed
        return generation_config, kwargs


# ---------------------------------------------------------------------------------------------------------------------
# Rewriting a prompt to a budget
# ---------------------------------------------------------------------------------------------------------------------


def resize_placeholder_runs(
    tokens: torch.Tensor,
    is_image: torch.Tensor,
    keep: torch.Tensor,
    old_counts: list[int],
    new_counts: list[int],
) -> list[torch.Tensor]:
    """
    Rows of `tokens` where image i has `new_counts[i]` placeholders in place of its `old_counts[i]`.

    Args:
        tokens (`torch.Tensor` of shape `(B, S)`): ids, or anything else that goes with them one to one.
        is_image (`torch.Tensor` of shape `(B, S)`): where the placeholders stand.
        keep (`torch.Tensor` of shape `(B, S)`): false for padding, which is left out.
        old_counts, new_counts (`list[int]`): placeholders of each image, in flat order.

    Returns:
        B rows of different lengths.
    """
    old = torch.tensor(old_counts, dtype=torch.long, device=tokens.device)
    repeats_at_placeholders = old.new_zeros(sum(old_counts))
    # The first placeholder of an image is repeated, the others are dropped.
    repeats_at_placeholders[old.cumsum(0) - old] = torch.tensor(new_counts, dtype=torch.long, device=tokens.device)
    repeats = keep.to(old.dtype).masked_scatter(is_image, repeats_at_placeholders)  # (B, S)
    return list(tokens.flatten().repeat_interleave(repeats.flatten()).split(repeats.sum(-1).tolist()))


def left_pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """`(B, longest)` from rows of different lengths."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


@dataclass
class _Prompt:
    """One call of `generate`: the caller's prompt, the same at another budget, and the way back."""

    model: MqtLlavaForConditionalGeneration
    original_ids: torch.LongTensor  # (B, S)
    input_ids: torch.LongTensor  # (B, S'), what generation runs on
    kwargs: dict
    image_outputs: BaseModelOutputWithPooling | None
    pad_token_id: int

    @classmethod
    def from_generate(
        cls,
        model: MqtLlavaForConditionalGeneration,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig | None,
        kwargs: dict,
    ) -> "_Prompt":
        """Takes the image inputs and the padding out of the arguments of `generate`, without touching the caller's."""
        kwargs = dict(kwargs)
        mm_encoder_outputs = kwargs.pop("mm_encoder_outputs", None) or {}
        if mm_encoder_outputs.get("image") is not None and kwargs.get("pixel_values") is not None:
            raise ValueError("Give `pixel_values` or `mm_encoder_outputs`, not both: they are the same images.")
        pad, eos = (
            _setting(name, kwargs, generation_config, model.generation_config)
            for name in ("pad_token_id", "eos_token_id")
        )
        eos = eos if isinstance(eos, (list, tuple)) else [eos]
        if kwargs.get("attention_mask") is None and pad is not None and pad not in eos:
            # As `generate` itself reads a prompt without a mask.
            kwargs["attention_mask"] = (input_ids != pad).long()
        pad = next((token for token in (pad, *eos) if token is not None), 0)
        return cls(model, input_ids, input_ids, kwargs, mm_encoder_outputs.get("image"), pad)

    def resize(self, num_visual_tokens: int | list[int] | None) -> None:
        """Encodes the images, and brings prompt and visual tokens to the budget (`None`: to the prompt's own)."""
        is_image = self.model.model.get_placeholder_mask(self.original_ids, None)  # (B, S)
        pixel_values = self.kwargs.pop("pixel_values", None)
        given_counts = self.kwargs.pop("visual_token_counts", None)
        num_images = self._num_images(pixel_values)
        maximum = self.model.config.max_visual_tokens
        past_length = self._past_length()
        if past_length:
            self._check_cache(is_image, num_images, num_visual_tokens)
            is_image = is_image[:, past_length:] if is_image.shape[1] > past_length else is_image
        if num_images == 0 and past_length:
            return  # all images are in the cache, whose budgets have been compared
        new_counts = None
        if num_visual_tokens is not None:
            new_counts = check_num_visual_tokens(num_visual_tokens, num_images, maximum)
        if num_images == 0:
            check_no_placeholders(is_image)
            return
        if self.image_outputs is None:
            self.image_outputs = self.model.get_image_features(pixel_values, return_dict=True)
        tokens = self.image_outputs.pooler_output
        old_counts = self._old_counts(is_image, [len(image) for image in tokens], given_counts)
        new_counts = old_counts if new_counts is None else new_counts
        for image, (count, features) in enumerate(zip(new_counts, tokens)):
            if count > len(features):
                raise ValueError(
                    f"`num_visual_tokens` is {count} for image {image}, but its features in `mm_encoder_outputs` have "
                    f"{len(features)} tokens. Encode it with `get_image_features` at {count} or more."
                )
        self.kwargs["mm_encoder_outputs"] = {
            "image": MqtLlavaPlacedFeatures(pooler_output=[image[:m] for image, m in zip(tokens, new_counts)])
        }
        if not past_length:
            self._rewrite(is_image, old_counts, new_counts)

    def restore(self, output: ModelOutput | torch.LongTensor) -> ModelOutput | torch.LongTensor:
        """The same output, with the caller's prompt in front of the new tokens."""
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        times = len(sequences) // len(self.original_ids)  # beams returned, or samples drawn, per prompt
        prompts = self.original_ids.to(sequences.device).repeat_interleave(times, dim=0)
        sequences = torch.cat([prompts, sequences[:, self.input_ids.shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        cache = output.get("past_key_values")
        if cache is not None:
            placeholders = self.model.model.get_placeholder_mask(self.input_ids, None).sum(-1)
            cache.image_placeholders = placeholders.repeat_interleave(times).tolist()  # for `_check_cache`
        return output

    def _num_images(self, pixel_values: torch.Tensor | None) -> int:
        if self.image_outputs is not None:
            return len(self.image_outputs.pooler_output)
        return 0 if pixel_values is None else len(pixel_values)

    def _past_length(self) -> int:
        cache = self.kwargs.get("past_key_values")
        return 0 if cache is None else int(cache.get_seq_length())

    def _old_counts(self, is_image: torch.Tensor, lengths: list[int], given_counts) -> list[int]:
        """Placeholders of each image as the caller wrote them, checked prompt by prompt."""
        if given_counts is None:
            given_counts = count_placeholders_per_image(is_image, lengths)
        counts = torch.as_tensor(given_counts).tolist()
        check_prompts_fit(is_image, counts, [self.model.config.max_visual_tokens] * len(lengths))
        return counts

    def _rewrite(self, is_image: torch.Tensor, old_counts: list[int], new_counts: list[int]) -> None:
        """Sets ids and mask at the new budget, left-padded; padding on the right is moved over too."""
        mask = self.kwargs.get("attention_mask")
        keep = torch.ones_like(is_image) if mask is None else mask.bool() | is_image
        if new_counts == old_counts and keep[:, -1].all():
            return
        if self.kwargs.get("position_ids") is not None:
            raise ValueError(
                "`position_ids` cannot follow a prompt that is rewritten to `num_visual_tokens`. Leave them out, or "
                "process the prompt at that number and pad it on the left."
            )
        rows = resize_placeholder_runs(self.original_ids, is_image, keep, old_counts, new_counts)
        self.input_ids = left_pad(rows, self.pad_token_id)
        self.kwargs["attention_mask"] = left_pad([torch.ones_like(row) for row in rows], 0)
        token_type_ids = self.kwargs.get("token_type_ids")
        if token_type_ids is not None:
            types = resize_placeholder_runs(token_type_ids, is_image, keep, old_counts, new_counts)
            self.kwargs["token_type_ids"] = left_pad(types, 0)

    def _check_cache(self, is_image: torch.Tensor, num_images: int, num_visual_tokens: int | list[int] | None) -> None:
        """A cache keeps the budgets that it was filled with: the prompt and the call must ask for the same."""
        in_cache = getattr(self.kwargs["past_key_values"], "image_placeholders", None)
        past_length = self._past_length()
        only_new_tokens = is_image.shape[1] <= past_length and num_images > 0
        covered = is_image[:, :past_length]
        if in_cache is not None and not only_new_tokens and covered.any() and covered.sum(-1).tolist() != in_cache:
            raise ValueError(
                f"`past_key_values` holds {in_cache} visual tokens, but the prompts have {is_image.sum(-1).tolist()} "
                "placeholders. Process the prompt with that `num_visual_tokens` to continue from the cache, or start "
                "without it."
            )
        if num_visual_tokens is None:
            return
        runs = run_lengths(is_image, run_starts(is_image))
        wanted = check_num_visual_tokens(num_visual_tokens, len(runs), self.model.config.max_visual_tokens)
        if runs != wanted:
            raise ValueError(
                f"`num_visual_tokens` is {num_visual_tokens}, but `past_key_values` was filled from a prompt with "
                f"{runs} visual tokens per image. Start without the cache to change the number."
            )


def _setting(name: str, kwargs: dict, *configs: GenerationConfig | None):
    """A generation setting: from the call, else from the first config that has it."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


__all__ = [
    "MODULES_NOT_TO_QUANTIZE",
    "MqtLlavaCausalLMOutputWithPast",
    "MqtLlavaForConditionalGeneration",
    "MqtLlavaModel",
    "MqtLlavaModelOutputWithPast",
    "MqtLlavaPreTrainedModel",
    "MqtLlavaQueryTransformer",
]
