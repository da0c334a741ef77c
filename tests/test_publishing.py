"""Upload to the Hub: the real client against a server of our own that speaks its three calls."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from test_cli_process import IN_ONE_PROCESS
from toy import toy_images, toy_run
from unrote.data import open_images
from unrote.errors import InputError
from unrote.publishing import files_to_push, push_run


class Hub(BaseHTTPRequestHandler):
    """Takes every file inline and remembers what it was given."""

    def do_POST(self):
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        )
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.path == "/api/validate-yaml" and b"me/invalid" in body:
            self.reply(400, {"errors": [{"message": '"pipeline_tag" must be a string'}], "warnings": []})
            return
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            answer = {"url": f"{self.server.url}/me/{name}", "name": f"me/{name}"}
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]}
        elif "/commit/" in self.path:
            if "/closed/" in self.path:
                self.reply(403, {"error": "read only"})
                return
            if "/many/" in self.path:
                self.reply(429, {"error": "too many requests"})
                return
            if "/strange/" in self.path:
                self.answer(200, b"<html>")
                return
            if "/lost/" in self.path:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            name = self.path.split("/")[4]
            answer = {"commitUrl": f"{self.server.url}/me/{name}/commit/{'a' * 40}", "commitOid": "a" * 40}
        else:
            answer = {"errors": [], "warnings": []}
        self.reply(200, answer)

    def chunks(self):
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        return content

    def reply(self, status, answer):
        self.answer(status, json.dumps(answer).encode())

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp("push") / "run", training__epochs=1)


@pytest.fixture(scope="module")
def answers(hub, run):
    pushed = (("me/a",), ("me/b", "--public"), ("me/closed",), ("me/d", "--dry-run"), ("me/invalid",), ("me/lost",))
    pushed += ("me/many",), ("me/strange",)
    commands = [["push", str(run.path), *words] for words in pushed]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    program = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(commands)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert "hf_secret" not in done.stdout + done.stderr
    return json.loads(done.stdout)


def test_model_and_card_arrive_in_one_commit(hub, run, answers):
    code, out, err = answers[0]
    assert (code, out) == (0, f"{hub.url}/me/a/commit/{'a' * 40}\n"), err
    ((_, commit, token),) = [call for call in hub.seen if call[0] == "/api/models/me/a/commit/main"]
    assert token == "Bearer hf_secret"
    lines = [json.loads(line)["value"] for line in commit.splitlines()]
    arrived = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
    expected = {path.relative_to(run.model_folder).as_posix() for path in run.model_folder.rglob("*") if path.is_file()}
    assert set(arrived) == expected
    for name in expected - {"README.md"}:
        assert arrived[name] == (run.model_folder / name).read_bytes()
    card = arrived["README.md"].decode()
    assert 'DDPMPipeline.from_pretrained("me/a")' in card
    assert "library_name: diffusers" in card
    assert "ledger.csv" not in card
    assert answers[3][1].split() == list(files_to_push(run.path, "me/d"))
    assert set(answers[3][1].split()) == set(arrived)


def test_private_unless_asked(hub, answers):
    created = [json.loads(body) for path, body, _ in hub.seen if path == "/api/repos/create"]
    # Newer clients say it in a word.
    private = {one["name"]: one.get("private", one.get("visibility") == "private") for one in created}
    assert private == {
        "a": True,
        "b": False,
        "closed": True,
        "invalid": True,
        "lost": True,
        "many": True,
        "strange": True,
    }


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (2, ("me/closed: the Hub refuses: ", "hf auth login")),
        (
            4,
            ("me/invalid: the Hub does not take it: ", '"pipeline_tag" must be a string', "README.md, then push again"),
        ),
        (5, ("me/lost: the Hub does not answer (", "HF_ENDPOINT, then push again")),
        (6, ("me/many: the Hub refuses: ", "429")),
        (7, ("me/strange: the Hub does not answer (Expecting value", "HF_ENDPOINT, then push again")),
    ],
)
def test_a_refusal_says_what_to_do(answers, place, says):
    code, out, err = answers[place]
    assert (code, out) == (2, "")
    assert all(words in err for words in says), err
    assert ("hf auth login" in err) == (place == 2)
    assert "Traceback" not in err


def test_without_a_network_it_says_so(run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="me/a: the Hub is not asked, since HF_HUB_OFFLINE is set"):
        push_run(run.path, "me/a")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"me/a: the Hub does not answer \(.*refused\): look at the network"):
        push_run(run.path, "me/a")


def test_what_can_not_be_pushed(run, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        files_to_push(tmp_path, "me/photos")
    with pytest.raises(InputError, match="OWNER/NAME"):
        files_to_push(run.path, "photos")
    for name in ("me/my photos", "me/a--b", "me/photos.git", "-me/photos"):
        with pytest.raises(InputError, match=f"{name}: is no name of a repository"):
            files_to_push(run.path, name)
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run/README.md").unlink()
    with pytest.raises(InputError, match=r"run/README\.md is gone, though the run is finished"):
        files_to_push(tmp_path / "run", "me/photos")
    shutil.rmtree(tmp_path / "run/model")
    with pytest.raises(InputError, match="run/model is gone, though the run is finished"):
        files_to_push(tmp_path / "run", "me/photos")
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        files_to_push(tmp_path / "run", "me/photos")


def test_what_is_pushed_names_no_path(tmp_path):
    """Neither of the images nor of what they were compared with, nor where a part of the model was loaded from."""
    for name, seed in (("photos", 0), ("held-out", 5)):
        np.savez(tmp_path / f"{name}.npz", images=toy_images(seed=seed).images)
    names = open_images(tmp_path / "photos.npz", resolution=None).names
    (tmp_path / "keep.txt").write_text("".join(f"{name}\n" for name in names[:20]))
    settings = {"data__source": str(tmp_path / "photos.npz"), "data__include": str(tmp_path / "keep.txt")}
    settings["monitor__holdout"] = str(tmp_path / "held-out.npz")
    run = toy_run(tmp_path / "run", "standard", images=tmp_path / "photos.npz", training__epochs=1, **settings)
    config = run.model_folder / "unet/config.json"
    loaded = json.loads(config.read_text())
    config.write_text(json.dumps(loaded | {"_name_or_path": str(tmp_path / "base/unet")}))
    files = files_to_push(run.path, "me/photos")
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.read_bytes()
        assert str(tmp_path).encode() not in content, name
    assert json.loads(files["unet/config.json"]) == loaded
    card = files["README.md"].decode()
    assert "on 20 images" in card and "training.epochs: 1" in card and "data." not in card and "holdout" not in card
