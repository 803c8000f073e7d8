"""Classifiers that are saved, loaded and used."""

import io
import json
import os
import shutil
import signal
import stat
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import CPU, damaged_at, save_random_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import additional_experiments as ae
from runner.machine.devices import peak_memory, reset_peak_memory
from runner.saved import classifiers

LAYERS = ["last_layer", "last_block", "last_two_blocks", "all", "lora", "lora_alternative", "last_block bf16"]
POSITIONS = {
    **{position: f"--trainable_token_pos {position}" for position in ("last", "first", "flexible")},
    "average": "--average_embeddings",
    "no padding": "--no_padding",
    "no mask": "--disable_causal_mask --context_length 9",
}
PREDICT_BATCHES = ae.predict_batches


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layers", LAYERS)
def test_a_loaded_classifier_gives_the_very_logits(options, data_dir, monkeypatch, tmp_path, layers, position):
    # Every second one on weights of a file, and at a learning rate at which all that is trained changes.
    if (LAYERS.index(layers) + list(POSITIONS).index(position)) % 2:
        options[options.index("random")] = save_random_weights(tmp_path, emb_dim=16)
    layers, *bf16 = layers.split()
    options += ["--trainable_layers", layers, "--learning_rate", "1e-3", "--num_epochs", "1", "--batch_size", "8"]
    options += [*POSITIONS[position].split(), *(["--precision", "bf16"] if bf16 else [])]
    given = []  # what the run's own predictions are; the last are those of the test messages

    def noting(*arguments):
        given.append(PREDICT_BATCHES(*arguments))
        return given[-1]

    monkeypatch.setattr(ae, "predict_batches", noting)
    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 0
    classifier, experiment, saved = ae.load_classifier("trained.safetensors", {})
    texts = list(pd.read_csv(data_dir / "test.csv", keep_default_na=False)["Text"])
    assert ae.predict_texts(ae.ready_to_use(classifier, experiment), experiment, texts).equal(given[-1].logits)
    assert saved.class_names == ["0", "1"] and saved.record["history"]["lines"]
    assert stat.S_IMODE(Path("trained.safetensors").stat().st_mode) == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.fixture(scope="module")
def trained(tmp_path_factory, nano_weights):
    """A classifier of the sample's messages: (its path, the path of the weights under it)."""
    path = str(tmp_path_factory.mktemp("trained") / "spam.safetensors")
    options = ["--demo", "--weights", nano_weights, "--trainable_layers", "last_two_blocks", "--no_padding"]
    options += ["--num_epochs", "1", "--learning_rate", "1e-3", "--device", "cpu", "--quiet", "--results", ""]
    assert ae.main([*options, "--save_model", path]) == 0
    return path, nano_weights


def test_classify_arguments(trained, capsys):
    path, _ = trained
    spam, ham = "URGENT! You have won a 1000 prize. Call 09061701461 now to claim", "ok, see you at home later"
    assert ae.main(["--load_model", path, "--classify", spam, ham]) == 0
    first, second = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert first[0] == "spam" and second[0] == "ham" and first[2] == spam and second[2] == ham
    assert 0.5 < float(first[1]) <= 1 and 0.5 < float(second[1]) <= 1
    assert ae.main(["--load_model", path, "--classify", "-5 degrees", "--hello", "-x", "--device", "cpu"]) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["-5 degrees", "--hello", "-x"]
    assert ae.main(["--load_model", path, "--device", "cpu", "--classify", "a", "--", "--device", "b"]) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["a", "--device", "b"]


def classify(path, monkeypatch, content, status=0):
    """What `--classify -` prints for standard input with this content (bytes): a list of fields for each line."""
    Path("stdin").write_bytes(content)
    out = io.StringIO()
    with open("stdin") as file, redirect_stdout(out), monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", path, "--classify", "-"]) == status
    return [line.split("\t") for line in out.getvalue().split("\n")[:-1]]


