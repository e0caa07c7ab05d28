"""Names of the hub, against a small server on this machine that answers what huggingface_hub asks."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from tiny import tiny_config

from longlora_jax.errors import UserError
from longlora_jax.weights.hf_config import config_to_json, load_config
from longlora_jax.weights.hub import local_folder

ROOT = Path(__file__).parents[2]
TOKEN = "hf_secretOfTheUser"
# A call takes 0.3 s; without our limits huggingface_hub would wait for half a minute, or for ever.
SECONDS = 8

Files = dict[str, bytes]


def files(names: str) -> Files:
    """Files that hold their own names: no two are the same."""
    return {name: name.encode() for name in names.split()}


CONFIG = tiny_config()
SMALL = files("generation_config.json tokenizer.json tokenizer.model merges.txt chat_template.jinja")
SMALL["config.json"] = json.dumps(config_to_json(CONFIG, "float32")).encode()
SHARDS = files("model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json")
PICKLES = files("pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json")
ADAPTER = files("adapter_config.json trainable_params.bin")
JUNK = files(
    "README.md model.gguf flax_model.msgpack tf_model.h5 training_args.bin optimizer.bin consolidated.safetensors "
    "original/consolidated.00.pth original/params.json onnx/config.json onnx/model.safetensors step/pytorch_model.bin"
)


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(revision: str) -> str:
    return digest(revision.encode())


class Refusal(NamedTuple):
    """An answer to requests whose path has `where` in it. code: what the hub calls the fault."""

    status: int
    code: str = ""
    said: str = ""
    where: str = "/"


class Hub(ThreadingHTTPServer):
    """The hub of {"org/name": {"main": {file: content}}}.

    refuse: what it answers to a path instead of looking, or None. asked: the requests so far. cut: names of files whose
    connection breaks once in the middle.
    """

    def __init__(
        self, models: dict[str, dict[str, Files]], refuse: Callable[[str], Refusal | None] = lambda path: None
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.refuse = models, refuse
        self.asked: list[str] = []
        self.cut: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *args):
        self.shutdown()
        super().__exit__(*args)

    def files_asked(self) -> list[str]:
        """The files whose content was asked for, sorted, each with the range if only a part was wanted."""
        return sorted(line.split("/resolve/")[1][41:] for line in self.asked if re.match("GET.*/resolve/", line))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if refusal := hub.refuse(path):
            headers = {"X-Error-Code": refusal.code, "X-HF-Warning": f"{path}; a word from the hub"}
            return self.send(refusal.status, headers, json.dumps({"error": refusal.said}).encode())
        found = re.fullmatch(r"/api/models/(\w+/\w+)(?:/(?:revision|tree)/(.+))?|/(\w+/\w+)/resolve/(\w+)/(.+)", path)
        if not found or (model := found[1] or found[3]) not in hub.models:
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        wanted = found[2] or found[4] or "main"
        held = [(commit(name), files) for name, files in hub.models[model].items() if wanted in (name, commit(name))]
        if not held:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        sha, files = held[0]
        if found[5]:
            return self.send_file(sha, found[5], files[found[5]])
        if "/tree/" in path:
            body = [{"type": "file", "path": n, "size": len(c), "oid": digest(c)} for n, c in files.items()]
        else:
            body = {"id": model, "sha": sha, "siblings": [{"rfilename": n} for n in files]}
        self.send(200, {}, json.dumps(body).encode())

    do_GET = do_HEAD

    def send_file(self, sha: str, name: str, content: bytes) -> None:
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": sha}
        if self.command == "GET" and name in self.server.cut:
            self.server.cut.remove(name)
            self.close_connection = True
            self.send(200, headers, content, sent=len(content) // 2)
        elif part := self.headers.get("Range"):
            start = int(part.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(206, headers, content[start:])
        else:
            self.send(200, headers, content)

    def send(self, status: int, headers: dict[str, str], body: bytes = b"", sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])


class Done(NamedTuple):
    folder: Path
    error: str
    seconds: float
    open_bars: int


def fetch(url: str, cache: Path, name: str = "org/name", *, before: str = "", bars: bool = False, **env: str) -> Done:
    """local_folder(name) in a process of its own: huggingface_hub reads its environment once.

    before: code to run first. Checks what holds of every call: a fault is a UserError of one line, nothing is printed
    but the bars, if they are on, and the token nowhere.
    """
    code = f"""
import json, sys, time
from tqdm import tqdm
from longlora_jax.weights.hub import local_folder
assert "huggingface_hub" not in sys.modules, "loaded where it may not be needed"
{before}
folder = error = ""
start = time.monotonic()
try:
    folder = local_folder({name!r})
except ValueError as fault:
    assert type(fault).__name__ == "UserError", repr(fault)
    error = str(fault)
