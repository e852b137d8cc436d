"""To the Hub: a saved folder with its card, and on request the code to load it without this package."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from .card import CARD_NAME, card_text, is_untouched, write_card
from .configuration_mqt_llava import MqtLlavaConfig


# The modules that import nothing but each other and what Transformers needs anyway.
CODE_NAMES = ("configuration_mqt_llava.py", "modeling_mqt_llava.py", "processing_mqt_llava.py")
AUTO_MAP = {
    "AutoConfig": "configuration_mqt_llava.MqtLlavaConfig",
    "AutoModel": "modeling_mqt_llava.MqtLlavaModel",
    "AutoModelForImageTextToText": "modeling_mqt_llava.MqtLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mqt_llava.MqtLlavaForConditionalGeneration",
    "AutoProcessor": "processing_mqt_llava.MqtLlavaProcessor",
}
CONFIG_NAMES = ("config.json", "processor_config.json")


def add_code(folder: str | Path) -> None:
    """Copies the three modules into a saved folder, and says in its configs which class is where."""
    for name in CODE_NAMES:
        shutil.copyfile(Path(__file__).with_name(name), Path(folder) / name)
    _set_auto_map(Path(folder), AUTO_MAP)


def remove_code(folder: str | Path) -> None:
    """Takes Python files and what points to some out of a saved folder."""
    for path in Path(folder).rglob("*.py"):
        path.unlink()
    _set_auto_map(Path(folder), None)


def _set_auto_map(folder: Path, auto_map: dict[str, str] | None) -> None:
    for name in (*CONFIG_NAMES, "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("auto_map", None)
        if auto_map is not None and name in CONFIG_NAMES:
            config["auto_map"] = auto_map
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def push_to_hub(
    parts: Iterable[Any],
    repo_id: str,
    *,
    include_code: bool = False,
    max_shard_size: int | str = "5GB",
    **kwargs: Any,
) -> str:
    """
    Saves a model, a processor or both, and uploads them in one commit.

    Args:
        parts: whatever has `save_pretrained`.
        repo_id: Hub id, created if it does not exist.
        include_code: see [`push_folder`].
        max_shard_size: size above which a new file of weights is begun.
        kwargs: everything else that [`push_folder`] takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder, max_shard_size=max_shard_size)
        return push_folder(folder, repo_id, include_code=include_code, **kwargs)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    include_code: bool = False,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: list[str] | None = None,
    **card: Any,
) -> str:
    """
    Uploads a saved folder, which stays as it is.

    Args:
        folder: with `config.json`, weights, processor; or a PEFT adapter.
        repo_id: Hub id, created if it does not exist.
        include_code: add the code, for people without this package (they pass `trust_remote_code=True`). Otherwise no
            Python file and no `auto_map` is uploaded.
        private, token, revision, create_pr, commit_message, commit_description: as for `HfApi.upload_folder`.
        tags: more tags for the card.
        card: `base_model`, `datasets`, `license` and `evaluation` of the card. A card that a person has written or
            changed, here or on the Hub, is kept.

    Returns:
        The URL of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging) / "folder"
        shutil.copytree(folder, staged, copy_function=_link_or_copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        if include_code:
            add_code(staged)
        else:
            remove_code(staged)
        if not _card_of_a_person(api, repo_id, revision):
            _add_card(staged, repo_id, include_code, tags, card)
        else:
            (staged / CARD_NAME).unlink(missing_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload MQT-LLaVA",
            commit_description=commit_description,
        )


def _link_or_copy(source: str, target: str) -> None:
    """Weights are only read, so a link does; what is going to be changed is copied."""
    if source.endswith((".json", ".md", ".py")):
        shutil.copyfile(source, target)
    else:
        Path(target).symlink_to(Path(source).resolve())


def _card_of_a_person(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has a card that was not written here, or has been changed."""
    try:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
    except EntryNotFoundError:
        return False
    return not is_untouched(Path(path).read_text(encoding="utf-8"))


def _add_card(folder: Path, repo_id: str, include_code: bool, tags: list[str] | None, card: dict[str, Any]) -> None:
    if (folder / "adapter_config.json").is_file() and (folder / CARD_NAME).is_file():
        _drop_local_base(folder / CARD_NAME)
        return
    config = folder / "config.json"
    maximum = MqtLlavaConfig().max_visual_tokens
    if config.is_file():
        maximum = json.loads(config.read_text(encoding="utf-8")).get("max_visual_tokens", maximum)
    write_card(folder, card_text(repo_id, maximum, include_code=include_code, tags=tags, **card))


def _drop_local_base(path: Path) -> None:
    """
    PEFT's own card names the base as it was loaded. A folder of this machine tells nobody anything; the Hub refuses
    it.
    """
    card = ModelCard.load(path)
    base = card.data.base_model
    if isinstance(base, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is None:
        card.data.base_model = None
        card.data.tags = [tag for tag in card.data.tags or [] if base not in tag] or None
        path.write_text(str(card), encoding="utf-8")
