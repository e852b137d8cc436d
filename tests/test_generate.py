import numpy as np
import pytest
import reference
import torch
from conftest import MAX_VISUAL_TOKENS, picture, text_config, tiny_model, tiny_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    pipeline,
)

from mqt_llava.modeling_mqt_llava import left_pad, resize_placeholder_runs


IMAGES = [picture(1), picture(2, (40, 24)), picture(3, (10, 30))]
TEXTS = ["what is <image> and <image> how", "what <image>"]
BUDGETS = [1, 2, 3, 7, 15, 16]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


@pytest.fixture
def inputs_at(processor):
    """Two prompts with two images and one, processed at a budget."""

    def process(num_visual_tokens=None, **kwargs):
        return processor(
            images=IMAGES, text=TEXTS, num_visual_tokens=num_visual_tokens, return_tensors="pt", padding=True, **kwargs
        )

    return process


def answers(output, inputs):
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


# --- the same as a prompt processed at that budget --------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 5},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("budget", [*BUDGETS, [3, 16, 1]], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_any_budget_gives_the_tokens_of_a_prompt_processed_at_it(model, inputs_at, way, budget):
    native = inputs_at(budget)
    expected = answers(model.generate(**native, **{**GREEDY, **WAYS[way]}), native)
    for processed_at in (None, 5):
        inputs = inputs_at(processed_at)
        output = model.generate(**inputs, num_visual_tokens=budget, **{**GREEDY, **WAYS[way]})
        assert torch.equal(answers(output, inputs), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_greedy_tokens_are_the_argmax_of_forward(model, processor, budget):
    inputs = processor(images=IMAGES[0], text="what <image> is", num_visual_tokens=budget, return_tensors="pt")
    ids = inputs.pop("input_ids")
    grown = ids
    for _ in range(4):
        logits = model(input_ids=grown, **{**inputs, "attention_mask": None}).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], dim=1)
    wide = processor(images=IMAGES[0], text="what <image> is", return_tensors="pt")
    output = model.generate(**wide, num_visual_tokens=budget, **{**GREEDY, "max_new_tokens": 4})
    assert torch.equal(answers(output, wide), grown[:, ids.shape[1] :])


def test_budgets_change_the_answer(model, inputs_at):
    """Otherwise the tests above would compare equal things."""
    inputs = inputs_at()
    outputs = {tuple(model.generate(**inputs, num_visual_tokens=m, **GREEDY)[0].tolist()) for m in BUDGETS}
    assert len(outputs) > 3


def test_a_batch_gives_the_tokens_of_its_prompts_alone(model, processor, inputs_at):
    inputs = inputs_at()
    together = answers(model.generate(**inputs, num_visual_tokens=[4, 7, 2], **GREEDY), inputs)
    for row, (images, budget) in enumerate([(IMAGES[:2], [4, 7]), (IMAGES[2:], 2)]):
        alone = processor(images=images, text=TEXTS[row], return_tensors="pt")
        output = model.generate(**alone, num_visual_tokens=budget, **GREEDY)
        assert torch.equal(answers(output, alone)[0], together[row])


@pytest.mark.parametrize("budget", [None, 3, 16])
def test_right_padding_gives_the_tokens_of_left_padding(model, inputs_at, budget):
    left, right = inputs_at(), inputs_at(text_kwargs={"padding_side": "right"})
    assert right["attention_mask"][1, -1] == 0
    expected = answers(model.generate(**left, num_visual_tokens=budget, **GREEDY), left)
    output = model.generate(**right, num_visual_tokens=budget, **GREEDY)
    assert torch.equal(answers(output, right), expected)


def test_a_prompt_without_a_mask_is_read_as_generate_reads_it(model, inputs_at):
    inputs = inputs_at()
    expected = answers(model.generate(**inputs, num_visual_tokens=3, **GREEDY), inputs)
    del inputs["attention_mask"]
    assert torch.equal(answers(model.generate(**inputs, num_visual_tokens=3, **GREEDY), inputs), expected)


