"""To the Hub and back: a real client, a server on loopback, and what may go wrong between them."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import picture, tiny_model, tiny_processor
from hub_client import Client, ClientError
from hub_server import TOKEN, Hub, drop, slow, status, truncate
from peft import LoraConfig, get_peft_model
from released import FIDELITY
from safetensors.torch import load_file

from mqt_llava import MqtLlavaForConditionalGeneration
from mqt_llava import hub as hub_module


QUICK = "import time; time.sleep = lambda seconds: None"  # the client waits long before it tries again
GENERATE = """
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(repo, **kwargs)
processor = AutoProcessor.from_pretrained(repo, **kwargs)
inputs = processor(images=Image.open(image), text="what is <image> this", num_visual_tokens=4, return_tensors="pt")
result = model.generate(**inputs, num_visual_tokens=9, max_new_tokens=5).tolist()
"""
PUSH = """
from mqt_llava.hub import push_folder
result = str(push_folder(folder, repo, **kwargs))
"""
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server():
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(server):
    yield server
    server.faults.clear()


def start(tmp_path_factory, server, token=TOKEN, **kwargs):
    client = Client(tmp_path_factory.mktemp("client"), server.url, token, **kwargs)
    client.run(QUICK)
    return client


@pytest.fixture(scope="module")
def client(tmp_path_factory, server):
    client = start(tmp_path_factory, server)
    yield client
    client.close()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, server):
    client = start(tmp_path_factory, server, token=None)
    yield client
    client.close()


@pytest.fixture(scope="module")
def without_package(tmp_path_factory, server):
    client = start(tmp_path_factory, server, with_package=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with model and processor, a picture, and the answer to a question about it."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny_model(), tiny_processor(chat_template={"default": "{{ messages }}", "plain": "p"})
    model.generation_config.num_visual_tokens = 9
    model.save_pretrained(folder / "model", max_shard_size="50KB")
    processor.save_pretrained(folder / "model")
    picture().save(folder / "picture.png")
    inputs = processor(images=picture(), text="what is <image> this", num_visual_tokens=4, return_tensors="pt")
    answer = model.generate(**inputs, num_visual_tokens=9, max_new_tokens=5).tolist()
    return folder / "model", str(folder / "picture.png"), answer


@pytest.fixture
def repo():
    return f"me/model-{next(NUMBERS)}"


def push(client, saved, repo, **kwargs):
    return client.run(PUSH, folder=str(saved[0]), repo=repo, kwargs=kwargs)


def ask(client, saved, repo, **kwargs):
    return client.run(GENERATE, image=saved[1], repo=repo, kwargs=kwargs)


def test_pushed_model_answers_by_its_id(hub, client, saved, repo):
    push(client, saved, repo)
    client.run("import mqt_llava")
    assert ask(client, saved, repo) == saved[2]
    assert any("additional_chat_templates/plain.jinja" in name for name in hub.files(repo))


def test_pushed_code_answers_without_the_package(hub, client, without_package, saved, repo):
    push(client, saved, repo, include_code=True)
    assert ask(without_package, saved, repo, trust_remote_code=True) == saved[2]
    with pytest.raises(ClientError, match="No module named 'mqt_llava'"):
        without_package.run("import mqt_llava")


def test_pushed_code_serves_every_auto_class(hub, client, without_package, saved, repo):
    push(client, saved, repo, include_code=True)
    names = without_package.run(
        """
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline
kwargs = {"trust_remote_code": True}
classes = AutoConfig, AutoModel, AutoModelForMultimodalLM
result = [type(cls.from_pretrained(repo, **kwargs)).__name__ for cls in classes]
pipe = pipeline("image-text-to-text", model=repo, **kwargs)
text = pipe(image, text="what is <image> this", generate_kwargs={"num_visual_tokens": 9, "max_new_tokens": 5})
result.append(bool(text))
""",
        repo=repo,
        image=saved[1],
    )
    assert names == ["MqtLlavaConfig", "MqtLlavaModel", "MqtLlavaForConditionalGeneration", True]


def test_code_is_not_run_unasked(hub, client, without_package, saved, repo):
    push(client, saved, repo, include_code=True)
    with pytest.raises(ClientError, match="trust_remote_code"):
        ask(without_package, saved, repo, trust_remote_code=False)


def test_no_code_travels_unless_it_is_asked_for(hub, client, saved, repo):
    push(client, saved, repo)
    files = hub.files(repo)
    assert not [name for name in files if name.endswith(".py")]
    assert not [name for name, data in files.items() if b"auto_map" in data]


def test_auto_map_is_complete(hub, client, saved, repo):
    push(client, saved, repo, include_code=True)
    files = hub.files(repo)
    assert json.loads(files["config.json"])["auto_map"].keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
    }
    assert "AutoProcessor" in json.loads(files["processor_config.json"])["auto_map"]


def test_methods_of_model_and_processor_push_too(hub, client, saved, repo):
    client.run(
        """
