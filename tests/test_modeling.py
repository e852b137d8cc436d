import copy

import pytest
import reference
import torch
from conftest import IMAGE_SIZE, picture, sharpen, text_config, tiny_config, tiny_model, tiny_processor, vision_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from mqt_llava import MODULES_NOT_TO_QUANTIZE, MqtLlavaForConditionalGeneration, MqtLlavaModel


IMAGE = 4  # id of <image>


def pixels(num_images):
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE)


def prompt(*parts):
    """Token ids from words (lists of ids) and budgets (numbers): `prompt([5, 6], 3, [7])`."""
    return [i for part in parts for i in ([IMAGE] * part if isinstance(part, int) else part)]


def batch(*prompts, side="left"):
    longest = max(map(len, prompts))
    pad = [[0] * (longest - len(p)) for p in prompts]
    rows = [a + p if side == "left" else p + a for a, p in zip(pad, prompts)]
    ones = [[1] * len(p) for p in prompts]
    masks = [a + p if side == "left" else p + a for a, p in zip(pad, ones)]
    return torch.tensor(rows), torch.tensor(masks)


# --- the vision tower -------------------------------------------------------------------------------------------------

TOWERS = {
    "clip_vision_model": {},
    "siglip_vision_model": {},
    "vit": {},
    "dinov2": {"num_register_tokens": 0},
    "dinov2_with_registers": {"num_register_tokens": 4},
    "dinov3_vit": {"num_register_tokens": 4},
}


@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize("tower", TOWERS)
def test_features_are_the_whole_towers_hidden_state(tower, layer):
    strategy = "full" if tower == "siglip_vision_model" else "default"
    config = tiny_config(
        vision_config=vision_config(model_type=tower, **TOWERS[tower]),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = sharpen(MqtLlavaModel(config)).eval()
    whole = AutoModel.from_config(copy.deepcopy(config.vision_config)).eval()
    sharpen(whole)
    ours = model.vision_tower.state_dict()
    assert ours.keys() < whole.state_dict().keys()
    whole.load_state_dict(ours, strict=False)
    images = pixels(2)
    expected = whole(images, output_hidden_states=True).hidden_states[layer]
    prefix = {"siglip_vision_model": 0, "dinov2_with_registers": 5, "dinov3_vit": 5}.get(tower, 1)
    torch.testing.assert_close(model.patch_features(images), expected[:, prefix:], atol=1e-4, rtol=1e-4)
    assert model.get_image_features(images).pooler_output[0].shape == (16, 48)


def test_nothing_above_the_selected_layer_is_built(model):
    tower = model.model.vision_tower
    assert len(tower.encoder.layers) == 2  # of 3, for layer -2
    assert not any("post_layernorm" in name for name in model.state_dict())
    assert model.config.vision_config.num_hidden_layers == 3  # the config still describes the whole tower
    whole = CLIPVisionModel(copy.deepcopy(model.config.vision_config))
    assert tower.num_parameters() < whole.num_parameters()


def test_every_parameter_gets_a_gradient(model):
    """So that distributed training finds no unused parameters."""
    ids, mask = batch(prompt([5], 16, [6, 7]))
    model(ids, pixel_values=pixels(1), attention_mask=mask, labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_frozen_tower_records_nothing_for_the_backward_pass(model):
    model.model.vision_tower.requires_grad_(False)
    assert not model.model.patch_features(pixels(1)).requires_grad
    assert model.get_image_features(pixels(1)).pooler_output[0].requires_grad


def test_pixels_of_the_wrong_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"`pixel_values` must have shape .* got \(1, 2, 3, 24, 24\)"):
        model.get_image_features(torch.zeros(1, 2, 3, 24, 24))


# --- get_image_features -----------------------------------------------------------------------------------------------


def test_image_features_are_one_tensor_per_image(model):
    images = pixels(3)
    output = model.get_image_features(images)
    assert isinstance(output, BaseModelOutputWithPooling)
    assert [tuple(t.shape) for t in output.pooler_output] == [(16, 48)] * 3
    assert output.last_hidden_state.shape == (3, 36, 32)
    counts = [t.shape[0] for t in model.get_image_features(images, torch.tensor([1, 16, 5])).pooler_output]
    assert counts == [1, 16, 5]


@pytest.mark.parametrize("m", [1, 2, 3, 7, 15])
def test_the_first_tokens_do_not_depend_on_how_many_follow(model, m):
    images = pixels(2)
    everything = model.get_image_features(images).pooler_output
    for prefix, whole in zip(model.get_image_features(images, torch.tensor([m, m])).pooler_output, everything):
        assert torch.equal(prefix, whole[:m])


@pytest.mark.parametrize("counts", [[0, 1], [17, 1], [1], [1, 2, 3]])
def test_image_features_refuse_wrong_counts(model, counts):
    with pytest.raises(ValueError, match="num_visual_tokens"):
        model.get_image_features(pixels(2), torch.tensor(counts))


def test_image_features_come_as_a_tuple_when_asked(model):
    features, tokens = model.get_image_features(pixels(1), return_dict=False)
    assert features.shape == (1, 36, 32)
    assert tokens[0].shape == (16, 48)


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budgets", [[16, 16, 16], [1, 1, 1], [3, 5, 2], [16, 1, 7]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_slow_placing(model, budgets, side):
    a, b, c = budgets
    ids, mask = batch(prompt([5], a, [6, 7], b, [8]), prompt([5, 9], c, [10, 11]), prompt([5, 6]), side=side)
    images = pixels(3)
    tokens = [t[:m] for t, m in zip(model.get_image_features(images).pooler_output, budgets)]
    expected = model(inputs_embeds=reference.embeddings(model, ids, tokens), attention_mask=mask).logits
    torch.testing.assert_close(model(ids, images, mask).logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("m", [1, 5, 16])
def test_gradients_are_those_of_the_slow_placing(model, m):
    ids, mask = batch(prompt([5], m, [6, 7], m, [8]), prompt([5, 9], m, [10, 11]))
    images = pixels(3)
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)

    def gradients(**inputs):
        model.zero_grad()
        model(attention_mask=mask, labels=labels, **inputs).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    ours = gradients(input_ids=ids, pixel_values=images)
    tokens = [t[:m] for t in model.get_image_features(images).pooler_output]
    theirs = gradients(inputs_embeds=reference.embeddings(model, ids, tokens))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-3, msg=name)


