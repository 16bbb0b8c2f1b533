"""A small HTTP server with the routes of the Hub that loading and pushing use."""

import base64
import hashlib
import http.server
import json
import threading


class HubServer:
    """Serve ``repos[id][revision][file] = bytes`` on a local port; pushes are added to ``repos``.

    ``truncate`` names files whose download breaks off half-way, ``gated`` repositories that ask for permission;
    ``requests`` records (method, path).
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.truncate: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.requests.append(("HEAD", self.path))
                hub.resolve(self, body=False)

            def do_GET(self) -> None:
                hub.requests.append(("GET", self.path))
                hub.resolve(self, body=True)

            def do_POST(self) -> None:
                hub.requests.append(("POST", self.path))
                hub.accept(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *arguments: object) -> None:
                pass

        self.handler = Handler
        self.port = 0
        self.server: http.server.ThreadingHTTPServer | None = None
        self.open()
        self.url = f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Listen, empty; on the same port again after :meth:`close`."""
        self.repos.clear()
        self.truncate.clear()
        self.gated.clear()
        self.requests.clear()
        if self.server is None:
            self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
            self.port = self.server.server_port
            threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Refuse connections from now on."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = files

    def resolve(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        parts = request.path.strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            self.reply(request, 404, b"")
            return
        repo, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repo not in self.repos:
            self.reply(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo in self.gated:
            self.reply(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        elif revision not in self.repos[repo]:
            self.reply(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file not in self.repos[repo][revision]:
            commit = hashlib.sha1(revision.encode()).hexdigest()
            self.reply(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            content = self.repos[repo][revision][file]
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": hashlib.sha1(revision.encode()).hexdigest(),
            }
            self.reply(request, 200, content, headers, body=body, half=file in self.truncate)

    def accept(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        """The calls of a push: create, check the card, preupload (all files inline), commit."""
        if request.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.setdefault(repo, {}).setdefault("main", {})
            self.reply(request, 200, json.dumps({"url": f"{self.url}/{repo}", "name": repo}).encode())
        elif request.path == "/api/validate-yaml":
            self.reply(request, 200, b'{"errors": [], "warnings": []}')
        elif "/preupload/" in request.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.reply(request, 200, json.dumps({"files": files}).encode())
        elif "/commit/" in request.path:
            repo = "/".join(request.path.split("/")[3:5])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.repos[repo]["main"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = {"commitUrl": f"{self.url}/{repo}/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
            self.reply(request, 200, json.dumps(commit).encode())
        else:
            self.reply(request, 404, b"")

    @staticmethod
    def reply(request, status, content, headers=None, body=True, half=False) -> None:
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("Connection", "close")
        request.end_headers()
        if body:
            request.wfile.write(content[: len(content) // 2] if half else content)
        request.close_connection = True
