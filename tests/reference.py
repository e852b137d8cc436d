"""Slow, plain versions of what the package does cleverly. Nothing here is shared with the package."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def visual_tokens(query_transformer, features, num_visual_tokens):
    """The published formula with `nn.MultiheadAttention`, one image at a time, only the first m queries run."""
    qt = query_transformer
    width, heads = qt.query.shape[1], qt.config.query_num_attention_heads
    attention = nn.MultiheadAttention(width, heads).to(features.dtype)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([qt.attn.q_proj.weight, qt.attn.k_proj.weight, qt.attn.v_proj.weight]))
        attention.in_proj_bias.copy_(torch.cat([qt.attn.q_proj.bias, qt.attn.k_proj.bias, qt.attn.v_proj.bias]))
        attention.out_proj.load_state_dict(qt.attn.out_proj.state_dict())
    side, patch_side = math.isqrt(len(qt.query)), math.isqrt(features.shape[1])
    grid = qt.pos_embed.reshape(side, side, width).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(patch_side, patch_side), mode="bicubic", align_corners=False)
    positions = grid[0].permute(1, 2, 0).reshape(-1, width)
    outputs = []
    for image in features:
        q = qt.ln_q(qt.query[:num_visual_tokens] + qt.pos_embed[:num_visual_tokens])
        outputs.append(attention(q, qt.ln_k(positions), qt.ln_v(image))[0] @ qt.proj)
    return torch.stack(outputs)


def position_table(side, width):
    """Cell by cell, number by number: the column's sines and cosines, then the row's."""
    table = torch.zeros(side * side, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                numbers = [f(place * frequency) for place in (column, row) for f in (math.sin, math.cos)]
                for part, number in enumerate(numbers):
                    table[row * side + column, part * quarter + i] = number
    return table.float()


def embeddings(model, input_ids, tokens_of_images):
    """Prompt by prompt, position by position: the next token of the next image at each placeholder."""
    queue = [token for image in tokens_of_images for token in image]
    embed = model.get_input_embeddings()
    rows = []
    for row in input_ids:
        rows.append(
            torch.stack(
                [queue.pop(0) if i == model.config.image_token_id else embed(torch.tensor(i)) for i in row.tolist()]
            )
        )
    assert not queue
    return torch.stack(rows)


def rewrite(rows, masks, image_token_id, old_counts, new_counts):
    """Lists of ids with image i's `old_counts[i]` placeholders replaced by `new_counts[i]`; padding left out."""
    old, new = list(old_counts), list(new_counts)
    result = []
    for row, mask in zip(rows, masks):
        out, i = [], 0
        while i < len(row):
            if row[i] == image_token_id:
                i += old.pop(0)
                out += [image_token_id] * new.pop(0)
            else:
                out += [row[i]] if mask[i] else []
                i += 1
        result.append(out)
    assert not old and not new
    return result