def test_a_batch_gives_the_logits_of_its_prompts_alone(model):
    prompts = [prompt([5], 3, [6, 7]), prompt([5, 9], 16, [10, 11])]
    images = pixels(2)
    for side in ("left", "right"):
        ids, mask = batch(*prompts, side=side)
        together = model(ids, images, mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        for row, single in enumerate(prompts):
            alone = model(torch.tensor([single]), images[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row][mask[row].bool()], alone, atol=1e-4, rtol=1e-4)


def test_images_side_by_side_follow_the_counts(model):
    ids = torch.tensor([prompt([5], 3 + 6, [6])])
    images = pixels(2)
    features = model.get_image_features(images).pooler_output
    for counts in ([3, 6], [6, 3], [1, 8]):
        tokens = [t[:m] for t, m in zip(features, counts)]
        expected = model(inputs_embeds=reference.embeddings(model, ids, tokens)).logits
        torch.testing.assert_close(model(ids, images, visual_token_counts=torch.tensor(counts)).logits, expected)


def test_images_side_by_side_share_equally_without_counts(model):
    ids = torch.tensor([prompt([5], 4 + 4, [6])])
    images = pixels(2)
    told = model(ids, images, visual_token_counts=torch.tensor([4, 4])).logits
    assert torch.equal(model(ids, images).logits, told)


def test_forward_takes_features_encoded_once(model):
    images = pixels(2)
    features = model.get_image_features(images)
    for m in (1, 6, 16):
        ids, mask = batch(prompt([5], m, [6]), prompt([7, 8], m, [9]))
        direct = model(ids, images, mask).logits
        assert torch.equal(model(ids, attention_mask=mask, mm_encoder_outputs={"image": features}).logits, direct)


def test_prompts_without_images_skip_the_tower(model, monkeypatch):
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: pytest.fail("the tower ran"))
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, model.lm_head.out_features)


@pytest.mark.parametrize(
    ("prompts", "num_images", "counts", "words"),
    [
        # The totals of the batch agree, the prompts do not: LLaVA lets these pass.
        ([prompt([5], 4), prompt([5], 6)], 2, [6, 4], ["Prompt 0 has 4", "[6]"]),
        ([prompt([5], 4), prompt([5], 6)], 2, [5, 5], ["Prompt 0 has 4", "[5]"]),
        ([prompt([5], 4), prompt([5], 6)], 1, [10], ["Prompt 0 has 4", "[10]"]),
        ([prompt([5], 4, [6], 6)], 1, [10], ["Prompt 0 has 4", "[10]"]),
        ([prompt([5], 4, [6]), prompt([5], 4, [6], 4)], 3, [4, 5, 3], ["Prompt 1 has 4", "[5]"]),
        ([prompt([5], 17)], 1, None, ["Image 0 has 17", "between 1 and 16"]),
        ([prompt([5], 4), prompt([5], 4)], 1, None, ["[4, 4]", "2 runs", "1 images"]),
        ([prompt([5], 3)], 2, None, ["[3]", "1 runs", "2 images"]),
        ([prompt([5, 6])], 1, None, ["Image 0 has 0", "between 1 and 16"]),
        ([prompt([5], 4), prompt([5], 4)], 0, None, ["Prompt 0 has 4", "no images"]),
        ([prompt([5], 4)], 1, [4, 4], ["one number per image", "2", "1 images"]),
        ([prompt([5], 4)], 2, [4, 4], ["placeholders for 1 images", "2 images were given"]),
    ],
)
def test_a_prompt_that_does_not_fit_its_images_is_refused(model, prompts, num_images, counts, words):
    ids, mask = batch(*prompts)
    images = pixels(num_images) if num_images else None
    with pytest.raises(ValueError) as error:
        model(ids, images, mask, visual_token_counts=None if counts is None else torch.tensor(counts))
    for word in words:
        assert word in str(error.value)


