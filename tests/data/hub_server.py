"""A server on loopback that speaks as much of the hub's protocol as its clients ask for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

# repository -> revision -> file -> content
Repositories = dict[str, dict[str, dict[str, bytes]]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories
    gated: set[str]
    requests: list[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        for name in self.gated:
            if f"/{name}/" in path and "/resolve/" in path:
                return self._error(403, "GatedRepo")
        if path.startswith("/api/datasets/"):
            return self._api(path.removeprefix("/api/datasets/"))
        if path.startswith("/datasets/") and "/resolve/" in path:
            name, rest = path.removeprefix("/datasets/").split("/resolve/", 1)
            return self._resolve(name, rest)
        return self._error(404, "RepoNotFound")

    def _revision(self, name: str, rest: str) -> tuple[str, str] | None:
        for revision in self.repositories[name]:
            for spelling in (revision, _sha(name, revision)):
                if rest == spelling or rest.startswith(spelling + "/"):
                    return revision, rest[len(spelling) + 1 :]
        return None

    def _api(self, rest: str) -> None:
        name = next((n for n in self.repositories if rest == n or rest.startswith(n + "/")), None)
        if name is None:
            return self._error(404, "RepoNotFound")
        kind, _, rest = rest[len(name) + 1 :].partition("/")
        found = self._revision(name, rest or "main")
        if found is None:
            return self._error(404, "RevisionNotFound")
        revision, folder = found
        files = self.repositories[name][revision]
        if kind in ("", "revision"):
            return self._json(
                {
                    "id": name,
                    "sha": _sha(name, revision),
                    "siblings": [{"rfilename": file} for file in files],
                    "private": False,
                    "gated": "manual" if name in self.gated else False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "lastModified": "2024-01-01T00:00:00.000Z",
                }
            )
        if kind == "tree":
            inside = [f for f in files if not folder or f.startswith(folder + "/")]
            if folder and not inside:
                return self._error(404, "EntryNotFound")
            everything = "recursive=true" in urlsplit(self.path).query.lower()
            return self._json(_tree(files, inside, folder, everything))
        if kind == "paths-info":
            wanted = json.loads(self.body)["paths"]
            folders = {parent for f in files for parent in _parents(f)}
            entries = [_entry(f, files[f]) for f in wanted if f in files]
            entries += [{"type": "directory", "path": f, "oid": ""} for f in wanted if f in folders]
            return self._json(entries)
        return self._error(404, "EntryNotFound")

    def _resolve(self, name: str, rest: str) -> None:
        if name not in self.repositories:
            return self._error(404, "RepoNotFound")
        found = self._revision(name, rest)
        if found is None:
            return self._error(404, "RevisionNotFound")
        revision, file = found
        if file not in self.repositories[name][revision]:
            # With the commit, so that a client may remember that there is no such file.
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": _sha(name, revision)})
        content = self.repositories[name][revision][file]
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": _sha(name, revision)}
        status = 200
        if "Range" in self.headers and self.command == "GET":
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            end = min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            content, status = content[int(first) : end + 1], 206
        self._send(status, content, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        explained = {"X-Error-Code": code, "X-Error-Message": code}
        self._send(status, code.encode(), explained | (headers or {}))

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}


def _tree(
    files: dict[str, bytes], inside: list[str], folder: str, everything: bool
) -> list[dict[str, object]]:
    """The files and folders in a folder, or with all that is below it."""
    start = f"{folder}/" if folder else ""
    folders = {parent for f in inside for parent in _parents(f) if parent.startswith(start)}
    listed: list[dict[str, object]] = [
        {"type": "directory", "path": parent, "oid": _etag(parent.encode())}
        for parent in sorted(folders)
    ]
    listed += [_entry(f, files[f]) for f in inside]
    return [e for e in listed if everything or "/" not in str(e["path"])[len(start) :]]


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


@contextmanager
def hub(repositories: Repositories, gated: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields the address to set as HF_ENDPOINT, and the list of requests as they come."""
    requests: list[str] = []
    state = {"repositories": repositories, "gated": gated, "requests": requests}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), state))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
