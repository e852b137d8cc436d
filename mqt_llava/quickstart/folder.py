"""The output folder: what is where, and whether a run may start, go on or is finished."""

import json
import shutil
from pathlib import Path


RESULTS_OF_A_RUN = (
    "settings.json",
    "results.json",
    "comparison.json",
    "accuracy.png",
    "samples.png",
    "scene.png",
    "comparison.png",
    "model.safetensors",
)


class OutputFolder:
    """
    The folder of one run. `settings.json` says which run it is, `results.json` that it is finished, and `work/` holds
    what is needed to go on after an interruption.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.work = self.path / "work"
        self.settings = self.path / "settings.json"
        self.results = self.path / "results.json"
        self.comparison = self.path / "comparison.json"
        self.seconds = self.work / "seconds.json"

    def open(self, settings: dict, overwrite: bool) -> None:
        """
        Makes the folder ready for the run that `settings` describes.

        Raises:
            ValueError: if the folder holds another run, or files that are no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`output_dir` must be a folder, got the file {self.path}. Choose another place.")
        if overwrite:
            self.clear()
        elif self.settings.exists():
            self.check_same(settings)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"`output_dir` must be new, empty or hold a quickstart run, got {self.path} with other files in it. "
                "Choose another folder, or allow overwriting."
            )
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.settings, settings)

    def check_same(self, settings: dict) -> None:
        """
        Raises:
            ValueError: if the folder holds a run with other settings.
        """
        found = read_json(self.settings)
        if found != settings:
            raise ValueError(
                f"`output_dir` must not hold another run: {self.path} has one with {found}, this one has {settings}. "
                "Choose another folder, or allow overwriting."
            )

    def clear(self) -> None:
        """Takes out the results and the work of an earlier run. Files of other origin stay."""
        shutil.rmtree(self.work, ignore_errors=True)
        for name in RESULTS_OF_A_RUN:
            (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """The run is finished: what was only needed to go on is deleted."""
        shutil.rmtree(self.work, ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        return self.results.exists()

    @property
    def is_compared(self) -> bool:
        return self.comparison.exists()


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    """Written beside and moved into place, so that an interruption leaves the old file or the new one."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
