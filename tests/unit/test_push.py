"""specomp push, against a stand-in of the hub's HTTP interface."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from running import random_tokens
from tiny import tiny_model, tiny_tokenizer

import specomp
from specomp import cli
from specomp.errors import UserError
from specomp.models.push import push

TOKENS = random_tokens(8, 32)


class Hub(ThreadingHTTPServer):
    """Keeps what is committed in a folder. refuse: the status of every answer, where it is one."""

    def __init__(self, folder):
        self.folder, self.refuse, self.invalid, self.asked = folder, None, False, []
        super().__init__(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers.get("authorization")))
        status, found = self.answer(body)
        content = json.dumps(found).encode()
        self.send_response(self.server.refuse or status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, body):
        url = f"{self.server.url}/org/mine"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            assert (asked["organization"], asked["name"]) == ("org", "mine")
            return 200, {"url": url, "name": "org/mine", "id": "1"}
        if self.path == "/api/validate-yaml":
            if self.server.invalid:
                return 400, {"errors": [{"message": '"license" must be one of'}], "warnings": []}
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in self.path:
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                for x in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        assert "/commit/" in self.path
        for line in body.splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                path = self.server.folder / told["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(told["value"]["content"]))
        return 200, {"commitUrl": f"{url}/commit/0", "commitOid": "0" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model("llama")
    report = specomp.compress(model, TOKENS, "svd_llm", 0.4, calibration={"batch_size": 4})
    where = tmp_path_factory.mktemp("pushed") / "small"
    specomp.save(model, where, tiny_tokenizer(), report=report)
    return where


def test_what_arrives_is_the_model(hub, folder, capsys):
    assert cli.run(["push", str(folder), "org/mine"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/org/mine/commit/0\n"
    found = specomp.load(hub.folder).model  # with its checksums
    assert torch.equal(found(TOKENS[:1]).logits, specomp.load(folder).model(TOKENS[:1]).logits)
    card = ModelCard.load(hub.folder / "README.md")
    assert 'from_pretrained("org/mine"' in card.text and "FOLDER" not in card.text
    assert "FOLDER" in (folder / "README.md").read_text()
    assert {x for _, x in hub.asked} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("status", "said"), [(401, "hf auth login"), (403, "hf auth login"), (409, "409")]
)
def test_what_the_hub_refuses_is_one_line(hub, folder, capsys, status, said):
    hub.refuse = status
    assert cli.run(["push", str(folder), "org/mine"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("specomp: The hub refuses org/mine") and said in line
    assert "hf_secret" not in line and not hub.folder.exists()


def test_a_card_that_the_hub_cannot_read_stops_before_anything_is_sent(hub, folder):
    hub.invalid = True
    with pytest.raises(UserError, match='README.md.*"license" must be one of'):
        push(folder, "org/mine")
    assert not hub.folder.exists()
    assert [path for path, _ in hub.asked] == ["/api/validate-yaml"]  # no empty repository is left


def test_a_hub_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    with pytest.raises(UserError, match="cannot be reached"):
        push(folder, "org/mine", endpoint="http://127.0.0.1:9", token="x")


def test_only_what_belongs_to_the_model_is_sent(hub, folder, tmp_path):
    """Nothing hidden, nothing that a link leads to; a card of one's own as it is."""
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    for name in (".git/config", ".cache/huggingface/x", "__pycache__/m.pyc", ".env"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("secret")
    (mine / "README.md").write_text("put it in MY_FOLDERS")
    push(mine, "org/mine")
    sent = {x.relative_to(hub.folder).as_posix() for x in hub.folder.rglob("*") if x.is_file()}
    assert sent == {x.name for x in folder.iterdir()}
    assert (hub.folder / "README.md").read_text() == "put it in MY_FOLDERS"
    (tmp_path / "secret").write_text("secret")
    (mine / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"notes\.txt is a link to a file outside"):
        push(mine, "org/mine")


def test_what_is_not_a_folder_of_ours_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="is no name of a repository"):
        push(folder, "a/b/c")
    with pytest.raises(UserError, match="write ORG/NAME"):
        push(folder, "mine")
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="was not written by specomp"):
        push(tmp_path / "plain", "org/mine")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        push(folder, "org/mine", token="x")