from mqt_llava import MqtLlavaForConditionalGeneration, MqtLlavaProcessor
model = MqtLlavaForConditionalGeneration.from_pretrained(folder)
processor = MqtLlavaProcessor.from_pretrained(folder)
model.push_to_hub(repo, include_code=True, processor=processor, max_shard_size="50KB")
processor.push_to_hub(repo, include_code=True)
""",
        folder=str(saved[0]),
        repo=repo,
    )
    assert ask(client, saved, repo) == saved[2]


def test_revision_is_its_own(hub, client, saved, repo):
    push(client, saved, repo, revision="experiment")
    assert "config.json" not in hub.files(repo)
    assert ask(client, saved, repo, revision="experiment") == saved[2]


def test_default_budget_travels(hub, client, saved, repo):
    push(client, saved, repo)
    assert json.loads(hub.files(repo)["generation_config.json"])["num_visual_tokens"] == 9


def test_private_model_needs_the_token(hub, client, stranger, saved, repo):
    push(client, saved, repo, private=True)
    with pytest.raises(ClientError, match="(?i)private|gated|authenticated"):
        stranger.run("from mqt_llava import MqtLlavaConfig; MqtLlavaConfig.from_pretrained(repo)", repo=repo)
    code = "result = MqtLlavaConfig.from_pretrained(repo, token=token).max_visual_tokens"
    assert stranger.run(code, repo=repo, token=TOKEN) == 16


@pytest.mark.parametrize("where", ["create", "preupload", "objects/batch", "PUT /lfs", "/commit/"])
def test_upload_survives_a_server_error_or_says_so(hub, client, saved, repo, where):
    hub.lfs.clear()  # so that there is something to upload
    fault = hub.fault(where, status(500))
    try:
        push(client, saved, repo)
    except ClientError as error:
        assert "500" in error.message
        assert repo not in hub.repositories or "config.json" not in hub.files(repo)  # all or nothing
        push(client, saved, repo)
    assert fault.seen == 1
    assert ask(client, saved, repo) == saved[2]


def test_upload_survives_a_dropped_connection(hub, client, saved):
    repo = "me/dropped"
    hub.lfs.clear()  # so that there is something to upload
    fault = hub.fault("PUT /lfs", drop)
    try:
        push(client, saved, repo)
    except ClientError as error:
        assert "config.json" not in hub.files(repo), error
        push(client, saved, repo)
    assert fault.seen == 1
    assert ask(client, saved, repo) == saved[2]


@pytest.mark.parametrize("code, words", [(401, "401|[Uu]nauthorized"), (403, "403|[Ff]orbidden")])
def test_upload_that_is_not_allowed_is_one_clear_error(hub, client, saved, repo, code, words):
    hub.fault("POST /api/repos/create", status(code))
    with pytest.raises(ClientError, match=words):
        push(client, saved, repo)
    assert repo not in hub.repositories
    push(client, saved, repo)  # later it may


def test_upload_without_a_token_is_refused(hub, stranger, saved, repo):
    with pytest.raises(ClientError, match="401|token"):
        push(stranger, saved, repo)
    assert repo not in hub.repositories


def test_unknown_id_is_one_clear_error(hub, client, saved):
    with pytest.raises(ClientError, match="me/nobody"):
        ask(client, saved, "me/nobody")


def test_truncated_download_never_breaks_the_cache(hub, client, saved, repo):
    push(client, saved, repo)
    client.run("import mqt_llava")
    fault = hub.fault(r"GET .*safetensors$", truncate)
    try:
        answer = ask(client, saved, repo)
    except ClientError:
        answer = ask(client, saved, repo)
    assert fault.seen == 1
    assert answer == saved[2]


def test_download_that_never_completes_leaves_nothing_behind(hub, client, saved, repo):
    push(client, saved, repo)
    hub.fault(r"GET .*safetensors$", status(500), times=100)
    with pytest.raises(ClientError):
        ask(client, saved, repo)
    cached = client.home / "hub" / f"models--{repo.replace('/', '--')}"
    assert not list(cached.glob("snapshots/*/*.safetensors"))
    hub.faults.clear()
    assert ask(client, saved, repo) == saved[2]


def test_slow_answer_is_waited_for_or_tried_again(hub, client, saved, repo):
    push(client, saved, repo)
    hub.fault(r"GET .*safetensors$", slow(3))  # longer than the client's timeout
    try:
        answer = ask(client, saved, repo)
    except ClientError as error:
        assert "time" in error.message.lower()
        answer = ask(client, saved, repo)
    assert answer == saved[2]


def test_card_is_written_with_valid_metadata(hub, client, saved, repo):
    push(
        client, saved, repo, base_model="lmsys/vicuna", datasets=["one"], license="mit", evaluation={"VQA": {2: 61.04}}
    )
    card = hub.files(repo)["README.md"].decode()
    for line in (
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "base_model: lmsys/vicuna",
        "license: mit",
    ):
        assert line in card
    assert "| 2 | 61.0 |" in card
    client.run("from huggingface_hub import ModelCard; ModelCard(card).validate()", card=card)


def test_snippet_of_the_card_runs(hub, client, without_package, tmp_path_factory, repo):
    folder = tmp_path_factory.mktemp("snippet")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    push(client, (folder,), repo, include_code=True)
    card = hub.files(repo)["README.md"].decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert without_package.run(snippet + "\nresult = isinstance(answer, str)")


def test_card_that_a_person_edited_stays(hub, client, saved, repo):
    push(client, saved, repo)
    written = hub.files(repo)["README.md"]
    push(client, saved, repo, license="mit")
    assert b"license: mit" in hub.files(repo)["README.md"]  # nobody had touched it
    hub.files(repo)["README.md"] = edited = written + b"\nMy own words.\n"
    push(client, saved, repo)
    assert hub.files(repo)["README.md"] == edited


def test_command_line_pushes(hub, client, saved, repo):
    code = client.run(
        "from mqt_llava.cli import main; result = main(arguments)", arguments=["push", str(saved[0]), repo]
    )
    assert code == 0
    assert "config.json" in hub.files(repo)


def test_pushed_adapter_loads_by_its_id(hub, client, repo, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    settings = LoraConfig(
        init_lora_weights=False,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["query_transformer"],
    )
    adapted = get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    push(client, (tmp_path / "adapter",), repo)
    got = client.run(
        """
