import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, picture, tiny_processor, tiny_tokenizer
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoProcessor

from mqt_llava import MqtLlavaProcessor
from mqt_llava.processing_mqt_llava import upright_rgb


IMAGE = 4


def test_one_placeholder_run_per_image(processor):
    output = processor(
        images=[picture(1), picture(2), picture(3)],
        text=["what is <image> and <image>", "<image> this"],
        num_visual_tokens=[3, 5, 2],
        padding=True,
        return_tensors="pt",
    )
    assert output["input_ids"].tolist() == [
        [5, 6, *[IMAGE] * 3, 20, *[IMAGE] * 5],
        [0] * 8 + [IMAGE] * 2 + [21],
    ]
    assert output["attention_mask"].tolist() == [[1] * 11, [0] * 8 + [1] * 3]
    assert output["pixel_values"].shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert output["visual_token_counts"].tolist() == [3, 5, 2]
    assert output["visual_token_counts"].dtype == torch.long


@pytest.mark.parametrize(("saved", "called", "expected"), [(None, None, 16), (6, None, 6), (6, 2, 2), (None, 2, 2)])
def test_the_call_wins_over_the_saved_budget_and_that_over_the_maximum(saved, called, expected):
    processor = tiny_processor(num_visual_tokens=saved)
    output = processor(images=picture(), text="<image>", num_visual_tokens=called)
    assert output["visual_token_counts"] == [expected]


@pytest.mark.parametrize("value", [0, -1, 17, [], [3], [3, 4, 5], [3, 17]])
def test_a_budget_out_of_range_is_refused(processor, value):
    with pytest.raises(ValueError, match="`num_visual_tokens`"):
        processor(images=[picture(), picture()], text="<image> <image>", num_visual_tokens=value)


@pytest.mark.parametrize("value", [True, 2.5, "16"])
def test_a_budget_of_the_wrong_type_is_refused(processor, value):
    with pytest.raises((ValueError, StrictDataclassError), match="num_visual_tokens"):
        processor(images=picture(), text="<image>", num_visual_tokens=value)


@pytest.mark.parametrize("value", [0, 17, "16"])
def test_a_saved_budget_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="between 1 and 16"):
        tiny_processor(num_visual_tokens=value)


def test_a_tokenizer_without_the_image_token_is_refused():
    with pytest.raises(ValueError, match="`tokenizer` must know the image token '<picture>'"):
        tiny_processor(image_token="<picture>")


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([picture()], "no placeholder"),
        ([picture()], "<image> <image>"),
        (None, "<image>"),
        ([[picture(), picture()], [picture()]], ["<image>", "<image> <image>"]),
    ],
)
def test_images_that_do_not_fit_their_prompts_are_refused(processor, images, text):
    with pytest.raises(ValueError, match="<image>"):
        processor(images=images, text=text)


def test_truncation_that_would_cut_an_image_is_refused(processor):
    with pytest.raises(ValueError, match="image"):
        processor(images=picture(), text="what <image>", truncation=True, max_length=8)


def test_token_types_mark_the_placeholders(processor):
    output = processor(images=picture(), text="what <image> is", num_visual_tokens=3, return_mm_token_type_ids=True)
    assert output["mm_token_type_ids"] == [[0, 1, 1, 1, 0]]


def test_their_output_goes_to_generate_as_it_is(model, processor):
    inputs = processor(images=picture(), text="what <image>", return_tensors="pt", return_mm_token_type_ids=True)
    assert model.generate(**inputs, num_visual_tokens=2, max_new_tokens=1).shape == (1, 18)


