"""Upload to the Hub: the real client against a server of our own that speaks its three calls."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from test_cli_process import IN_ONE_PROCESS
from toy import toy_run
from unrote.errors import InputError
from unrote.publishing import files_to_push


class Hub(BaseHTTPRequestHandler):
    """Takes every file inline and remembers what it was given."""

    def do_POST(self):
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        )
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
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
        content = json.dumps(answer).encode()
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
    commands = [
        ["push", str(run.path), name, *more] for name, *more in (("me/a",), ("me/b", "--public"), ("me/closed",))
    ]
    commands.append(["push", str(run.path), "me/d", "--dry-run"])
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
    assert private == {"a": True, "b": False, "closed": True}


def test_a_refusal_says_what_to_do(answers):
    code, _, err = answers[2]
    assert code == 2
    assert "me/closed: the Hub refuses: " in err
    assert "hf auth login" in err
    assert "Traceback" not in err


def test_what_can_not_be_pushed(run, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        files_to_push(tmp_path, "me/photos")
    with pytest.raises(InputError, match="OWNER/NAME"):
        files_to_push(run.path, "photos")
    (tmp_path / "config.yaml").write_bytes((run.path / "config.yaml").read_bytes())
    with pytest.raises(InputError, match="not finished"):
        files_to_push(tmp_path, "me/photos")