import torch
from peft import PeftModel
from mqt_llava import MqtLlavaForConditionalGeneration
base = MqtLlavaForConditionalGeneration.from_pretrained(folder)
result = PeftModel.from_pretrained(base, repo).eval()(input_ids=torch.tensor([[5, 6, 7]])).logits.tolist()
""",
        folder=str(tmp_path / "base"),
        repo=repo,
    )
    torch.testing.assert_close(torch.tensor(got), adapted(input_ids=torch.tensor([[5, 6, 7]])).logits)
    assert "adapter_model.safetensors" in hub.files(repo)
    assert b"base_model: /" not in hub.files(repo)["README.md"]  # a folder of this machine tells nobody anything


AUTHORS = """
import os
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(repo, exist_ok=True)
api.upload_folder(repo_id=repo, folder_path=folder)
"""


def test_checkpoint_of_the_authors_loads_by_its_id(hub, client, repo):
    client.run(AUTHORS, repo=repo, folder=str(FIDELITY / "checkpoint"))
    logits = client.run(
        """
from PIL import Image
from mqt_llava import MqtLlavaForConditionalGeneration, MqtLlavaProcessor
model = MqtLlavaForConditionalGeneration.from_pretrained(repo, revision="main")
processor = MqtLlavaProcessor.from_pretrained(repo, revision="main")
inputs = processor(images=Image.open(image), text=prompt, num_visual_tokens=2, return_tensors="pt")
result = model(**inputs).logits[0, -1].tolist()
""",
        repo=repo,
        image=str(FIDELITY / "images/square.png"),
        prompt=json.loads((FIDELITY / "expected.json").read_text())["prompt"],
    )
    expected = load_file(FIDELITY / "expected.safetensors")["logits.2"][0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["../../../evil.json", "additional_chat_templates/../../../../evil.json"])
def test_repository_whose_names_climb_out_writes_nothing_outside(hub, client, repo, tmp_path, name):
    client.run(AUTHORS, repo=repo, folder=str(FIDELITY / "checkpoint"))
    hub.files(repo)[name] = b"{}"
    code = """