def test_images_side_by_side_are_told_apart_by_their_counts(model, processor):
    images, text = IMAGES[:2], "what <image><image> is"
    native = processor(images=images, text=text, num_visual_tokens=[3, 6], return_tensors="pt")
    expected = answers(model.generate(**native, **GREEDY), native)
    inputs = processor(images=images, text=text, num_visual_tokens=[9, 1], return_tensors="pt")
    assert torch.equal(answers(model.generate(**inputs, num_visual_tokens=[3, 6], **GREEDY), inputs), expected)


@pytest.mark.parametrize("budget", [2, 11])
def test_sampling_draws_what_it_draws_at_a_native_prompt(model, inputs_at, budget):
    draws = []
    for inputs, m in ((inputs_at(budget), None), (inputs_at(), budget)):
        torch.manual_seed(3)
        output = model.generate(
            **inputs, num_visual_tokens=m, do_sample=True, num_return_sequences=3, max_new_tokens=5, eos_token_id=None
        )
        draws.append(answers(output, inputs))
    assert torch.equal(*draws)
    assert len(draws[0]) == 6


@pytest.mark.parametrize("budget", [2, 16])
def test_assisted_generation_gives_the_greedy_tokens(model, processor, budget):
    inputs = processor(images=IMAGES[0], text="what <image> is", return_tensors="pt")
    expected = model.generate(**inputs, num_visual_tokens=budget, **GREEDY)
    draft = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    for assistant in (model, tiny_model(), draft):
        output = model.generate(**inputs, num_visual_tokens=budget, assistant_model=assistant, **GREEDY)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("budget", [2, 16])
def test_prompt_lookup_gives_the_greedy_tokens(model, processor, budget):
    inputs = processor(images=IMAGES[0], text="what <image> is what", return_tensors="pt")
    expected = model.generate(**inputs, num_visual_tokens=budget, **GREEDY)
    output = model.generate(**inputs, num_visual_tokens=budget, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(output, expected)


def test_an_adapted_model_generates_at_any_budget(model, inputs_at):
    inputs, native = inputs_at(), inputs_at(3)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = answers(adapted.generate(**native, **GREEDY), native)
    assert torch.equal(answers(adapted.generate(**inputs, num_visual_tokens=3, **GREEDY), inputs), expected)


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_sequences_start_with_the_callers_own_ids(model, inputs_at, way):
    inputs = inputs_at()
    output = model.generate(**inputs, num_visual_tokens=2, **{**GREEDY, **WAYS[way]})
    times = len(output) // 2
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(times, 0))
    assert output.shape[1] == inputs["input_ids"].shape[1] + 6


def test_a_dict_comes_back_with_sequences_and_scores(model, inputs_at):
    inputs = inputs_at()
    output = model.generate(**inputs, num_visual_tokens=2, return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert torch.equal(output.sequences, model.generate(**inputs, num_visual_tokens=2, **GREEDY))
    assert len(output.scores) == 6


def test_the_callers_inputs_are_left_as_they_were(model, inputs_at):
    inputs = inputs_at()
    features = {"image": model.get_image_features(inputs.pop("pixel_values"))}
    before = {name: value.clone() for name, value in inputs.items()}
    lengths = [len(image) for image in features["image"].pooler_output]
    model.generate(**inputs, mm_encoder_outputs=features, num_visual_tokens=2, num_beams=2, **GREEDY)
    for name, value in before.items():
        assert torch.equal(inputs[name], value)
    assert [len(image) for image in features["image"].pooler_output] == lengths == [MAX_VISUAL_TOKENS] * 3


def test_the_tower_runs_once_for_many_budgets(model, inputs_at, monkeypatch):
    calls = []
    forward = model.model.vision_tower.forward
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    inputs = inputs_at()
    expected = [model.generate(**inputs, num_visual_tokens=m, **GREEDY) for m in BUDGETS]
    assert len(calls) == len(BUDGETS)

    calls.clear()
    features = model.get_image_features(inputs.pop("pixel_values"))
    for m, tokens in zip(BUDGETS, expected):
        output = model.generate(**inputs, mm_encoder_outputs={"image": features}, num_visual_tokens=m, **GREEDY)
        assert torch.equal(output, tokens)
    assert len(calls) == 1


def test_prompts_without_images_generate(model, processor):
    inputs = processor(text=["what is", "this"], return_tensors="pt", padding=True)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, num_visual_tokens=4, **GREEDY), expected)


