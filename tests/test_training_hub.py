"""A run that pushes what it has learned: a real client, a Hub on loopback."""

from pathlib import Path

import pytest
from hub_client import Client
from hub_server import TOKEN, Hub


TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
TRAIN = """
import sys
from mqt_llava.training import load_recipe, train
words = ["--output_dir", folder, "--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "2"]
words += ["--eval_steps", "2", "--use_cpu", "--disable_tqdm", "--push_to_hub", "--hub_model_id", repo, *more]
train(load_recipe(recipe, words))
"""
LOAD = """
from mqt_llava import MqtLlavaForConditionalGeneration, MqtLlavaProcessor
model = MqtLlavaForConditionalGeneration.from_pretrained(repo)
result = [MqtLlavaProcessor.from_pretrained(repo).max_visual_tokens, float(model.lm_head.weight.double().sum())]
"""
LOAD_TRAINED = LOAD.replace("from_pretrained(repo)\nresult", "from_pretrained(folder)\nresult")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with Hub() as hub:
        client = Client(tmp_path_factory.mktemp("client"), hub.url, TOKEN)
        yield client
        client.close()


def test_a_pushed_run_loads_from_the_hub(client, tmp_path):
    client.run(TRAIN, folder=str(tmp_path), repo="me/full", recipe=str(TINY), more=[])
    assert client.run(LOAD, repo="me/full") == client.run(LOAD_TRAINED, folder=str(tmp_path), repo="me/full")


def test_a_pushed_adapter_has_its_processor(client, tmp_path):
    client.run(TRAIN, folder=str(tmp_path), repo="me/adapter", recipe=str(TINY), more=["--lora"])
    code = "from huggingface_hub import list_repo_files\nresult = sorted(list_repo_files(repo))"
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= set(
        client.run(code, repo="me/adapter")
    )