from mqt_llava.conversion.convert import convert
convert(repo, folder)
"""
    with pytest.raises(ClientError, match="(?i)path|outside|invalid"):
        client.run(code, repo=repo, folder=str(tmp_path / "out"))
    assert not list(client.home.parent.rglob("evil*"))
    assert not (tmp_path / "out").exists()


def test_command_line_converts_from_id_to_id(hub, client, repo, tmp_path):
    client.run(AUTHORS, repo="me/theirs", folder=str(FIDELITY / "checkpoint_without_vision"))
    client.run(AUTHORS, repo="me/clip", folder=str(FIDELITY / "clip"))
    arguments = ["convert", "me/theirs", str(tmp_path / "out"), "--vision-tower", "me/clip", "--push-to-hub", repo]
    assert client.run("from mqt_llava.cli import main; result = main(arguments)", arguments=arguments) == 0
    assert {"config.json", "README.md", "processor_config.json"} <= hub.files(repo).keys()
    assert json.loads(hub.files(repo)["config.json"])["model_type"] == "mqt_llava"
    assert b"base_model: me/theirs" in hub.files(repo)["README.md"]


def test_remote_code_says_what_needs_the_package(hub, client, without_package, saved, repo):
    push(client, saved, repo, include_code=True)
    ask(without_package, saved, repo, trust_remote_code=True)
    with pytest.raises(ClientError, match="needs the package `mqt_llava`"):
        without_package.run("model.push_to_hub('me/other')")
    assert "me/other" not in hub.repositories


def test_source_folder_is_left_as_it_was(hub, client, saved, repo):
    before = {path: path.read_bytes() for path in Path(saved[0]).rglob("*") if path.is_file()}
    push(client, saved, repo, include_code=True)
    assert {path: path.read_bytes() for path in Path(saved[0]).rglob("*") if path.is_file()} == before


def test_hub_files_import_only_each_other():
    allowed = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
    import ast
    import sys

    package = Path(hub_module.__file__).parent
    stems = {name.removesuffix(".py") for name in hub_module.CODE_NAMES}
    for name in hub_module.CODE_NAMES:
        for node in ast.walk(ast.parse((package / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in stems
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert all(one.split(".")[0] in allowed | sys.stdlib_module_names for one in names)