def test_a_prompt_without_images_may_stand_beside_one_with_images(model, processor):
    inputs = processor(images=IMAGES[:1], text=["what is this", "a <image>"], return_tensors="pt", padding=True)
    native = processor(
        images=IMAGES[:1], text=["what is this", "a <image>"], num_visual_tokens=3, return_tensors="pt", padding=True
    )
    expected = answers(model.generate(**native, **GREEDY), native)
    assert torch.equal(answers(model.generate(**inputs, num_visual_tokens=3, **GREEDY), inputs), expected)


# --- the default budget -----------------------------------------------------------------------------------------------


def test_the_default_budget_survives_save_and_load(model, inputs_at, tmp_path):
    inputs = inputs_at()
    expected = model.generate(**inputs, num_visual_tokens=5, **GREEDY)
    model.generation_config.num_visual_tokens = 5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.generation_config.num_visual_tokens == 5
    assert torch.equal(loaded.generate(**inputs, **GREEDY), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert again.generation_config.num_visual_tokens == 5


def test_the_call_wins_over_its_config_and_that_over_the_models(model, inputs_at):
    inputs = inputs_at()
    model.generation_config.eos_token_id = None
    at = {m: model.generate(**inputs, num_visual_tokens=m, **GREEDY) for m in (2, 5, 16)}
    assert not torch.equal(at[2], at[5])
    model.generation_config.num_visual_tokens = 16
    config = GenerationConfig(num_visual_tokens=5, pad_token_id=0, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), at[16])
    assert torch.equal(model.generate(**inputs, generation_config=config), at[5])
    assert torch.equal(model.generate(**inputs, generation_config=config, num_visual_tokens=2), at[2])


# --- caches -----------------------------------------------------------------------------------------------------------