def test_ids_and_embeddings_together_are_refused(model):
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(torch.tensor([[5]]), inputs_embeds=torch.zeros(1, 1, 48))
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_pixels_and_features_together_are_refused(model):
    images = pixels(1)
    with pytest.raises(ValueError, match="`pixel_values` or `mm_encoder_outputs`, not both"):
        model(torch.tensor([prompt(4)]), images, mm_encoder_outputs={"image": model.get_image_features(images)})


def test_an_image_token_outside_the_vocabulary_works():
    model = tiny_model(image_token_index=5000)
    ids = torch.tensor([[5] + [5000] * 4 + [6]])
    inside = torch.tensor([prompt([5], 4, [6])])
    images = pixels(1)
    logits = model(ids, images).logits
    model.config.image_token_index = IMAGE
    assert torch.equal(model(inside, images).logits, logits)


def test_the_loss_is_that_of_the_answer_alone(model):
    ids = torch.tensor([prompt([5], 4, [6, 7, 2])])
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    images = pixels(1)
    output = model(ids, images, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, -3:-1], ids[0, -2:])
    torch.testing.assert_close(output.loss, expected)


def test_logits_to_keep_are_the_last_logits(model):
    ids, images = torch.tensor([prompt([5], 4, [6, 7])]), pixels(1)
    whole = model(ids, images).logits
    torch.testing.assert_close(model(ids, images, logits_to_keep=1).logits, whole[:, -1:])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 2] = True
    torch.testing.assert_close(model(ids, images, logits_to_keep=mask).logits, whole[0, 2:3])


def test_hidden_states_and_attentions_are_the_language_models(model):
    model.set_attn_implementation("eager")
    output = model(torch.tensor([prompt([5], 4)]), pixels(1), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(1, 5, 48)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(1, 4, 5, 5)] * 2
    assert output.image_hidden_states.shape == (16, 48)


def test_a_cache_continues_the_prompt(model):
    ids, images = torch.tensor([prompt([5], 4, [6, 7, 8])]), pixels(1)
    first = model(ids[:, :-2], images, use_cache=True)
    second = model(ids[:, -2:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(ids, images).logits[:, -2:], atol=1e-4, rtol=1e-4)


# --- language models --------------------------------------------------------------------------------------------------

LANGUAGE_MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "smollm3": {},
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 96, "do_layer_norm_before": True},
    "gpt2": {},
    "gpt_neox": {},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_are_the_causal_language_models_own(name, tied, tmp_path):
    text = text_config(name, tie_word_embeddings=tied, **LANGUAGE_MODELS[name])
    model = tiny_model(text_config=text)
    causal = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    causal.base_model.load_state_dict(model.model.language_model.state_dict())
    causal.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(ids).logits, causal(ids).logits, atol=1e-4, rtol=1e-4)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    ids, images = torch.tensor([prompt([5], 4, [6])]), pixels(1)
    torch.testing.assert_close(loaded(ids, images).logits, model(ids, images).logits)
    assert loaded.generate(ids, pixel_values=images, num_visual_tokens=2, max_new_tokens=2, min_new_tokens=2).shape == (
        1,
        8,
    )


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"])
def test_saved_weights_equal_loaded(model, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "40KB")
    loaded, report = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_base_model_loads_from_the_whole_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MqtLlavaModel
    assert torch.equal(base.query_transformer.query, model.model.query_transformer.query)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loads_and_runs_in_half_precision(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    logits = loaded(torch.tensor([prompt([5], 4, [6])]), pixels(1)).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_a_device_map_changes_no_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu")
    ids, images = torch.tensor([prompt([5], 4, [6])]), pixels(1)
    torch.testing.assert_close(loaded(ids, images).logits, model(ids, images).logits)


def test_parts_on_disk_change_no_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    device_map = {
        "model.vision_tower": "disk",
        "model.query_transformer": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    loaded = MqtLlavaForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    ids, images = torch.tensor([prompt([5], 4, [6])]), pixels(1)
    torch.testing.assert_close(loaded(ids, images).logits, model(ids, images).logits)


# --- what users of Transformers expect --------------------------------------------------------------------------------


def test_attention_is_chosen_per_sub_model(model):
    model.set_attn_implementation({"": "eager", "vision_config": "eager", "text_config": "sdpa"})
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert model.model.query_transformer.attn.config._attn_implementation == "eager"


def test_eager_attention_gives_the_logits_of_sdpa(model):
    ids, mask = batch(prompt([5], 16, [6, 7], 3, [8]), prompt([5, 9], 5, [10]))
    images = pixels(3)
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(ids, images, mask).logits[mask.bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-4, rtol=1e-4)


def test_flex_attention_gives_the_logits_of_sdpa(model):
    ids, images = torch.tensor([prompt([5], 16, [6, 7])]), pixels(1)
    with torch.no_grad():
        sdpa = model(ids, images).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids, images).logits, sdpa, atol=1e-4, rtol=1e-4)


