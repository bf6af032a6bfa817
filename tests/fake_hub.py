"""A hub on this machine: repositories with commits, branches and tags, downloads by range, commits, and faults."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

# what the hub keeps beside Git, by names' endings
LARGE = (".safetensors", ".bin", ".pth", ".gguf", ".png")
PREFIX = {"": "models", "datasets/": "datasets"}


@dataclass
class Repository:
    """Commits by their hashes, each with its files' contents; the commits of branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def add(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit of these files and no others, to which the branch moves."""
        text = repr((len(self.commits), sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit


class FakeHub:
    """Attributes:
    repositories: by "models/ORG/NAME" or "datasets/ORG/NAME".
    requests: (method, path) of all that came.
    fail: of a request's method and path gives None, a status, or a number of bytes (negative) after which the
        connection breaks.
    tokens: who may write, and read what is private or gated; empty: all.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.messages: list[str] = []
        self.fail = lambda method, path: None
        self.gated: set[str] = set()
        self.tokens: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.server = Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def put(self, name: str, source: Path | dict[str, bytes], branch: str = "main", kind: str = "models") -> str:
        """A new commit of a repository, with the files of a directory; returns its hash."""
        if isinstance(source, Path):
            paths = (path for path in source.rglob("*") if path.is_file())
            source = {str(path.relative_to(source)): path.read_bytes() for path in paths}
        return self.repositories.setdefault(f"{kind}/{name}", Repository()).add(source, branch)

    def downloaded(self) -> list[str]:
        """The names of the files that were sent, in order."""
        return [path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/resolve/" in path]


class Server(ThreadingHTTPServer):
    # A request that hangs does not keep the test from ending.
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(length)
        self.hub.requests.append((self.command, path))
        self.broken_after = None
        fault = self.hub.fail(self.command, path)
        if fault is not None and fault > 0:
            return self._send(fault, {"error": "as the test wants it"})
        if fault is not None:
            self.broken_after = -fault
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return method(self, body, parse_qs(url.query), **match.groupdict())
        self._send(404, {"error": f"no route {path}"})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, content: object, **headers) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            if self.broken_after is not None:
                self.wfile.write(data[: self.broken_after])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
                return
            self.wfile.write(data)

    def _find(self, kind: str, name: str) -> Repository | None:
        """The repository; None where an error was sent."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repository = self.hub.repositories.get(f"{kind}/{name}")
        allowed = token in self.hub.tokens
        if repository is None or (repository.private and not allowed):
            error = {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Repository not found"}
            self._send(401 if not token else 404, {"error": "Repository not found"}, **error)
        elif name in self.hub.gated and not allowed:
            self._send(401, {"error": "gated"}, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        else:
            return repository
        return None

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision, revision)
        if commit in repository.commits:
            return commit
        self._send(404, {"error": "x"}, X_Error_Code="RevisionNotFound", X_Error_Message=f"no {revision}")
        return None

    def info(self, body, query, kind, name, revision="main"):
        if (repository := self._find(kind, name)) and (commit := self._commit_of(repository, revision)):
            files = [{"rfilename": file} for file in repository.commits[commit]]
            about = {"_id": name, "id": name, "modelId": name, "private": repository.private, "tags": []}
            self._send(200, about | {"sha": commit, "siblings": files})

    def tree(self, body, query, kind, name, revision, folder=""):
        if not ((repository := self._find(kind, name)) and (commit := self._commit_of(repository, revision))):
            return
        files = repository.commits[commit]
        inside = {file: data for file, data in files.items() if file.startswith(f"{folder}/" if folder else "")}
        self._send(200, [_described(file, data) for file, data in inside.items()])

    def paths_info(self, body, query, kind, name, revision):
        if not ((repository := self._find(kind, name)) and (commit := self._commit_of(repository, revision))):
            return
        files = repository.commits[commit]
        wanted = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
        found = [_described(file, files[file]) for file in wanted if file in files]
        folders = {file for file in wanted if any(other.startswith(f"{file}/") for other in files)}
        self._send(200, found + [{"type": "directory", "path": file, "oid": "0" * 40, "size": 0} for file in folders])

    def resolve(self, body, query, prefix, name, revision, file):
        if not (repository := self._find(PREFIX[prefix or ""], name)):
            return
        if not (commit := self._commit_of(repository, revision)):
            return
        if file not in repository.commits[commit]:
            self._send(404, {"error": "x"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        data = repository.commits[commit][file]
        headers = {"X_Repo_Commit": commit, "ETag": f'"{_etag(file, data)}"', "X_Linked_Size": len(data)}
        headers |= {"X_Linked_Etag": f'"{_etag(file, data)}"', "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(match[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], **headers)
        else:
            self._send(200, data, **headers)

    def whoami(self, body, query):
        self._send(200, {"name": "org", "type": "user"})

    def valid(self, body, query):
        self._send(200, {"errors": [], "warnings": []})

    def create(self, body, query):
        wanted = json.loads(body)
        name = f"models/{wanted['organization']}/{wanted['name']}"
        if not self._may_write():
            return
        if name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": name})
            return
        self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        self.hub.repositories[name].add({".gitattributes": b""})
        self._send(200, {"url": f"{self.hub.url}/{wanted['organization']}/{wanted['name']}", "name": wanted["name"]})

    def _may_write(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token in self.hub.tokens:
            return True
        status = 403 if token else 401
        self._send(status, {"error": "You don't have the rights" if token else "Invalid username or password."})
        return False

    def preupload(self, body, query, kind, name, revision):
        if self._may_write():
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})

    def batch(self, body, query, name):
        def upload(o):
            return {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}

        self._send(200, {"transfer": "basic", "objects": [upload(o) for o in json.loads(body)["objects"]]})

    def store(self, body, query, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._send(200, {})

    def commit(self, body, query, kind, name, revision):
        if not self._may_write() or not (repository := self._find(kind, name)):
            return
        files = dict(repository.commits[repository.refs[revision]])
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                self.hub.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.add(files, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


_REPOSITORY = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    (rf"/api/{_REPOSITORY}", _Handler.info),
    (rf"/api/{_REPOSITORY}/revision/(?P<revision>.+)", _Handler.info),
    (rf"/api/{_REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    (rf"/api/{_REPOSITORY}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (rf"/api/{_REPOSITORY}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"/api/{_REPOSITORY}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (r"/api/repos/create", _Handler.create),
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.valid),
    (r"/(?P<prefix>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
)


def _etag(file: str, data: bytes) -> str:
    if file.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _described(file: str, data: bytes) -> dict:
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} | (
        large if file.endswith(LARGE) else {}
    )


@contextlib.contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """Within it, `huggingface_hub` here and in processes that are started knows no other hub; its cache is empty."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    forget()
    try:
        yield hub
    finally:
        forget()
        close_session()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def forget() -> None:
    """As a new process, which has not resolved any id."""
    from minorca.files import hub

    hub.resolve.cache_clear()
    hub._download.cache_clear()