def test_a_cache_continues_a_prompt_of_its_own_budget(model, processor):
    first = processor(images=IMAGES[0], text="what <image> is", num_visual_tokens=4, return_tensors="pt")
    output = model.generate(**first, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([output.sequences, torch.tensor([[8, 9]])], dim=1)
    continued = model.generate(longer, past_key_values=output.past_key_values, **GREEDY)
    fresh = model.generate(longer, pixel_values=first["pixel_values"], **GREEDY)
    assert torch.equal(continued, fresh)


def test_a_cache_filled_at_another_budget_than_the_prompts_is_refused(model, processor):
    """The returned ids are the caller's, with 16 placeholders; the cache behind them holds 4."""
    inputs = processor(images=IMAGES[0], text="what <image> is", return_tensors="pt")
    output = model.generate(**inputs, num_visual_tokens=4, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match=r"`past_key_values` holds \[4\] visual tokens, but the prompts have \[16\]"):
        model.generate(output.sequences, past_key_values=output.past_key_values, **GREEDY)


def test_a_cache_takes_one_more_image(model, processor):
    first = processor(images=IMAGES[0], text="what <image> is", num_visual_tokens=4, return_tensors="pt")
    output = model.generate(**first, return_dict_in_generate=True, **GREEDY)
    second = processor(images=IMAGES[1], text="how <image> many", num_visual_tokens=3, return_tensors="pt")
    ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
    both = torch.cat([first["pixel_values"], second["pixel_values"]])
    expected = model.generate(ids, pixel_values=both, **GREEDY)
    continued = model.generate(
        ids, pixel_values=second["pixel_values"], past_key_values=output.past_key_values, **GREEDY
    )
    assert torch.equal(continued, expected)


@pytest.mark.parametrize("budget", [4, 16])
def test_one_more_image_does_not_hide_a_cache_of_another_budget(model, processor, budget):
    first = processor(images=IMAGES[0], text="what <image> is", num_visual_tokens=20 - budget, return_tensors="pt")
    output = model.generate(**first, num_visual_tokens=budget, return_dict_in_generate=True, **GREEDY)
    second = processor(images=IMAGES[1], text="how <image> many is what", num_visual_tokens=9, return_tensors="pt")
    ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
    with pytest.raises(ValueError, match=rf"`past_key_values` holds \[{budget}\] visual tokens"):
        model.generate(ids, pixel_values=second["pixel_values"], past_key_values=output.past_key_values, **GREEDY)


def test_a_cache_with_another_budget_asked_for_is_refused(model, processor):
    inputs = processor(images=IMAGES[0], text="what <image> is", num_visual_tokens=4, return_tensors="pt")
    output = model.generate(**inputs, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match=r"`num_visual_tokens` is 8, but `past_key_values` .* \[4\]"):
        model.generate(output.sequences, past_key_values=output.past_key_values, num_visual_tokens=8, **GREEDY)


def test_an_empty_cache_takes_any_budget(model, inputs_at):
    inputs = inputs_at()
    expected = model.generate(**inputs, num_visual_tokens=3, **GREEDY)
    output = model.generate(**inputs, num_visual_tokens=3, past_key_values=DynamicCache(), **GREEDY)
    assert torch.equal(output, expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [0, -1, 17, 2.5, "16", True, [], [3], [3, 4], [3, 4, 5, 6], [3, 4, 0], [3, 4, 17], [3, 4, "5"], [3, 4, True]],
)
def test_a_wrong_budget_is_refused_with_the_range_and_the_value(model, inputs_at, value):
    with pytest.raises(ValueError) as error:
        model.generate(**inputs_at(), num_visual_tokens=value, **GREEDY)
    message = str(error.value)
    assert "`num_visual_tokens`" in message
    assert repr(value) in message
    assert "between 1 and 16" in message or "one per image (3" in message


def test_whole_numbers_of_other_libraries_are_taken(model, inputs_at):
    inputs = inputs_at()
    expected = model.generate(**inputs, num_visual_tokens=[3, 4, 5], **GREEDY)
    for value in (np.array([3, 4, 5]), torch.tensor([3, 4, 5]), (3, 4, 5), [np.int64(3), 4, 5]):
        assert torch.equal(model.generate(**inputs, num_visual_tokens=value, **GREEDY), expected)


@pytest.mark.parametrize("typo", ["num_visual_tokenz", "num_visual_token", "pixel_value"])
def test_a_misspelt_argument_is_refused(model, inputs_at, typo):
    with pytest.raises(ValueError, match=typo):
        model.generate(**inputs_at(), **{typo: 4}, **GREEDY)


def test_placeholders_without_images_are_refused(model, inputs_at):
    inputs = inputs_at()
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="Prompt 0 has 32 image placeholders, but there are no images"):
        model.generate(**inputs, **GREEDY)


def test_more_tokens_than_were_encoded_are_refused(model, inputs_at):
    inputs = inputs_at(2)
    features = model.get_image_features(inputs.pop("pixel_values"), torch.tensor([4, 4, 4]))
    with pytest.raises(ValueError, match="`num_visual_tokens` is 8 for image 0.*have 4 tokens"):
        model.generate(**inputs, mm_encoder_outputs={"image": features}, num_visual_tokens=8, **GREEDY)


def test_pixels_and_features_together_are_refused(model, inputs_at):
    inputs = inputs_at()
    features = model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="not both"):
        model.generate(**inputs, mm_encoder_outputs={"image": features}, **GREEDY)


def test_positions_cannot_follow_a_rewritten_prompt(model, inputs_at):
    inputs = inputs_at()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with pytest.raises(ValueError, match="`position_ids` cannot follow"):
        model.generate(**inputs, position_ids=positions, num_visual_tokens=2, **GREEDY)


def test_embeddings_cannot_be_rewritten(model):
    with pytest.raises(ValueError, match="`num_visual_tokens` needs `input_ids`"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 48), num_visual_tokens=2, **GREEDY)


# --- the image token --------------------------------------------------------------------------------------------------


class WantsTheImageToken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 4] = scores[:, 4] + 1000
        return scores