print(json.dumps([folder, error, time.monotonic() - start, len(tqdm._instances)]))
"""
    own = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": str(int(not bars))}
    if bars:
        own["TQDM_POSITION"] = "-1"  # draws what is drawn on terminals only
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | own | env, cwd=cache, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Fetching" in done.stderr if bars else not done.stderr
    assert TOKEN not in done.stdout + done.stderr
    folder, error, seconds, open_bars = json.loads(done.stdout)
    assert "\n" not in error
    return Done(Path(folder), error, seconds, open_bars)


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = {
    "safetensors": (SMALL | SHARDS, PICKLES | JUNK),
    "bin": (SMALL | PICKLES, JUNK),
    "old adapter": (ADAPTER | files("adapter_model.bin"), JUNK),
    "adapter": (ADAPTER | files("adapter_model.safetensors"), files("adapter_model.bin") | JUNK),
}


@pytest.mark.parametrize(
    "wanted, others",
    [pytest.param(*CASES[name], id=name, marks=() if name == "safetensors" else pytest.mark.slow) for name in CASES],
)
def test_what_is_fetched(tmp_path, wanted, others):
    """Catches: weights fetched in two formats, .bin weights or a tokenizer left behind, a cache that needs the hub."""
    with Hub({"org/name": {"main": others | wanted}}) as hub:
        first = fetch(hub.url, tmp_path)
        assert contents(first.folder) == wanted, first.error
        assert hub.files_asked() == sorted(wanted)
        hub.asked.clear()
        assert fetch(hub.url, tmp_path).folder == first.folder
        assert hub.asked and not hub.files_asked()
    if "config.json" in wanted:
        assert load_config(str(first.folder)) == CONFIG
    away = fetch(hub.url, tmp_path)
    assert away.folder == first.folder and away.seconds < SECONDS
    assert fetch(hub.url, tmp_path, HF_HUB_OFFLINE="1").folder == first.folder


def test_revision(tmp_path):
    """Catches: a revision that is dropped, a branch whose slash makes a path of it, "no such revision" told as "no such
    model", the newest commit for the one that was asked for, a cached copy held back because a login ran out."""
    new = SMALL | files("model.safetensors")
    with Hub({"org/name": {"main": SMALL | SHARDS, "v2": new, "refs/pr/1": new | files("a.json")}}) as hub:
        assert contents(fetch(hub.url, tmp_path, "org/name@v2").folder) == new
        assert contents(fetch(hub.url, tmp_path, f"org/name@{commit('main')}").folder) == SMALL | SHARDS
        assert contents(fetch(hub.url, tmp_path, "org/name@refs/pr/1").folder) == new | files("a.json")
        missing = fetch(hub.url, tmp_path, "org/name@v3").error
        hub.refuse = lambda path: Refusal(401, "GatedRepo")
        assert contents(fetch(hub.url, tmp_path, "org/name@v2").folder) == new
    assert missing == "org/name has no revision v3 on the hub: give a branch, a tag or a commit after the @"
    assert "`hf download org/name --revision v3 --local-dir DIR`" in fetch(hub.url, tmp_path, "org/name@v3").error


@pytest.mark.slow
def test_interrupted(tmp_path):
    """Catches: a download that starts over, a cut file taken for whole, a part of a model taken from the cache."""
    lost = "model-00001-of-00002.safetensors"
    # huggingface_hub writes, and can go on, in steps of 10 MiB.
    model = SMALL | SHARDS | {lost: bytes(range(256)) * 2**17}
    others = sorted(model.keys() - {lost})

    def lose(path: str) -> Refusal | None:
        while path.endswith(lost) and hub.files_asked() != others:
            time.sleep(0.01)
        return Refusal(404, "EntryNotFound") if path.endswith(lost) else None

    with Hub({"org/name": {"main": model}}, lose) as hub:
        assert "org/name is no folder and the hub failed (404 Not Found): fetch" in fetch(hub.url, tmp_path).error
        hub.refuse = lambda path: Refusal(503)
        assert "the hub failed (503 Service Unavailable): fetch" in fetch(hub.url, tmp_path).error
        hub.refuse = lambda path: None
        hub.cut = {lost}
        hub.asked.clear()
        folder = fetch(hub.url, tmp_path).folder
        assert contents(folder) == model
        assert hub.files_asked() == [lost, f"{lost} bytes={10 * 2**20}-"]
    # What is left by a program that wanted the tokenizer only, and kept no list of the files.
    shutil.rmtree(folder.parents[1] / "trees")
    for name in SHARDS:
        (folder / name).unlink()
    assert "the hub was not reached" in fetch(hub.url, tmp_path).error


