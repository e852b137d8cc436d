"""`mqt-llava convert`: any checkpoint of the authors' code to a folder of this project that needs nothing else."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .load import released_generation_config
from .processor import build_processor
from .sources import find_source
from .weights import DEFAULT_SHARD_BYTES, write_weights


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    vision_tower: str | Path | None = None,
    base_model: str | Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    **hub_kwargs,
) -> Path:
    """
    Writes a checkpoint of the authors' code in this project's layout. Weights keep their number format, and are read
    and written one at a time.

    Args:
        source: folder or Hub id of a whole checkpoint, a LoRA run or a first stage; or a `query_abstractor.bin`.
        destination: folder to write, which must not hold anything yet. It appears when it is complete.
        vision_tower (*optional*): folder or Hub id of the CLIP. Needed where the checkpoint holds no tower and the
            one that its config names cannot be fetched; where there is a tower inside, only the settings are taken.
        base_model (*optional*): folder or Hub id of the language model under a LoRA run or a first stage.
        shard_bytes (*optional*, defaults to 2 GB): size above which a new file is begun.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` for `source`.

    Returns:
        `Path`: `destination`.

    Raises:
        ValueError: if a part is missing or damaged, the weights do not fit the config (listing them), or
            `destination` is not empty.
    """
    found = find_source(source, vision_tower, base_model, **hub_kwargs)
    processor = build_processor(found)
    with folder_in_the_making(destination) as folder:
        write_weights(found, folder, shard_bytes)
        config = found.config
        config.architectures = ["MqtLlavaForConditionalGeneration"]
        config.save_pretrained(folder)
        released_generation_config(found).save_pretrained(folder)
        processor.save_pretrained(folder)
    return Path(destination)


@contextmanager
def folder_in_the_making(destination: str | Path) -> Iterator[Path]:
    """
    A folder beside `destination` that takes its place when all went well, and is gone otherwise.

    Raises:
        ValueError: if `destination` holds anything.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"`{destination}` must be a new or empty folder. Remove it, or name another.")
    folder = destination.with_name(destination.name + ".incomplete")
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        if destination.exists():
            destination.rmdir()
        folder.rename(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
