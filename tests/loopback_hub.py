"""A model hub on the loopback interface: serves `<root>/{models,datasets}/<owner>/<name>/` at one commit each.

It knows what a pinned snapshot and a stream need: the repository at a revision with hashes, listings of folders,
and its files, whole or in ranges. It also takes uploads from whoever has `token`: a new repository, a commit of small
files and of large ones (LFS), a branch (served nowhere, its files are below `<root>/branches/<branch>/models/`).
Faults are switched on by name of the file: `corrupt` changes its last bytes, `cut` closes the connection in the middle,
`cut once` does so the first time. Every request is kept in `requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)")
LFS = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|[0-9a-f]{64})")
BY_HASH = (".safetensors", ".parquet")
"""Large files, which a hub knows by SHA-256; the others by their git blob."""


class NotThere(Exception):
    """What a hub answers in its error header."""


class LoopbackHub:
    """The server and what it serves; a context manager."""

    def __init__(self, root: Path):
        self.root, self.faults, self.gated, self.refused = Path(root), {}, set(), set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.token: str | None = None
        self.commits: list[tuple[str, str, str]] = []
        """(repository, branch, message) of every upload."""
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, kind: str, repository: str, revision: str | None = None) -> dict[str, Path]:
        """The files of a repository by name. Raises NotThere."""
        directory = self.root / kind / repository
        if not directory.is_dir():
            raise NotThere("RepoNotFound")
        if repository in self.gated:
            raise NotThere("GatedRepo")
        if repository in self.refused:
            raise NotThere("BadToken")
        found = sorted(Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
        files = {path.relative_to(directory).as_posix(): path for path in found}
        if revision not in (None, "main", _commit(files)):
            raise NotThere("RevisionNotFound")
        return files

    def commit(self, kind: str, repository: str) -> str:
        """The one commit of a repository."""
        return _commit(self.files(kind, repository))


def _blob(path: Path) -> str:
    return _hashed(path, "blob", *_state(path))


def _sha256(path: Path) -> str:
    return _hashed(path, "sha256", *_state(path))


def _state(path: Path) -> tuple[int, int, int]:
    """What is another after a file has changed."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


@cache
def _hashed(path: Path, kind: str, *state: int) -> str:
    """A hash of a file, which is read once for all requests."""
    content = path.read_bytes()
    if kind == "sha256":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _commit(files: dict[str, Path]) -> str:
    return hashlib.sha1("".join(f"{name} {_blob(path)}\n" for name, path in files.items()).encode()).hexdigest()


def _leaf(name: str, path: Path) -> dict:
    """A file as the listing of a repository's tree shows it."""
    file = _sibling(name, path)
    leaf = {"type": "file", "path": name, "size": file["size"], "oid": file["blobId"]}
    return leaf | ({"lfs": file["lfs"] | {"oid": file["lfs"]["sha256"]}} if "lfs" in file else {})