def test_flash_attention_without_its_package_is_an_import_error(model):
    with pytest.raises(ImportError, match="FlashAttention2"):
        model.set_attn_implementation("flash_attention_2")


def test_activation_checkpointing_changes_no_gradient(model):
    ids = torch.tensor([prompt([5], 7, [6, 7])])
    images = pixels(1)

    def gradients():
        model.zero_grad()
        model.train()
        model(ids, images, labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("m", [1, 5, 16])
def test_forward_compiles_to_one_graph(model, m):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask = batch(prompt([5], m, [6, 7], m, [8]), prompt([5, 9], m, [10, 11]))
    images = pixels(3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, images, mask).logits, model(ids, images, mask).logits)


def test_adapters_learn_the_language_model_with_the_query_transformer(model, tmp_path):
    config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["query_transformer"])
    adapted = get_peft_model(model, config)
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("language_model" in name or "query_transformer" in name for name in learning)
    assert any("query_transformer" in name for name in learning)
    ids, images = torch.tensor([prompt([5], 4, [6, 7])]), pixels(1)
    adapted(input_ids=ids, pixel_values=images, labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
    assert adapted.generate(
        input_ids=ids, pixel_values=images, num_visual_tokens=3, max_new_tokens=2, min_new_tokens=2
    ).shape == (1, 9)
    assert adapted.get_image_features(images).pooler_output[0].shape == (16, 48)


def test_quantizers_convert_the_layers_of_the_language_model_alone(model):
    for whole in (model, model.model):  # the names of the parts begin with `model.` or do not
        linear = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
        converted = {name for name in linear if should_convert_module(name, MODULES_NOT_TO_QUANTIZE)}
        assert converted == {name for name in linear if "language_model." in name}
    assert "lm_head" in get_keys_to_not_convert(model)


def test_tensor_parallel_plan_covers_language_model_and_head(model):
    assert model.supports_tp_plan
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    assert any(name.startswith("model.language_model.layers") for name in model.tp_plan)


def test_resized_embeddings_keep_head_and_config_in_step(model):
    model.resize_token_embeddings(64)
    assert model.lm_head.out_features == model.config.text_config.vocab_size == 64
    assert model(torch.tensor([prompt([5], 4)]), pixels(1)).logits.shape[-1] == 64


def test_embeddings_alone_find_the_placeholders_by_value(model):
    ids, images = torch.tensor([prompt([5], 4, [6])]), pixels(1)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, pixel_values=images).logits, model(ids, images).logits)


def test_a_four_dimensional_mask_reaches_the_language_model(model):
    """Several questions about one image can share a row, each blind to the others."""
    processor = tiny_processor()
    inputs = processor(images=picture(1), text="<image> what is", num_visual_tokens=3, return_tensors="pt")
    ids = inputs["input_ids"]
    packed = torch.cat([ids, torch.tensor([[8, 9]])], dim=1)
    allowed = torch.ones(len(packed[0]), len(packed[0]), dtype=torch.bool).tril()
    allowed[ids.shape[1] :, 3 : ids.shape[1]] = False
    positions = torch.tensor([[*range(ids.shape[1]), 3, 4]])
    logits = model(packed, inputs["pixel_values"], allowed[None, None], positions).logits[0]
    alone = model(torch.cat([ids[:, :3], packed[:, -2:]], dim=1), inputs["pixel_values"]).logits[0]
    torch.testing.assert_close(logits[: ids.shape[1]], model(ids, inputs["pixel_values"]).logits[0])
    torch.testing.assert_close(logits[-2:], alone[-2:])
