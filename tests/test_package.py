import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model, tiny_processor

import mqt_llava


PACKAGE = Path(mqt_llava.__file__).parent
HUB_FILES = ["configuration_mqt_llava", "modeling_mqt_llava", "processing_mqt_llava"]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_loads_nothing_heavy():
    result = run_python(
        "import sys, transformers, mqt_llava; "
        "print([name for name in ('torch', 'transformers.models', 'peft', 'datasets', 'matplotlib') "
        "if name in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


ORDERS = {
    "package first": "import mqt_llava; from transformers import {names}",
    "auto classes first": "from transformers import {names}; {names_used}; import mqt_llava",
    "models first": "import transformers.models.auto.modeling_auto; import mqt_llava; from transformers import {names}",
    "processors first": "from transformers import AutoProcessor; import mqt_llava; from transformers import {names}",
    "config module": "import mqt_llava.configuration_mqt_llava; from transformers import {names}",
}
NAMES = "AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor"


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_find_the_package_in_any_order_of_imports(order, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    code = ORDERS[order].format(names=NAMES, names_used="AutoModel")
    loads = (
        f"\nd = {str(tmp_path)!r}\n"
        "print(*[type(c.from_pretrained(d)).__name__ for c in (AutoConfig, AutoModel, AutoModelForImageTextToText, "
        "AutoModelForMultimodalLM, AutoProcessor)])\n"
        "print(type(AutoModel.from_config(AutoConfig.from_pretrained(d))).__module__)"
    )
    result = run_python(code + loads)
    assert result.stdout.split() == [
        "MqtLlavaConfig",
        "MqtLlavaModel",
        "MqtLlavaForConditionalGeneration",
        "MqtLlavaForConditionalGeneration",
        "MqtLlavaProcessor",
        "mqt_llava.modeling_mqt_llava",
    ], result.stderr


def test_a_second_import_registers_nothing_twice():
    result = run_python(
        "import importlib, mqt_llava; importlib.reload(mqt_llava); from transformers import AutoModel; "
        "importlib.reload(mqt_llava); print(AutoModel._model_mapping[mqt_llava.MqtLlavaConfig].__name__)"
    )
    assert result.stdout.strip() == "MqtLlavaModel", result.stderr


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_import_only_each_other(name):
    """They travel to the Hub alone: no other module of the package, and no import form that the copier misreads."""
    allowed = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in HUB_FILES
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed


def test_the_core_never_imports_the_rooms_above_it():
    result = run_python(
        "import sys; from mqt_llava import MqtLlavaForConditionalGeneration, MqtLlavaProcessor, MqtLlavaConfig; "
        "print([m for m in sys.modules if m.startswith(('mqt_llava.training', 'mqt_llava.evaluation', "
        "'mqt_llava.quickstart', 'mqt_llava.cli'))])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_every_public_name_exists():
    for name in mqt_llava.__all__:
        assert getattr(mqt_llava, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MqtLava'"):
        mqt_llava.MqtLava  # noqa: B018


def test_nothing_needs_torchvision(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    result = run_python(
        "import sys; sys.modules['torchvision'] = None; import mqt_llava; from transformers import AutoProcessor; "
        f"print(type(AutoProcessor.from_pretrained({str(tmp_path)!r}).image_processor).__name__)"
    )
    assert result.stdout.strip() == "LlavaImageProcessorPil", result.stderr


def test_a_model_can_be_pickled_and_copied():
    import copy
    import pickle

    config = pickle.loads(pickle.dumps(tiny_config()))
    assert config.max_visual_tokens == 16
    model = tiny_model()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.model.query_transformer.query, model.model.query_transformer.query)