LOGIN = "`hf auth login`, and accept the licence on the model's page"
ELSEWHERE = "fetch it elsewhere with `hf download org/name --local-dir DIR` and give DIR"
REFUSALS = {
    Refusal(
        401, "RepoNotFound"
    ): "org/name is no folder and not on the hub: correct the name, or `hf auth login` if it is private",
    Refusal(
        403, "GatedRepo", "Not on\nthe list."
    ): f"the hub refuses org/name (403 Forbidden: Not on the list.): {LOGIN}",
    Refusal(401, "GatedRepo", where="/resolve/"): f"the hub refuses org/name (401 Unauthorized): {LOGIN}",
    Refusal(403, where="/resolve/"): f"the hub refuses org/name (403 Forbidden): {LOGIN}",
    Refusal(
        503, said="Down."
    ): f"org/name is no folder and the hub failed (503 Service Unavailable: Down.): {ELSEWHERE}",
    Refusal(503, where="/resolve/"): f"org/name is no folder and the hub failed (503 Service Unavailable): {ELSEWHERE}",
}


def every_second_slow(cases: dict) -> list:
    marks = [(), pytest.mark.slow]
    return [pytest.param(*case, id=str(case[0]), marks=marks[i % 2]) for i, case in enumerate(cases.items())]


@pytest.mark.parametrize("refusal, message", every_second_slow(REFUSALS))
def test_refusals(tmp_path, refusal, message):
    """Catches: a traceback, a message of many lines, the remedy for another fault, warnings of huggingface_hub."""
    with Hub({"org/name": {"main": SMALL | SHARDS}}, lambda path: refusal if refusal.where in path else None) as hub:
        # A fault in the middle of a download is tried again for half a minute; here the waits are left out.
        done = fetch(hub.url, tmp_path, before="time.sleep = lambda seconds: None")
    assert done.error == message and done.seconds < SECONDS


@pytest.mark.parametrize(
    "refusal", [pytest.param(None, marks=pytest.mark.slow), Refusal(401, "GatedRepo", where="/resolve/")]
)
def test_bars(tmp_path, refusal):
    """Catches: a bar of huggingface_hub that stays open and is drawn over the error message, or over our next bar."""
    with Hub({"org/name": {"main": SMALL}}, lambda path: refusal if refusal and refusal.where in path else None) as hub:
        assert fetch(hub.url, tmp_path, bars=True).open_bars == 0


def test_unreachable(tmp_path):
    """Catches: minutes of silence where there is no network, or where a firewall lets nothing through."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        dead = fetch(url, tmp_path)
        port.listen()
        mute = fetch(url, tmp_path, before="import longlora_jax.weights.hub as hub\nhub._PATIENCE_SECONDS = 0.5")
    offline = fetch(url, tmp_path, HF_HUB_OFFLINE="1")
    for done, reason in (
        (dead, "ConnectError: .*refused.*"),
        (mute, "ReadTimeout: timed out"),
        (offline, "HF_HUB_OFFLINE is set"),
    ):
        expected = rf"org/name is no folder and the hub was not reached \({reason}\): {ELSEWHERE}"
        assert re.fullmatch(expected, done.error) and done.seconds < SECONDS, done


def test_no_room(tmp_path):
    """Catches: a full disk told as a network that is away."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    with Hub({"org/name": {"main": SMALL | {"model.safetensors": bytes(20_000)}}}) as hub:
        error = fetch(hub.url, tmp_path, before=limit).error
    reason = "OSError: [Errno 27] File too large"
    assert error == f"org/name cannot be stored in {tmp_path}/hub ({reason}): make room or set HF_HUB_CACHE"


def test_folder_first(tmp_path):
    """Catches: the hub asked for a model that lies here, a file taken for a folder."""
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/file").touch()
    with Hub({"org/name": {"main": SMALL}, "org/file": {"main": SMALL}}) as hub:
        assert str(fetch(hub.url, tmp_path).folder) == "org/name"
        assert fetch(hub.url, tmp_path, "org/file").error.startswith("org/file is not a folder: give")
        assert not hub.asked
    assert local_folder(f"{tmp_path}/") == f"{tmp_path}/"


PATHS = ["gpt2", "./a/b", "../a", "../a/b", "/a", "~/a", "a\\b", "a/b\\c", "a/b/", "a/", "a/b/c", "a b/c", "a/b@", ""]


# The last are names that only huggingface_hub's own rules refuse.
@pytest.mark.parametrize("name", [*PATHS, "runs/my--run", "runs/a..b", f"runs/{'a' * 97}", "runs/model.git"])
def test_what_is_a_path(name):
    """Catches: a mistyped path that is looked up on the hub, or refused with the hub's rules for names."""
    with pytest.raises(UserError) as caught:
        local_folder(name, what="a checkpoint")
    assert str(caught.value) == f"{name} is not a folder: give a checkpoint, or a name of the hub such as org/name"
