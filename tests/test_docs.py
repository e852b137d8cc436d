"""The code that people will copy is run as it stands."""

import re
from pathlib import Path

import pytest
from conftest import picture, tiny_model, tiny_processor


ROOT = Path(__file__).parent.parent


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


@pytest.fixture
def quickstart_folder(tmp_path, monkeypatch):
    """A tiny model where `make quickstart` puts its own."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("runs/quickstart")
    tiny_processor().save_pretrained("runs/quickstart")
    picture().save("runs/quickstart/scene.png")


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_every_block_of_python_runs(page, quickstart_folder):
    names: dict = {}
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