@pytest.mark.parametrize(
    "settings_", [{}, {"suppress_tokens": [5]}, {"generation_config": GenerationConfig(suppress_tokens=[5])}], ids=str
)
def test_the_image_token_is_never_generated(model, inputs_at, settings_):
    with torch.no_grad():
        model.lm_head.weight[4] = model.lm_head.weight.mean(0) * 50  # a model that loves to say <image>
        model.lm_head.weight[5] = model.lm_head.weight[4] * 0.99
    inputs = inputs_at()
    kwargs = {"do_sample": False, "max_new_tokens": 8, **settings_}
    if "generation_config" in settings_:
        kwargs = {"generation_config": settings_["generation_config"], "max_new_tokens": 8}
    new = answers(model.generate(**inputs, num_visual_tokens=4, **kwargs), inputs)
    assert not (new == 4).any()
    assert (new == 5).any() == (not settings_)


# --- pipelines --------------------------------------------------------------------------------------------------------


def test_a_pipeline_answers_at_any_budget(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "what is this"}],
        }
    ]
    seen = set()
    for m in (1, 4, 16):
        said = pipe(
            text=conversation,
            generate_kwargs={"num_visual_tokens": m, "eos_token_id": None, "do_sample": False, "max_new_tokens": 6},
            return_full_text=False,
        )[0]["generated_text"]
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        direct = answers(model.generate(**inputs, num_visual_tokens=m, **GREEDY), inputs)
        assert said.split() == processor.decode(direct[0], skip_special_tokens=True).split()
        seen.add(said)
    assert len(seen) > 1


# --- rewriting, against a slow loop -----------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """Prompts of words (5..9) and images, padded left or right with 0, with old and new budgets per image."""
    side = draw(st.sampled_from(["left", "right"]))
    budget = st.integers(1, 6)
    prompts, old = [], []
    for _ in range(draw(st.integers(1, 4))):
        row = []
        for part in draw(st.lists(st.one_of(st.integers(5, 9), st.just("image")), min_size=1, max_size=8)):
            if part == "image":
                old.append(draw(budget))
                row += [4] * old[-1]
            else:
                row.append(part)
        prompts.append(row)
    longest = max(map(len, prompts)) + draw(st.integers(0, 2))
    rows, masks = [], []
    for row in prompts:
        pad = [0] * (longest - len(row))
        rows.append(pad + row if side == "left" else row + pad)
        masks.append(pad + [1] * len(row) if side == "left" else [1] * len(row) + pad)
    return rows, masks, old, [draw(budget) for _ in old]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_rewriting_is_the_slow_loop(batch):
    rows, masks, old, new = batch
    ids = torch.tensor(rows)
    fast = resize_placeholder_runs(ids, ids == 4, torch.tensor(masks).bool(), old, new)
    slow = reference.rewrite(rows, masks, 4, old, new)
    assert [row.tolist() for row in fast] == slow
    padded = left_pad(fast, 0)
    assert [row[len(row) - len(s) :].tolist() for row, s in zip(padded, slow)] == slow
    assert padded.shape[1] == max(map(len, slow))


FUZZED = tiny_model(text_config=text_config(num_hidden_layers=1))
FUZZED_PROCESSOR = tiny_processor()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["what", "is", "<image>"]), min_size=1, max_size=5), min_size=1, max_size=3),
    st.data(),
)
def test_generation_from_any_prompt_is_generation_from_one_at_that_budget(words, data):
    texts = [" ".join(row) for row in words]
    num_images = sum(text.count("<image>") for text in texts)
    budgets = st.lists(st.integers(1, 16), min_size=num_images, max_size=num_images)
    processed_at, budget = data.draw(budgets), data.draw(budgets)
    images = [picture(i) for i in range(num_images)] or None

    def process(counts):
        return FUZZED_PROCESSOR(
            images=images, text=texts, num_visual_tokens=counts or None, return_tensors="pt", padding=True
        )

    native, inputs = process(budget), process(processed_at)
    greedy = {**GREEDY, "max_new_tokens": 3}
    expected = answers(FUZZED.generate(**native, **greedy), native)
    output = FUZZED.generate(**inputs, num_visual_tokens=budget if images else None, **greedy)
    assert torch.equal(answers(output, inputs), expected)
