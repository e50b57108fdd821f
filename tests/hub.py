"""A local server with as much of the hub's API as a snapshot download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve `models/org/name` and `datasets/org/name`; yield the address and a log of requests."""
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0].lstrip("/")
            log.append(f"{self.command} {path}")
            for name, files in repositories.items():
                api = f"api/{name}"
                if path == f"{api}/revision/{COMMIT}":
                    info = {
                        "id": name.split("/", 1)[1],
                        "sha": COMMIT,
                        "siblings": [{"rfilename": file} for file in files],
                    }
                    return self._send(json.dumps(info).encode(), body, {"Content-Type": "application/json"})
                if path.startswith(f"{api}/tree/{COMMIT}"):
                    tree = [
                        {"type": "file", "path": file, "size": len(content), "oid": _sha1(content)}
                        for file, content in files.items()
                    ]
                    return self._send(json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
                prefix = f"{name.removeprefix('models/')}/resolve/{COMMIT}/"
                file = path.removeprefix(prefix)
                if path.startswith(prefix) and file in files:
                    content = files[file]
                    etag = hashlib.sha256(content).hexdigest()
                    return self._send(content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            return self._send(b"{}", body, {"X-Error-Code": "RepoNotFound"}, status=404)

        def _send(self, content: bytes, body: bool, headers: Mapping[str, str], status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