def test_standard_input_line_by_line(trained, monkeypatch, capsys):
    path, _ = trained
    [plain] = classify(path, monkeypatch, b"ok, see you\n")
    assert classify(path, monkeypatch, b"\xef\xbb\xbfok, see you\n") == [plain]  # a byte-order mark
    assert classify(path, monkeypatch, b"ok, see you") == [plain]
    first, empty, third = classify(path, monkeypatch, b"ok, see you\r\n\nok, see you\n")
    assert first == third == plain and empty == ["", "", ""]
    assert classify(path, monkeypatch, b"\n \n") == [["", "", ""], ["", "", " "]]
    [[label, probability, text]] = classify(path, monkeypatch, "a\tb\\c\rd\x1b[31m\u2028é\n".encode())
    assert text == r"a\tb\\c\rd\x1b[31m\u2028é" and label in ("ham", "spam") and 0.5 <= float(probability) <= 1

    lines = classify(path, monkeypatch, b"one\ntwo\n\xff\nfour\n", status=2)  # those before are answered
    assert [line[2] for line in lines] == ["one", "two"]
    assert capsys.readouterr().err == "error: message 3: not UTF-8 text (invalid start byte)\n"
    assert classify(path, monkeypatch, b"", status=2) == []
    assert capsys.readouterr().err == "error: there is no message on standard input\n"


def test_more_lines_than_one_read_takes(trained, monkeypatch):
    """Their pieces end within lines, within characters and within line ends."""
    path, _ = trained
    texts = [f"é {number} " * (number % 5) for number in range(60)]
    content = "\r\n".join(texts).encode()
    whole = classify(path, monkeypatch, content)
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, n: read(descriptor, 37))
    assert classify(path, monkeypatch, content) == whole
    assert [fields[2] for fields in whole] == texts


class Answers(io.StringIO):
    """Standard output that tells when a line has been written."""

    def __init__(self):
        super().__init__()
        self.has_line = threading.Event()

    def write(self, text):
        super().write(text)
        if text.endswith("\n"):
            self.has_line.set()


def test_what_has_arrived_is_answered_at_once(trained, monkeypatch):
    """The next message is written only when the one before has its answer; half a line waits for its end."""
    reader, writer = os.pipe()
    out, were_answered = Answers(), []

    def produce():
        with open(writer, "w", buffering=1) as messages:
            for number in range(3):
                messages.write("half a ")
                messages.flush()
                time.sleep(0.05)
                out.has_line.clear()
                messages.write(f"message {number}\n")
                were_answered.append(out.has_line.wait(5))

    producer = threading.Thread(target=produce)
    producer.start()
    with open(reader) as file, redirect_stdout(out), monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", trained[0], "--classify", "-"]) == 0
    producer.join()
    texts = [line.split("\t")[2] for line in out.getvalue().splitlines()]
    assert were_answered == [True] * 3 and texts == [f"half a message {number}" for number in range(3)]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals")
def test_ctrl_c_while_it_waits(trained, monkeypatch, capsys):
    reader, _writer = os.pipe()
    monkeypatch.setattr(os, "read", lambda *arguments, read=os.read: (timer.start(), read(*arguments))[1])
    timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
    with open(reader) as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", trained[0], "--classify", "-"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(options, monkeypatch):
    """200,000 lines need no more than 20,000."""
    assert ae.main([*options, "--trainable_token_pos", "flexible", "--save_model", "trained.safetensors"]) == 0
    peaks = []
    for n in (20_000, 200_000):
        with open("lines", "w") as file:  # line by line: what the test itself holds would be measured too
            file.writelines(f"{number:0100}\n" for number in range(n))
        known_above = reset_peak_memory(CPU)
        with open("lines") as file, open("answers", "w") as out, redirect_stdout(out), monkeypatch.context() as patch:
            patch.setattr("sys.stdin", file)
            assert ae.main(["--load_model", "trained.safetensors", "--classify", "-"]) == 0
        peaks.append(peak_memory(CPU, known_above))
        with open("answers") as out:
            assert sum(1 for _ in out) == n
    assert peaks[1] < peaks[0] + 10e6


