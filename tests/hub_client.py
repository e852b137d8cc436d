"""A Python process of its own that runs pieces of code against a Hub on loopback. Started with `Client`."""

import json
import os
import subprocess
import sys
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]

# What the process does: one line of JSON in, one out. Names stay defined from one piece of code to the next.
SERVE = r"""
import json, sys, traceback
out, sys.stdout = sys.stdout, sys.stderr
names = {}
for line in sys.stdin:
    names["result"] = None
    try:
        exec(json.loads(line), names)
        answer = {"result": names["result"]}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    out.write(json.dumps(answer) + "\n")
    out.flush()
"""
WITHOUT_PACKAGE = r"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mqt_llava":
            raise ModuleNotFoundError("No module named 'mqt_llava'", name=name)
sys.meta_path.insert(0, Absent())
"""


class ClientError(Exception):
    """What the code raised there."""

    def __init__(self, answer):
        super().__init__(f"{answer['error']}: {answer['message']}\n{answer['trace']}")
        self.kind, self.message = answer["error"], answer["message"]


class Client:
    """The process. `client.run(code)` returns what the code calls `result`."""

    def __init__(self, folder: Path, endpoint: str, token: str | None, with_package: bool = True):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "OMP_NUM_THREADS": "1",
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        if with_package:
            environment["PYTHONPATH"] = str(REPOSITORY)
        code = SERVE if with_package else WITHOUT_PACKAGE + SERVE
        self.home, self.errors = folder / "home", (folder / "stderr.txt").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            cwd=folder,
            text=True,
        )

    def run(self, code: str, **values):
        """Runs code with these names defined (as their `repr`)."""
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        self.process.stdin.write(json.dumps("\n".join([*lines, code])) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the client process ended: {Path(self.errors.name).read_text()[-2000:]}")
        answer = json.loads(answer)
        if "error" in answer:
            raise ClientError(answer)
        return answer["result"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()
