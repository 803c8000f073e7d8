"""Downloads that fail in every way that networks know, and files that are not what they should be.

The clients are the real ones; what they talk to is a server on this machine that misbehaves as it is told.
"""

import hashlib
import importlib
import io
import os
import re
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import tiktoken
import torch
from huggingface_hub import constants
from safetensors.torch import save
from tiktoken_ext import openai_public
from transformers import GPT2Config, GPT2Model

import additional_experiments
import gpt_download
from gpt_download import HubFile, fetch_collection, fetch_weights, load_vocabulary
from runner.data import datasets
from runner.files import UserError, read_safetensors

# --- a server that does as it is told ---

REVISION = "0123456789abcdef" * 2 + "01234567"
TIMEOUT = gpt_download.READ_TIMEOUT


class Server(ThreadingHTTPServer):
    """Serves `files` (bytes by path) as the hub does; `plan` says how the first requests fail, one after the other."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.plan, self.requests, self.authorizations = {}, [], [], []
        self.over = threading.Event()

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the plan."""


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        first_byte, name = self.headers.get("Range"), self.path.rsplit("/", 1)[-1]
        self.server.requests.append(" ".join(filter(None, [self.command, name, first_byte])))
        self.server.authorizations.append(self.headers.get("Authorization"))
        how = self.server.plan.pop(0) if self.server.plan else "whole"
        if self.path not in self.server.files:
            how = "404 EntryNotFound"
        if how[0].isdigit():
            status, *error_code = how.split()
            return self.send_head(status, {"Content-Length": 0} | {"X-Error-Code": code for code in error_code})

        whole = self.server.files[self.path]
        start = int(first_byte.removeprefix("bytes=").removesuffix("-")) if first_byte else 0
        body = whole[start:]
        if how in ("silent", "closed"):
            return self.stall() if how == "silent" else None
        headers = {"Content-Length": len(body), "Accept-Ranges": "bytes", "ETag": f'"{sha256(whole)}"'}
        headers |= {"X-Xet-Hash": sha256(whole), "X-Xet-Refresh-Route": f"{self.server.url}/xet"}  # not to be taken
        if first_byte:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        self.send_head(206 if first_byte else 200, headers)
        if self.command == "HEAD":
            return
        if how == "garbled":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.wfile.write(body if how in ("whole", "garbled") else body[: len(body) // 2])
        if how == "stall":
            self.stall()

    do_HEAD = do_GET

    def send_head(self, status, headers):
        self.send_response(int(status))
        for name, value in {"X-Repo-Commit": REVISION, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def stall(self):
        self.server.over.wait(5)  # not for ever: a client without a time-out shall fail, not hang

    def log_message(self, *_):
        pass


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01)).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Time-outs and waits between attempts are cut short; returns the seconds that were to be waited."""
    seconds, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda wait: (seconds.append(wait), sleep(wait / 100)))
    monkeypatch.setattr(gpt_download, "READ_TIMEOUT", 0.2)
    return seconds


# --- what it serves ---

MESSAGES = b"ham\tSee you at six\nspam\tYou have won\n" * 50


@pytest.fixture
def collection(server, monkeypatch):
    """A collection of 100 messages at two addresses, in a zip that would also like to write elsewhere."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("../evil.txt", "evil")
        archive.writestr("SMSSpamCollection", MESSAGES)
    server.files = {"/first.zip": content.getvalue(), "/backup.zip": content.getvalue()}
    monkeypatch.setattr(gpt_download, "COLLECTION_URLS", (f"{server.url}/first.zip", f"{server.url}/backup.zip"))
    monkeypatch.setattr(gpt_download, "COLLECTION_ZIP_SHA256", sha256(content.getvalue()))
    monkeypatch.setattr(gpt_download, "COLLECTION_SHA256", sha256(MESSAGES))


WEIGHTS = save({"wte.weight": torch.arange(1000.0)})


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """A hub with the pretrained weights of "tiny", and a function that changes its client's settings."""
    server.files[f"/nobody/tiny/resolve/{REVISION}/model.safetensors"] = WEIGHTS
    monkeypatch.setitem(gpt_download.PRETRAINED, "tiny", HubFile("nobody/tiny", REVISION, sha256(WEIGHTS)))
    with pytest.MonkeyPatch.context() as patch:

        def settings(**environment):
            for name, value in environment.items():
                patch.setenv(name, value)
            importlib.reload(constants)  # the client reads its environment once, when imported
            huggingface_hub.close_session()

        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.delenv(name, raising=False)
        settings(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_TELEMETRY="1")
        yield settings
    importlib.reload(constants)
    huggingface_hub.close_session()


def files_below(folder):
    """Names of all files in `folder` and its folders, but for the marks and locks that the hub's client keeps."""
    names = [path.name for path in folder.rglob("*") if not path.is_dir()]
    return sorted(name for name in names if name != "CACHEDIR.TAG" and not name.endswith(".lock"))


# --- the collection ---


def test_collection_is_downloaded_once(collection, server, tmp_path, capsys):
    """And a line says so, before the server can be silent."""
    path = fetch_collection(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "SMSSpamCollection"
    assert path.read_bytes() == MESSAGES
    assert path.stat().st_mode & 0o777 == 0o644
    assert files_below(tmp_path) == ["SMSSpamCollection"]  # nothing else of the zip, here or a folder above
    assert fetch_collection(path.parent) == path
    assert server.requests == ["GET first.zip"]
    line = f"Downloading {server.url}/first.zip (without an answer this ends within a minute)\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    "plan, requests",
    [(["503", "closed"], ["first"] * 3)] + [([fault], ["first", "backup"]) for fault in ("cut", "stall", "garbled")],
)
def test_collection_is_asked_for_again_or_from_the_backup(collection, server, tmp_path, plan, requests):
    server.plan = list(plan)
    assert fetch_collection(tmp_path).read_bytes() == MESSAGES
    assert server.requests == [f"GET {name}.zip" for name in requests]


@pytest.mark.parametrize(
    "fault, attempts, why", [("404", 1, "404 Client Error: Not Found"), ("silent", 3, "timed out")]
)
def test_collection_that_cannot_be_had(collection, server, tmp_path, impatient, fault, attempts, why):
    server.plan = [fault] * 6
    with pytest.raises(UserError) as error:
        fetch_collection(tmp_path)
    assert error.value.status == 1
    _, first, backup, *advice = str(error.value).splitlines()
    for name, reason in (("first", first), ("backup", backup)):
        assert reason.startswith(f"  {server.url}/{name}.zip: ") and why in reason
    assert "--dataset sample or --demo" in " ".join(advice)
    assert server.requests == ["GET first.zip"] * attempts + ["GET backup.zip"] * attempts
    assert len(server.requests) * TIMEOUT + sum(impatient) < 60
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name", ["SMSSpamCollection", "SMSSpamCollection.tsv"])
def test_collection_that_is_there(collection, server, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(MESSAGES)
    assert fetch_collection(tmp_path) == path

    path.write_bytes(MESSAGES[:-1])
    with pytest.raises(UserError, match=f"{path} is not the SMS Spam Collection; remove it"):
        fetch_collection(tmp_path)
    assert path.read_bytes() == MESSAGES[:-1]  # whose it is, we do not know
    assert server.requests == []


# --- pretrained weights ---

ASKED = ["HEAD model.safetensors"] * 2 + ["GET model.safetensors"]  # whether it answers; by the hub's client


def test_weights_are_downloaded_once(hub, server, tmp_path, capsys):
    """The repositories are public, and HF_ENDPOINT may name anybody's mirror: the user's token is sent nowhere."""
    hub(HF_TOKEN="hf_secret", HF_HUB_OFFLINE="1")
    with pytest.raises(UserError, match="offline mode is enabled.* unset the `HF_HUB_OFFLINE`"):
        fetch_weights("tiny")
    assert server.requests == []
    capsys.readouterr()

    hub(HF_HUB_OFFLINE="0")
    path, _ = fetch_weights("tiny")
    assert path == tmp_path / f"hf/hub/models--nobody--tiny/snapshots/{REVISION}/model.safetensors"
    assert path.read_bytes() == WEIGHTS
    assert server.requests == ASKED and server.authorizations == [None] * 3
    _, err = capsys.readouterr()
    assert err.startswith(f"Downloading model.safetensors of nobody/tiny from {server.url} (") and err.count("\n") == 1

    hub(HF_HUB_OFFLINE="1")
    assert fetch_weights("tiny")[0] == path
    assert server.requests == ASKED and capsys.readouterr().err == ""


REST = "GET bytes=2000-"  # what is left when half of 4,080 bytes came, in pieces of 1,000


@pytest.mark.parametrize(
    "plan, expected",
    [
        (["whole", "whole", "cut"], ["HEAD", "HEAD", "GET", REST]),
        (["whole", "whole", "stall"], ["HEAD", "HEAD", "GET", REST]),
        (["503", "503", "503"], ["HEAD", "HEAD", "HEAD", "HEAD", "GET"]),
    ],
)
def test_weights_are_asked_for_again(hub, server, tmp_path, monkeypatch, plan, expected):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.plan = list(plan)
    assert fetch_weights("tiny")[0].read_bytes() == WEIGHTS
    assert [request.replace(" model.safetensors", "") for request in server.requests] == expected
    assert files_below(tmp_path) == sorted([sha256(WEIGHTS), "model.safetensors"])


@pytest.mark.parametrize(
    "plan, why",
    [
        (["404 EntryNotFound"] * 2, "404 Not Found"),
        (["silent"], "timed out"),
        (["whole", "whole", *["stall"] * 6], "timed out"),
    ],
)
def test_weights_that_cannot_be_had(hub, server, tmp_path, impatient, plan, why):
    server.plan = list(plan)
    with pytest.raises(UserError) as error:
        fetch_weights("tiny")
    assert error.value.status == 1
    _, reason, *advice = str(error.value).splitlines()
    assert reason.startswith(f"  from {server.url}: ") and why in reason
    assert all(way in " ".join(advice) for way in ("HF_ENDPOINT", "--weights FILE", "--demo"))
    assert len(server.requests) == len(plan)
    assert sum(fault in ("silent", "stall") for fault in plan) * TIMEOUT + sum(impatient) < 60
    # Not the whole cache: next to the snapshots the client notes which files a server does not have.
    assert files_below(tmp_path / "hf/hub/models--nobody--tiny/snapshots") == []
    assert fetch_weights("tiny")[0].read_bytes() == WEIGHTS


def test_weights_with_another_checksum(hub, server, tmp_path):
    server.plan = ["whole", "whole", "garbled"]
    found = sha256(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    with pytest.raises(UserError, match=f"the file's SHA-256 is {found}, not {sha256(WEIGHTS)}; it was removed"):
        fetch_weights("tiny")
    assert files_below(tmp_path) == []
    path, _ = fetch_weights("tiny")
    assert path.read_bytes() == WEIGHTS and server.requests == ASKED * 2
    path.write_bytes(WEIGHTS[:-1])  # left by a run that was killed before it had verified its download
    with pytest.raises(UserError, match="the file's SHA-256 is .* it was removed from the cache"):
        fetch_weights("tiny")
    assert fetch_weights("tiny")[0].read_bytes() == WEIGHTS


# --- both, from the command line ---


def test_without_a_network_a_run_ends_at_once(collection, hub, data_dir, impatient, monkeypatch, capfd):
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))  # nobody answers there, and nobody else can begin to
    closed_port = f"http://127.0.0.1:{bound.getsockname()[1]}"
    hub(HF_ENDPOINT=closed_port)
    monkeypatch.setattr(gpt_download, "COLLECTION_URLS", (f"{closed_port}/first.zip",))
    os.mkdir("empty")
    for folder, asked_for in (("empty", "the SMS Spam Collection"), (data_dir, "model.safetensors of openai-comm")):
        assert additional_experiments.main(["--device", "cpu", "--quiet", "--data_dir", str(folder)]) == 1
        out, err = capfd.readouterr()
        _, error, reason, *_ = err.splitlines()  # after the announcement; no warnings of the hub's client
        assert out == "" and error.startswith(f"error: {asked_for}")
        assert closed_port in reason and ": ConnectionRefusedError: " in reason
    assert impatient == []  # the hub's client itself would ask again and again for half a minute


def test_first_run_downloads_everything_and_the_second_nothing(collection, hub, server, tmp_path, monkeypatch, capsys):
    """gpt_download.py does it beforehand."""
    name, weights = "gpt2-nano (7M)", save(GPT2Model(GPT2Config(n_embd=128, n_layer=4, n_head=4)).state_dict())
    server.files[f"/nobody/nano/resolve/{REVISION}/model.safetensors"] = weights
    monkeypatch.setitem(gpt_download.PRETRAINED, name, HubFile("nobody/nano", REVISION, sha256(weights)))
    (tmp_path / "collection.tsv").write_bytes(MESSAGES)
    splits = gpt_download.balanced_splits(tmp_path / "collection.tsv")
    sums = {split: sha256(frame.to_csv(index=None).encode()) for split, frame in splits.items()}
    monkeypatch.setattr(gpt_download, "UCI_SPLITS_SHA256", sums)

    monkeypatch.setattr(gpt_download, "READ_TIMEOUT", 60)  # nothing fails here, however slow the machine is
    os.mkdir("data")
    for _ in range(2):
        options = ["--model_size", "gpt2-nano", "--data_dir", "data", "--num_epochs", "1", "--device", "cpu"]
        assert additional_experiments.main(options) == 0
        assert "Test accuracy: " in capsys.readouterr().out
    assert server.requests == ["GET first.zip", *ASKED]
    for _ in range(2):
        assert gpt_download.main(["--model_size", "nano", "--data_dir", "beforehand"]) == 0
        _, path = capsys.readouterr().out.splitlines()
        assert set(os.listdir("beforehand")) == {"SMSSpamCollection", *(f"{split}.csv" for split in splits)}
        assert Path(path).read_bytes() == weights
    assert server.requests == ["GET first.zip", *ASKED, "GET first.zip"]
    Path("beforehand/train.csv").write_text("junk")
    assert gpt_download.main(["--data_dir", "beforehand"]) == 2
    monkeypatch.setattr(gpt_download, "sha256_of", Mock(side_effect=KeyboardInterrupt))
    assert gpt_download.main(["--data_dir", "beforehand"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and "beforehand/train.csv is no split of the SMS Spam Coll" in err


# --- opening ---


NAME = "transformer.h.2.mlp.c_fc.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors[NAME][3, 5].fill_(torch.nan), f"cannot be used as .*: tensor {NAME} has values"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].double().fill_(1e300)}), f"tensor {NAME} has values"),
        (lambda tensors: tensors.pop(NAME), f"tensor {NAME.removeprefix('transformer.')} is missing"),
        (lambda tensors: -1000, "cannot be read as a .safetensors file"),
    ],
)
def test_weights_that_cannot_be_used(data_dir, nano_weights, capsys, change, message):
    """Not finite in float32, incomplete, or cut to so many bytes. The masks of some files are infinite."""
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(nano_weights)[0].items()}
    tensors |= {f"transformer.h.0.attn.{kind}": torch.tensor(-torch.inf) for kind in ("bias", "masked_bias")}
    n_bytes = change(tensors)
    Path("file").write_bytes(save(tensors)[: n_bytes if isinstance(n_bytes, int) else None])
    options = ["--model_size", "nano", "--data_dir", str(data_dir), "--device", "cpu", "--quiet"]
    assert additional_experiments.main([*options, "--weights", "file"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.match(f"error: .*file .*{message}", err)


# --- what the project carries ---


def test_vocabulary_is_that_of_gpt2():
    ours = load_vocabulary()
    assert ours.n_vocab == 50257 and ours.encode_ordinary("Hello world") == [15496, 995]
    assert ours.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert ours.encode("<|endoftext|>", allowed_special="all") == [50256]

    ranks = {ours.decode_single_token_bytes(token): token for token in range(50256)}
    theirs = tiktoken.Encoding("r50k", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    text = gpt_download.SAMPLE.read_text(encoding="utf-8") + "It's we'LL 'tis\n\n \t 12³ naïve 東京   end  "
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize(
    "name, load", [("VOCABULARY", load_vocabulary), ("SAMPLE", lambda: datasets.load_splits("", "sample"))]
)
def test_a_file_of_the_project_that_was_changed_is_refused(tmp_path, monkeypatch, name, load):
    path = tmp_path / name
    path.write_bytes(getattr(gpt_download, name).read_bytes()[:-1])
    monkeypatch.setattr(gpt_download, name, path)
    load_vocabulary.cache_clear()
    with pytest.raises(UserError, match=f"{path} was changed: .*{getattr(gpt_download, name + '_SHA256')}"):
        load()