@pytest.mark.parametrize(
    "options, message",
    [
        ([" "], "message 1: the text is empty"),
        (["a", "--classify", "b"], "--classify is given twice"),
        ([], "--classify needs a message, or - for standard input"),
        (
            ["a", "--model_size", "gpt2-small"],
            "--model_size gpt2-small (124M): the classifier was trained on gpt2-nano",
        ),
        (["a", "--weights", "random"], "--weights random: the classifier was trained on other weights"),
        (["a", "--weights", "nowhere"], "--weights nowhere: neither pretrained nor random, and no such file"),
        (["a", "--seed", "3"], "--seed cannot be combined with --load_model, which trains nothing"),
        (["a", "--precision", "bf16"], "--precision cannot be combined with --load_model, which trains nothing"),
    ],
)
def test_classify_refuses(trained, capsys, options, message):
    assert ae.main(["--load_model", trained[0], "--classify", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def change(path, settings=(), **tensors):
    """Write a copy of a saved classifier with other settings or tensors to `changed`; None removes a tensor."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["description"])
    description["settings"] |= dict(settings)
    found = {name: tensor for name, tensor in (load_file(path) | tensors).items() if tensor is not None}
    save_file(found, "changed", dict(kind=classifiers.KIND, description=json.dumps(description)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out_head.bias": None}, "saved parameter out_head.bias is missing, left over or of another shape"),
        ({"out_head.bias": torch.zeros(3)}, "saved parameter out_head.bias is missing, left over or of another shape"),
        ({"more": torch.zeros(2)}, "saved parameter more is missing, left over or of another shape"),
        ({"out_head.bias": torch.tensor([0, torch.nan])}, "changed: parameter out_head.bias has values"),
    ],
)
def test_parameters_that_do_not_fit(trained, capsys, changes, message):
    change(trained[0], **changes)
    assert ae.main(["--load_model", "changed", "--classify", "a"]) > 0
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_files_that_are_none_of_ours(trained, capsys):
    path, weights = trained
    Path("cut").write_bytes(Path(path).read_bytes()[:-1])
    for file, message in (
        (weights, "was not written by --save_model of this version"),
        ("cut", "cannot be read as a saved classifier"),
        ("missing", "cannot be read as a saved classifier"),
    ):
        assert ae.main(["--load_model", file, "--classify", "a"]) == 2
        assert f"error: {file} {message}" in capsys.readouterr().err


def test_trained_on_a_device_that_is_not_here(trained, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change(trained[0], settings=dict(device="cuda", precision="tf32"))
    for file in (trained[0], "changed"):
        assert ae.main(["--load_model", file, "--classify", "You have won"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_weights_that_have_moved_or_changed(trained, tmp_path, capsys):
    path, weights = trained
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    other = save_random_weights(tmp_path / "other")
    damaged_at(-1)(Path(other))
    assert ae.main(["--load_model", path, "--classify", "a", "--weights", str(moved)]) == 0
    assert ae.main(["--load_model", path, "--classify", "a", "--weights", other]) == 2
    assert f"--weights {other}: the classifier was trained on other weights" in capsys.readouterr().err


def test_random_weights_that_are_drawn_otherwise(options, monkeypatch, capsys):
    """As another version of PyTorch may draw them."""
    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 0
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor.data.zero_())
    assert ae.main(["--load_model", "trained.safetensors", "--classify", "a"]) == 2
    assert "--weights random: the classifier was trained on other weights" in capsys.readouterr().err


def test_weights_are_not_overwritten(nano, nano_weights, capsys):
    nano[nano.index("random")] = nano_weights
    before = Path(nano_weights).read_bytes()
    assert ae.main([*nano, "--save_model", nano_weights]) == 2
    assert f"--save_model {nano_weights} would overwrite the weights" in capsys.readouterr().err
    assert Path(nano_weights).read_bytes() == before
