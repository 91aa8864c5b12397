"""As much of W&B's server, on the loopback device, as a run needs: it says yes to everything and
remembers what it was told. Also what W&B itself has no reader for: the files of an offline run.
"""

import gzip
import json
import re
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Use as a context manager; `close` at any time, as a server that goes away."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[
            str, dict[str, Any]
        ] = {}  # id -> the variables of its last UpsertBucket that had any
        self.history: list[dict[str, Any]] = []
        self.summaries: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.asked: list[str] = []
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Data for every query and mutation a run sends."""
        self.asked.append(operation)
        if operation == "UpsertBucket":
            known = self.runs.setdefault(variables["name"], {})
            known.update({k: v for k, v in variables.items() if v is not None})
        if operation == "CreateArtifact":
            self.artifacts.append(variables)
        if operation == "UpsertView2":
            self.views.append(variables)
        project = {"id": "p", "name": "specomp", "entity": {"id": "e", "name": "someone"}}
        name = variables.get("name") or "run"
        bucket = {
            "id": "r",
            "name": name,
            "displayName": name,
            "description": "",
            "config": "{}",
            "sweepName": "",
            "historyLineCount": 0,
        }
        artifact = {"id": "a", "digest": "", "state": "COMMITTED", "aliases": [], "versionIndex": 0}
        artifact |= {"artifactSequence": {"id": "s", "name": "n", "latestArtifact": None}}
        files = [
            {"name": x, "uploadUrl": f"{self.url}/upload/{x}"} for x in variables.get("files") or []
        ]
        return {
            "viewer": {
                "id": "u",
                "entity": "someone",
                "username": "someone",
                "flags": "{}",
                "teams": {"edges": []},
            },
            "serverInfo": {
                "cliVersionInfo": {"min_cli_version": "0.1", "max_cli_version": "99"},
                "latestLocalVersionInfo": None,
                "features": [],
            },
            "upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True},
            "model": {"bucket": None},
            "project": None,
            "entity": None,
            "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files},
            "upsertView": {"view": {"id": "v", "name": variables.get("name")}, "inserted": True},
            "createArtifact": {"artifact": artifact},
        }

    def streamed(self, files: dict[str, Any]) -> None:
        """Lines of a run's history and summary."""
        for name, into in (
            ("wandb-history.jsonl", self.history),
            ("wandb-summary.json", self.summaries),
        ):
            into += [json.loads(line) for line in files.get(name, {}).get("content", ())]


class Handler(BaseHTTPRequestHandler):
    """Graphql, the file stream, and uploads, which are thrown away."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        reply: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            reply = {
                "data": self.server.answer(found[1] if found else "", asked.get("variables") or {})
            }
        elif self.path.endswith("/file_stream"):
            self.server.streamed(json.loads(body).get("files") or {})
        self.reply(json.dumps(reply).encode())

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.reply(b"{}")

    def do_GET(self) -> None:
        self.reply(b"{}")

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def stored(path: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: LevelDB's log format behind 7 bytes
    (https://github.com/google/leveldb/blob/main/doc/log_format.md).
    """
    from wandb.proto import wandb_internal_pb2

    block, header, last = (
        32768,
        7,
        {1, 4},
    )  # types: 1 a whole record; 2, 3, 4 its first, middle and last fragment
    data, position, record = path.read_bytes(), header, b""
    while position + header <= len(data):
        if block - position % block < header:  # padding
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:  # not written yet
            return
        record += data[position + header : position + header + length]
        position += header + length
        if kind in last:
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""
