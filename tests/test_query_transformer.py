import math

import pytest
import reference
import torch
from conftest import MAX_VISUAL_TOKENS, sharpen, tiny_config, tiny_model, vision_config
from torch.nn import functional as F

from mqt_llava.modeling_mqt_llava import (
    MqtLlavaForConditionalGeneration,
    MqtLlavaQueryTransformer,
    coarse_to_fine_cells,
    sincos_position_table,
)


@pytest.fixture
def query_transformer(model):
    return model.model.query_transformer


@pytest.fixture
def features():
    return torch.randn(3, 36, 32)


@pytest.mark.parametrize("num_visual_tokens", [1, 2, 3, 7, 16])
def test_tokens_are_the_published_formula(query_transformer, features, num_visual_tokens):
    ours = query_transformer(features)[:, :num_visual_tokens]
    torch.testing.assert_close(
        ours, reference.visual_tokens(query_transformer, features, num_visual_tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("num_visual_tokens", [1, 3, 16])
def test_gradients_are_the_published_formulas(query_transformer, features, num_visual_tokens):
    plain = {name: p for name, p in query_transformer.named_parameters() if not name.startswith("attn")}
    weight = torch.randn(3, num_visual_tokens, 48)

    def gradients(tokens):
        return torch.autograd.grad((tokens * weight).sum(), list(plain.values()))

    ours = gradients(query_transformer(features)[:, :num_visual_tokens])
    theirs = gradients(reference.visual_tokens(query_transformer, features, num_visual_tokens))
    for name, a, b in zip(plain, ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_any_square_grid_of_queries_works(side, features):
    qt = sharpen(MqtLlavaForConditionalGeneration(tiny_config(max_visual_tokens=side**2))).model.query_transformer
    ours = qt(features)
    assert ours.shape == (3, side**2, 48)
    torch.testing.assert_close(ours, reference.visual_tokens(qt, features, side**2), atol=1e-4, rtol=1e-4)


def test_an_image_alone_gives_the_tokens_it_gives_in_a_batch(query_transformer, features):
    torch.testing.assert_close(query_transformer(features)[1:2], query_transformer(features[1:2]), atol=1e-5, rtol=1e-5)


def test_every_image_is_pooled_at_the_same_places(query_transformer, features):
    maps = []
    query_transformer.attn.config._attn_implementation = "eager"
    original = query_transformer.attn.forward

    def record(queries, keys, values):
        maps.append((query_transformer.attn.q_proj(queries), query_transformer.attn.k_proj(keys)))
        return original(queries, keys, values)

    query_transformer.attn.forward = record
    query_transformer(features)
    query_transformer(features * 3 + 1)
    for first, second in zip(*maps):
        assert torch.equal(first, second)
        assert first.ndim == 2  # no batch axis: computed once, not per image


def test_patches_off_the_square_are_refused(query_transformer):
    with pytest.raises(ValueError, match="square grid of patches, got 35"):
        query_transformer(torch.randn(1, 35, 32))


@pytest.mark.parametrize(("side", "width"), [(1, 4), (3, 8), (4, 32), (16, 64)])
def test_position_table_is_the_slow_one(side, width):
    torch.testing.assert_close(sincos_position_table(side, width), reference.position_table(side, width))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 8, 16])
def test_coarse_to_fine_order_visits_every_cell_once(side):
    assert sorted(coarse_to_fine_cells(side).tolist()) == list(range(side**2))


@pytest.mark.parametrize("side", [4, 8, 16])
def test_the_first_four_places_stand_in_four_quarters(side):
    quarters = {(cell // side * 2 // side, cell % side * 2 // side) for cell in coarse_to_fine_cells(side)[:4].tolist()}
    assert len(quarters) == 4


@pytest.mark.parametrize("side", [4, 5, 6, 8, 16])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_every_prefix_covers_the_grid_better_than_raster_order(side, share):
    def farthest(cells):
        """The largest distance of any cell from the nearest one of the prefix."""
        places = torch.tensor([divmod(cell, side) for cell in cells], dtype=torch.float)
        grid = torch.tensor([divmod(cell, side) for cell in range(side**2)], dtype=torch.float)
        return torch.cdist(grid, places).min(dim=1).values.max()

    prefix = coarse_to_fine_cells(side)[: max(1, int(share * side**2))].tolist()
    assert farthest(prefix) < farthest(range(len(prefix)))


def test_the_position_table_of_a_new_model_is_rounded_to_half(model):
    table = model.model.query_transformer.pos_embed
    assert torch.equal(table, sincos_position_table(4, 32).half().float())


def test_every_parameter_is_initialised(monkeypatch):
    """`torch.empty` hands out NaN instead of whatever was in memory: what nobody fills stays NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    model = MqtLlavaForConditionalGeneration(tiny_config())
    holes = [name for name, value in model.state_dict().items() if value.isnan().any()]
    assert holes == []


def test_starting_values_are_the_authors():
    config = tiny_config(
        vision_config=vision_config(hidden_size=128), max_visual_tokens=256, query_num_attention_heads=4
    )
    qt = MqtLlavaForConditionalGeneration(config).model.query_transformer
    assert qt.query.std().item() == pytest.approx(0.02, rel=0.05)
    assert qt.proj.std().item() == pytest.approx(48**-0.5, rel=0.05)
    assert qt.attn.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = math.sqrt(6 / (128 + 3 * 128))  # nn.MultiheadAttention draws the packed matrix
    for linear in (qt.attn.q_proj, qt.attn.k_proj, qt.attn.v_proj):
        assert bound * 0.95 < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
    assert qt.ln_q.eps == qt.ln_k.eps == qt.ln_v.eps == 1e-6


def distance_read(query_init):
    """Mean distance in cells between the place of a query, coarse to fine, and what it attends to at step 0."""
    config = tiny_config(
        vision_config=vision_config(hidden_size=128, patch_size=6),  # 4 x 4 patches for 4 x 4 queries
        query_num_attention_heads=4,
        query_init=query_init,
    )
    qt = MqtLlavaForConditionalGeneration(config).model.query_transformer
    queries = qt.attn._heads(qt.attn.q_proj(qt.ln_q(qt.query + qt.pos_embed)[None]))
    keys = qt.attn._heads(qt.attn.k_proj(qt.ln_k(qt.patch_positions(16))[None]))
    attention = (queries @ keys.transpose(-1, -2) * qt.attn.scaling).softmax(-1)[0]  # (heads, queries, cells)
    places = torch.tensor([divmod(cell, 4) for cell in range(16)], dtype=torch.float)
    distances = torch.cdist(places[coarse_to_fine_cells(4)], places)
    return (attention * distances).sum(-1).mean().item()


def test_a_local_start_reads_near_each_querys_own_place():
    assert distance_read("local") < 0.7 < 1.5 < distance_read("authors")


def test_a_local_start_puts_queries_on_their_places_coarse_to_fine():
    qt = MqtLlavaForConditionalGeneration(tiny_config(query_init="local")).model.query_transformer
    torch.testing.assert_close(qt.query + qt.pos_embed, qt.pos_embed[coarse_to_fine_cells(4)])
    assert torch.equal(qt.attn.q_proj.weight, qt.attn.k_proj.weight)


def test_the_start_changes_no_state_names():
    names = [
        MqtLlavaForConditionalGeneration(tiny_config(query_init=init)).state_dict().keys()
        for init in ("authors", "local")
    ]
    assert names[0] == names[1]


def test_a_loaded_table_is_kept(tmp_path):
    """Released checkpoints carry a table rounded to half; recomputing it would be another model."""
    model = tiny_model()
    model.model.query_transformer.pos_embed += 0.125
    model.save_pretrained(tmp_path)
    loaded = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.query_transformer.pos_embed, model.model.query_transformer.pos_embed)


def test_half_precision_stays_near_full(query_transformer, features):
    full = query_transformer(features)
    low = query_transformer.to(torch.bfloat16)(features.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert F.cosine_similarity(low.float(), full, dim=-1).min() > 0.99


def test_eager_attention_equals_sdpa(features):
    outputs = []
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = tiny_model()
        model.set_attn_implementation(implementation)
        assert model.model.query_transformer.attn.config._attn_implementation == implementation
        outputs.append(model.model.query_transformer(features))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_the_query_transformer_is_one_block_for_device_maps(model):
    assert MqtLlavaQueryTransformer.__name__ in model._no_split_modules
    assert len(model.model.query_transformer.query) == MAX_VISUAL_TOKENS