def _sibling(name: str, path: Path) -> dict:
    entry = {"rfilename": name, "size": path.stat().st_size, "blobId": _blob(path)}
    if name.endswith(BY_HASH):
        entry["lfs"] = {"sha256": _sha256(path), "size": path.stat().st_size, "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        try:
            if self._takes(path, body):
                pass
            elif match := API.fullmatch(path):
                self._repository(*match.groups(), parse_qs(url.query), body)
            elif match := FILE.fullmatch(path):
                self._file(*match.groups())
            else:
                raise NotThere("EntryNotFound")
        except NotThere as fault:
            code = {"GatedRepo": 403, "BadToken": 401}.get(str(fault), 404)
            told = "Invalid credentials in Authorization header" if code == 401 else "no"
            headers = {"X-Error-Message": told} | ({} if code == 401 else {"X-Error-Code": str(fault)})
            self._send(code, json.dumps({"error": told}).encode(), headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _takes(self, path: str, body: bytes) -> bool:
        """Whether a request was part of an upload, which is then answered. Raises NotThere without the token."""
        write, large = WRITE.fullmatch(path), LFS.fullmatch(path)
        if not (write or large or path in ("/api/repos/create", "/api/validate-yaml")) or self.command == "GET":
            return False
        # storage is another server than the hub, which is asked without the token
        if self.command != "PUT" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise NotThere("BadToken")
        if self.command == "PUT":
            self.hub.large[large[2]] = body if hashlib.sha256(body).hexdigest() == large[2] else b""
            self._json({})
        elif large:
            self._json(
                {"transfer": "basic", "objects": [self._wanted(large[1], x) for x in json.loads(body)["objects"]]}
            )
        elif write:
            self._write(*write.groups(), body)
        elif path.endswith("create"):
            self._create(json.loads(body))
        else:
            card = json.loads(body)["content"]
            good = card.startswith("---\n") and isinstance(yaml.safe_load(card.split("---\n")[1]), dict)
            self._json({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)
        return True

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = (self.hub.root / "models" / name).exists()
        if not there:
            (self.hub.root / "models" / name).mkdir(parents=True)
            self.hub.private[name] = asked.get("visibility") == "private"
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def _wanted(self, repository: str, thing: dict) -> dict:
        href = f"{self.hub.url}/{repository}.git/info/lfs/objects/{thing['oid']}"
        return thing | ({} if thing["oid"] in self.hub.large else {"actions": {"upload": {"href": href}}})

    def _write(self, repository: str, verb: str, branch: str, body: bytes) -> None:
        base = self.hub.root if branch == "main" else self.hub.root / "branches" / branch
        place = base / "models" / repository
        if not (self.hub.root / "models" / repository).exists():
            raise NotThere("RepoNotFound")
        if verb == "branch":
            there = place.exists()
            place.mkdir(parents=True, exist_ok=True)
            return self._json({}, 409 if there else 200)
        if not place.exists():
            raise NotThere("RevisionNotFound")
        if verb == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "lfs" if n.endswith(BY_HASH) else "regular"} for n in names]
            blobs = {n: _blob(place / n) for n in names if (place / n).is_file() and not n.endswith(BY_HASH)}
            return self._json({"files": [x | {"shouldIgnore": False, "oid": blobs.get(x["path"])} for x in modes]})
        message = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                continue
            content = self.hub.large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            (place / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (place / value["path"]).write_bytes(content)
        self.hub.commits.append((repository, branch, message))
        self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _repository(self, kind, repository, view, revision, below, query, body) -> None:
        files = self.hub.files(kind, repository, revision)
        if view == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            return self._json(_folder(files, (below or "").strip("/"), recursive=recursive))
        if view == "paths-info":
            asked = json.loads(body)["paths"]
            found = [_leaf(name, path) for name, path in files.items() if name in asked]
            folders = [p for p in asked if any(name.startswith(f"{p}/") for name in files)]
            return self._json(found + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in folders])
        facts = {
            "_id": "0" * 24, "id": repository, "sha": _commit(files), "private": False, "tags": [], "downloads": 0,
            "likes": 0, "siblings": [_sibling(name, path) for name, path in files.items()],
        }  # fmt: skip
        self._json(facts)

    def _json(self, content, code: int = 200) -> None:
        self._send(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, kind: str | None, repository: str, revision: str, name: str) -> None:
        files = self.hub.files(kind or "models", repository, revision)
        if name not in files:
            raise NotThere("EntryNotFound")
        content, entry = files[name].read_bytes(), _sibling(name, files[name])
        headers = {"ETag": f'"{entry.get("lfs", {}).get("sha256", entry["blobId"])}"', "X-Repo-Commit": revision}
        headers |= {"Accept-Ranges": "bytes"}
        key = f"{repository}/{name}"
        fault = self.hub.faults.get(key) if self.command == "GET" else None
        if fault == "corrupt":
            content = content[:-4] + b"\0\0\0\0"
        if fault == "cut once":
            del self.hub.faults[key]
        code, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            size, first = len(content), int(asked[1])
            content = content[first : int(asked[2] or size - 1) + 1]
            code = 206
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
        self._send(code, content, headers, cut=str(fault).startswith("cut"))

    def _send(self, code: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True
            self.connection.close()


def _folder(files: dict[str, Path], below: str, *, recursive: bool) -> list[dict]:
    """The listing of a folder: files and folders in it, and all that is further down if `recursive`."""
    leaves, folders = [], {}
    for name, path in files.items():
        if below and not name.startswith(f"{below}/"):
            continue
        parts = name[len(below) :].strip("/").split("/")
        for depth in range(1, len(parts)):
            if recursive or depth == 1:
                folder = "/".join([*([below] if below else []), *parts[:depth]])
                folders[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            leaves.append(_leaf(name, path))
    if below and not leaves and not folders:
        raise NotThere("EntryNotFound")
    return [*folders.values(), *leaves]
