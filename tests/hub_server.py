"""A hub on 127.0.0.1 that serves models' folders, and counts what it is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`models` are folders by name, or the HTTP status of a refusal."""

    def __init__(self, models: dict[str, Path | int]) -> None:
        self.models, self.gets = models, Counter[str]()
        self.delay = 0.0

    @property
    def weights(self) -> Counter[str]:
        """How often each weight file was sent."""
        return Counter({file: n for file, n in self.gets.items() if file.endswith((".safetensors", ".bin"))})


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of a server that plays `hub`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self._serve(body=False)

        def do_GET(self) -> None:
            self._serve(body=True)

        def _serve(self, body: bool) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            listing = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if listing else parts[:2])
            model = hub.models.get(name, 404)
            if isinstance(model, int):
                code = {401: "GatedRepo", 403: "GatedRepo"}.get(model, "RepoNotFound")
                return self._send(model, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"}, body)
            files = {str(file.relative_to(model)): file for file in sorted(model.rglob("*")) if file.is_file()}
            if listing and parts[4:5] in ([], ["revision"]):
                siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in files.items()]
                return self._json({"id": name, "sha": COMMIT, "siblings": siblings}, body)
            if listing:
                tree = [
                    {"type": "file", "path": path, "size": file.stat().st_size, "oid": _digest(file)}
                    for path, file in files.items()
                ]
                return self._json(tree, body)
            path = "/".join(parts[4:])
            if path not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            if body:
                hub.gets[f"{name}/{path}"] += 1
                threading.Event().wait(hub.delay)
            headers = {"ETag": f'"{_digest(files[path])}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            with suppress(ConnectionError):  # a download that was ended while it waited
                self._send(200, files[path].read_bytes(), headers, body)

        def _json(self, value: object, body: bool) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

        def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
