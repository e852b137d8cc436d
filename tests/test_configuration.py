import inspect
import re

import pytest
from conftest import text_config, tiny_config, vision_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mqt_llava import MqtLlavaConfig, MqtLlavaModel


def test_defaults_are_the_released_7b_models():
    config = MqtLlavaConfig()
    assert config.max_visual_tokens == 256
    assert config.query_num_attention_heads == 16
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    assert config.query_init == "authors"
    assert config.image_token_id == config.image_token_index == 32000
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (1024, 336)
    assert config.vision_config.model_type == "clip_vision_model"
    assert config.text_config.model_type == "llama"


def test_sub_configs_are_taken_as_objects_or_dicts():
    by_object = tiny_config(vision_config=CLIPVisionConfig(hidden_size=32, num_attention_heads=4))
    assert by_object.vision_config.hidden_size == 32
    assert isinstance(tiny_config(text_config=text_config("llama")).text_config, LlamaConfig)


def test_saved_config_equals_loaded(tmp_path):
    config = tiny_config(query_init="local", vision_feature_layer=1)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MqtLlavaConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_visual_tokens": 15}, ["perfect square", "15"]),
        ({"max_visual_tokens": 0}, ["perfect square", "0"]),
        ({"max_visual_tokens": -4}, ["perfect square", "-4"]),
        ({"max_visual_tokens": 10**10}, ["65536", str(10**10)]),
        ({"max_visual_tokens": "16"}, ["max_visual_tokens", "16"]),
        ({"max_visual_tokens": True}, ["max_visual_tokens", "bool"]),
        ({"max_visual_tokens": 16.0}, ["max_visual_tokens", "float"]),
        ({"query_num_attention_heads": 5}, ["divide", "32", "5"]),
        ({"query_num_attention_heads": 0}, ["positive", "0"]),
        ({"vision_feature_layer": 4}, ["between 1 and 3", "4"]),
        ({"vision_feature_layer": 0}, ["between 1 and 3", "0"]),
        ({"vision_feature_layer": -4}, ["between -3 and -1", "-4"]),
        ({"vision_feature_select_strategy": "patch"}, ["vision_feature_select_strategy", "patch"]),
        ({"query_init": "global"}, ["query_init", "global"]),
        ({"image_token_index": -200}, ["image_token_index", "-200"]),
        ({"vision_config": vision_config(hidden_size=34, num_attention_heads=2), "query_num_attention_heads": 2},
         ["multiple of 4", "34"]),
        ({"vision_config": {"model_type": "clip"}}, ["vision_config", "clip"]),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, ["siglip_vision_model", "siglip2_vision_model"]),
        ({"vision_config": vision_config(num_hidden_layers=-3)}, ["num_hidden_layers", "-3"]),
        ({"text_config": text_config(num_hidden_layers=-1)}, ["num_hidden_layers", "-1"]),
        ({"text_config": text_config(vocab_size=0)}, ["vocab_size", "0"]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_the_rule_and_the_value(change, words):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(**change)
    for word in words:
        assert word in str(error.value)


def test_a_wrong_value_in_a_saved_config_is_refused_on_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="perfect square"):
        MqtLlavaConfig.from_pretrained(tmp_path, max_visual_tokens=7)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model_type": "gemma2"}, "final_logit_softcapping"),
        ({"model_type": "cohere"}, "logit_scale"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits_scaling"),
        ({"model_type": "phi"}, "phi"),
        ({"model_type": "gptj"}, "gptj"),
    ],
)
def test_a_language_model_whose_head_does_more_is_refused(changes, name):
    with pytest.raises(StrictDataclassError, match=name):
        MqtLlavaConfig(text_config=changes)


def test_every_causal_model_of_transformers_is_plain_or_refused():
    """
    Reads the source of every causal language model: whoever adds a bias to the head, or touches the logits after it,
    must be refused by the config.
    """
    missed, plain = [], 0
    for config_class, model_class in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        if not _touches_logits(model_class):
            plain += 1
            continue
        # Set whatever the model scales, caps or biases with to a value that does something.
        text = config_class()
        for name in _scaling_attributes(text):
            setattr(text, name, 7.0 if not name.endswith("bias") else True)
        try:
            MqtLlavaConfig(text_config=text)
        except (StrictDataclassError, TypeError, AttributeError, ValueError):
            continue
        missed.append(model_class.__name__)
    assert plain > 50
    assert missed == []


def _touches_logits(model_class):
    forward, init = inspect.getsource(model_class.forward), inspect.getsource(model_class.__init__)
    head = re.search(r"logits = self\.\w+\(.*", forward)
    if head is None:
        return "logits" in forward
    after = [line for line in forward[head.end() :].splitlines() if re.search(r"\blogits = .*logits", line)]
    scaled = re.search(r"\)\s*[*/]\s*self", head.group())
    biased = [line for line in re.findall(r"self\.\w*head\w* = nn\.Linear\(.*", init) if "bias=False" not in line]
    return bool(after or scaled or biased)


def _scaling_attributes(config):
    pattern = r"(?!attn_|router_)(.*logit.*(scal|cap|mult).*|lm_head_\w+|decoder_bias|use_bias)"
    return [name for name in config.to_dict() if re.fullmatch(pattern, name)]


def test_tied_embeddings_follow_the_language_model():
    assert tiny_config(text_config=text_config(tie_word_embeddings=True)).tie_word_embeddings
    assert not tiny_config().tie_word_embeddings


def test_a_config_that_was_spoiled_after_it_was_built_makes_no_model():
    config = tiny_config()
    config.query_num_attention_heads = 5
    with pytest.raises(StrictDataclassError, match="divide"):
        MqtLlavaModel(config)