def test_serving_engines_learn_the_number_of_placeholders(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[[10, 20], [30, 30]], num_visual_tokens=[3, 5])
    assert data["num_image_tokens"] == [3, 5]
    assert data["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens(image_sizes=[[10, 20]])["num_image_tokens"] == [16]


def test_replacement_offsets_span_each_run(processor):
    output = processor(
        images=[picture(), picture()],
        text="a <image> <image>",
        num_visual_tokens=[2, 1],
        return_text_replacement_offsets=True,
    )
    spans = [replacement["new_span"] for replacement in output["text_replacement_offsets"][0]]
    assert spans == [(2, 16), (17, 24)]


def test_saved_processor_equals_loaded(tmp_path):
    processor = tiny_processor(num_visual_tokens=6)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MqtLlavaProcessor
    assert (loaded.max_visual_tokens, loaded.num_visual_tokens) == (16, 6)
    assert loaded.chat_template == processor.chat_template
    inputs = {"images": picture(1, (40, 24)), "text": "what <image>", "return_tensors": "pt"}
    for name, value in processor(**inputs).items():
        assert torch.equal(loaded(**inputs)[name], value)
    assert MqtLlavaProcessor.from_pretrained(tmp_path, num_visual_tokens=3).num_visual_tokens == 3


def test_ids_come_first_for_samplers_by_length(processor):
    assert processor.model_input_names[0] == "input_ids"
    assert {"pixel_values", "visual_token_counts"} <= set(processor.model_input_names)


# --- chat -------------------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is this"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]},
    {"role": "user", "content": "how many"},
    {"role": "assistant", "content": "two"},
]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def test_the_default_template_is_vicuna_v1(processor):
    expected = f"{SYSTEM} USER: <image>\nwhat is this ASSISTANT: a red square</s>USER: how many ASSISTANT: two</s>"
    assert processor.apply_chat_template(CONVERSATION) == expected
    prompt = processor.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True)
    assert prompt == f"{SYSTEM} USER: <image>\nwhat is this ASSISTANT:"


def test_a_system_message_replaces_the_default_one(processor):
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION[:1]]
    assert processor.apply_chat_template(messages) == "Be brief. USER: <image>\nwhat is this "


def test_an_unknown_role_is_refused(processor):
    with pytest.raises(Exception, match="Roles must be user or assistant"):
        processor.apply_chat_template([{"role": "tool", "content": "5"}])


def test_a_template_of_the_tokenizer_is_kept():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    processor = MqtLlavaProcessor(tiny_processor().image_processor, tokenizer)
    assert processor.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("budget", [1, 4, 16])
def test_the_mask_of_answers_covers_them_and_their_end(processor, budget):
    output = processor.apply_chat_template(
        CONVERSATION,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"num_visual_tokens": budget},
    )
    assert output["visual_token_counts"].tolist() == [budget]
    assert (output["input_ids"] == IMAGE).sum() == budget
    answers = output["input_ids"][output["assistant_masks"].bool()]
    # the word-level tokenizer glues "</s>USER:" to neither side: `</s>` is special
    assert processor.tokenizer.convert_ids_to_tokens(answers) == ["a", "red", "square", "</s>", "two", "</s>"]


# --- images of any mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV"])
def test_any_mode_gives_the_pixels_of_its_rgb(processor, mode):
    image = picture(1, (30, 20)).convert(mode)
    ours = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(
        ours, processor(images=image.convert("RGB"), text="<image>", return_tensors="pt")["pixel_values"]
    )


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert upright_rgb(Image.fromarray(grey))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["I", "F", "La"])
def test_a_mode_without_a_fixed_range_is_refused(processor, mode):
    image = picture().convert("LA").convert("La") if mode == "La" else picture().convert(mode)
    with pytest.raises(ValueError, match=f"`images` must be convertible to RGB, got mode '{mode}'"):
        processor(images=image, text="<image>")


def test_a_rotated_photo_is_turned_upright():
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6  # the camera was held turned: rotate by 90 degrees
    upright = upright_rgb(image)
    assert upright.shape == (3, 2, 3)
    assert upright[0, 1].tolist() == [255] * 3


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 3), (1, 50), (3, 7), (7, 3)])
def test_tiny_images_keep_their_colours(processor, size):
    """A 3-pixel side must not be taken for the colour axis."""
    image = Image.new("RGB", size, (200, 100, 50))
    output = processor(images=image, text="<image>", return_tensors="pt", images_kwargs={"do_pad": False})
    large = processor(images=Image.new("RGB", (30, 30), (200, 100, 50)), text="<image>", return_tensors="pt")
    torch.testing.assert_close(output["pixel_values"], large["pixel_values"])


def test_padding_is_of_the_mean_colour(processor):
    wide = Image.new("RGB", (48, 24), (255, 255, 255))
    pixels = processor(images=wide, text="<image>", return_tensors="pt")["pixel_values"][0]
    assert pixels[:, 0].abs().max() < 0.02  # normalised, the mean is 0; the bar is whole bytes of it
    assert pixels[:, 12].min() > 1.9


def test_arrays_and_files_are_taken_like_pictures(processor, tmp_path):
    image = picture(1)
    image.save(tmp_path / "a.png")
    expected = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    for other in (np.asarray(image), str(tmp_path / "a.png"), torch.from_numpy(np.asarray(image).copy())):
        output = processor(images=other, text="<image>", return_tensors="pt")
        torch.testing.assert_close(output["pixel_values"], expected)
