"""
A Hub on loopback, in memory: create, preupload, LFS, commit, list, resolve, private repositories, and faults on
    request.

It speaks what the real client was seen to say, nothing more.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_test"
LFS_SUFFIXES = (".safetensors", ".bin", ".model")


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)  # name to sha

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return next(((commit, files) for commit, files in self.commits if commit == sha), None)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((sha, files))
        self.branches[branch] = sha
        return sha


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests whose line matches."""

    matches: str
    act: Callable[["Handler"], bool]  # returns whether the request has been dealt with
    times: int = 1
    seen: int = 0


def status(code: int) -> Callable[["Handler"], bool]:
    """The server answers with an error."""

    def act(handler):
        handler.drain()
        handler.answer(code, {"error": f"fault {code}"})
        return True

    return act


def drop(handler: "Handler") -> bool:
    """The connection breaks in the middle of an upload."""
    handler.rfile.read(min(10, int(handler.headers.get("Content-Length") or 0)))
    handler.close_connection = True
    handler.connection.close()
    return True


def slow(seconds: float) -> Callable[["Handler"], bool]:
    """The answer comes late."""

    def act(handler):
        time.sleep(seconds)
        return False

    return act


def truncate(handler: "Handler") -> bool:
    """A download ends in the middle."""
    handler.truncated = True
    return False


class Hub:
    """The server. `with Hub() as hub:` gives `hub.url`."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, matches: str, act, times: int = 1) -> Fault:
        self.faults.append(Fault(matches, act, times))
        return self.faults[-1]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].files(revision)[1]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    truncated = False

    def log_message(self, *_):
        pass

    def answer(self, code: int, body=None, headers: dict[str, str] | None = None, send_body: bool = True):
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body and self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.truncated else data)
        if self.truncated:
            self.wfile.flush()
            self.close_connection = True

    def drain(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self):
        self.truncated = False
        line = f"{self.command} {self.path}"
        self.hub.log.append(line)
        for fault in self.hub.faults:
            if fault.seen < fault.times and re.search(fault.matches, line):
                fault.seen += 1
                if fault.act(self):
                    return
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, line.split(" ")[0] + " " + path)
            if match:
                method(self, query, **{name: part for name, part in match.groupdict().items() if part is not None})
                return
        self.drain()
        self.answer(404, {"error": f"no route for {line}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo: str) -> Repository | None:
        """The repository, if the caller may see it. The real Hub answers 401 for both."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self.signed_in):
            self.drain()
            self.answer(
                401, {"error": "none"}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
            return None
        return repository

    def may_write(self) -> bool:
        if not self.signed_in:
            self.drain()
            self.answer(401, {"error": "Invalid username or password."})
        return self.signed_in

    def create(self, query):
        if not self.may_write():
            return
        wanted = json.loads(self.drain())
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        known = repo in self.hub.repositories
        if not known:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[repo] = Repository(private)
            self.hub.repositories[repo].commit("main", {".gitattributes": b""})
        self.answer(409 if known else 200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    def branch(self, query, repo, branch):
        self.drain()
        repository = self.repository(repo) if self.may_write() else None
        if repository is not None:
            known = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self.answer(409 if known else 200, {})

    def validate(self, query):
        card = json.loads(self.drain())["content"]
        valid = card.startswith("---\n") and "base_model: /" not in card
        errors = [] if valid else [{"message": "no valid metadata"}]
        self.answer(200 if valid else 400, {"errors": errors, "warnings": []})

    def preupload(self, query, repo, revision):
        files = json.loads(self.drain())["files"]
        if not self.may_write() or self.repository(repo) is None:
            return
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self.answer(200, {"files": modes})

    def batch(self, query, repo):
        objects = json.loads(self.drain())["objects"]
        if not self.may_write():
            return
        wanted = []
        for one in objects:
            there = one["oid"] in self.hub.lfs
            actions = {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            wanted.append({"oid": one["oid"], "size": one["size"], **actions})
        self.answer(200, {"transfer": "basic", "objects": wanted}, {"Content-Type": "application/vnd.git-lfs+json"})

    def put(self, query, oid):
        body = self.drain()
        right = hashlib.sha256(body).hexdigest() == oid
        if right:
            self.hub.lfs[oid] = body
        self.answer(200 if right else 400)

    def commit(self, query, repo, revision):
        lines = [json.loads(line) for line in self.drain().splitlines() if line.strip()]
        repository = self.repository(repo) if self.may_write() else None
        if repository is None:
            return
        files = dict(repository.files(revision)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(revision, files)
        self.answer(
            200,
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}",
                "hookOutput": "",
                "pullRequestUrl": None,
            },
        )

    def info(self, query, repo, revision="main"):
        self.drain()
        repository = self.repository(repo)
        if repository is None:
            return
        found = repository.files(revision)
        if found is None:
            return self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        sha, files = found
        self.answer(
            200,
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "sha": sha,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": name, "size": len(data)} for name, data in files.items()],
            },
        )

    def tree(self, query, repo, revision, folder=""):
        repository = self.repository(repo)
        found = repository and repository.files(revision)
        if not found:
            return repository and self.answer(404, {"error": "none"}, {"X-Error-Code": "RevisionNotFound"})
        _, files = found
        inside = {name: data for name, data in files.items() if name.startswith(folder.lstrip("/"))}
        if not inside:
            return self.answer(404, {"error": "none"}, {"X-Error-Code": "EntryNotFound"})
        self.answer(
            200,
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in inside.items()
            ],
        )

    def resolve(self, query, repo, revision, name):
        repository = self.repository(repo)
        if repository is None:
            return
        found = repository.files(revision)
        if found is None or name not in found[1]:
            code = "RevisionNotFound" if found is None else "EntryNotFound"
            return self.answer(
                404, {"error": "none"}, {"X-Error-Code": code, "X-Repo-Commit": found[0] if found else ""}
            )
        sha, files = found
        data = files[name]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if name.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        if self.command == "HEAD":
            return self.answer(200, b"", {**headers, "Content-Length": str(len(data))}, send_body=False)
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[int(start[1]) :], headers)
        self.answer(200, data, headers)


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    (rf"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
    (rf"GET /api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    (rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.tree),
    (rf"GET /api/models/{REPO}", Handler.info),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]
