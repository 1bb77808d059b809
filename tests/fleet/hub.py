"""A Hub on this machine: enough of its API for `huggingface_hub` to list a repository and fetch its files, with a log of what was asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as the repository `name`; `fetched` are those that were sent."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.name, self.folder, self.fetched = name, folder, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Asked(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        there = sorted(file for file in self.server.folder.iterdir() if file.is_file())
        if path.startswith(f"/api/models/{self.server.name}/tree/"):
            entries = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT} for file in there]
            self.answer(json.dumps(entries).encode(), "application/json")
        elif path.startswith(f"/api/models/{self.server.name}"):
            files = [{"rfilename": file.name, "size": file.stat().st_size} for file in there]
            self.answer(json.dumps({"id": self.server.name, "sha": COMMIT, "siblings": files}).encode(), "application/json")
        else:
            self.send_file(path, body=True)

    def do_HEAD(self) -> None:
        self.send_file(urlparse(self.path).path, body=False)

    def send_file(self, path: str, *, body: bool) -> None:
        file = self.server.folder / path.rpartition("/")[2]
        if not path.startswith(f"/{self.server.name}/resolve/") or not file.is_file():
            self.send_error(404)
            return
        if body:
            self.server.fetched.append(file.name)
        self.answer(file.read_bytes(), "application/octet-stream", body=body)

    def answer(self, data: bytes, kind: str, *, body: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def hub(name: str, folder: Path) -> Iterator[Hub]:
    server = Hub(name, folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
