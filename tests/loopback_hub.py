"""A model hub on the loopback interface: serves `<root>/{models,datasets}/<owner>/<name>/` at one commit each.

It knows what a pinned snapshot and a stream need: the repository at a revision with hashes, listings of folders,
and its files, whole or in ranges. Faults are switched on by name of the file: `corrupt` changes its last bytes, `cut`
closes the connection in the middle, `cut once` does so the first time. Every request is kept in `requests`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
BY_HASH = (".safetensors", ".parquet")
"""Large files, which a hub knows by SHA-256; the others by their git blob."""


class NotThere(Exception):
    """What a hub answers in its error header."""


class LoopbackHub:
    """The server and what it serves; a context manager."""

    def __init__(self, root: Path):
        self.root, self.faults, self.gated, self.refused = Path(root), {}, set(), set()
        self.requests: list[tuple[str, str, str | None]] = []
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
        files = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}
        if revision not in (None, _commit(files)):
            raise NotThere("RevisionNotFound")
        return files

    def commit(self, kind: str, repository: str) -> str:
        """The one commit of a repository."""
        return _commit(self.files(kind, repository))


def _blob(path: Path) -> str:
    content = path.read_bytes()
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
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": path.stat().st_size, "pointerSize": 130}
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
            if match := API.fullmatch(path):
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

    do_HEAD = do_POST = do_GET

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

    def _json(self, content) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

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
