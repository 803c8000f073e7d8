"""Classifiers that are saved, loaded and used."""

import io
import os
import shutil
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import CPU, damaged_at, save_random_weights

import additional_experiments as ae
from runner.data.tensor_files import read_tensors, write_tensors
from runner.machine.devices import peak_memory, reset_peak_memory
from runner.saved import classifiers


@pytest.mark.parametrize(
    "layers", ["last_layer", "last_block", "last_two_blocks", "all", "lora", "lora_alternative", "last_block bf16"]
)
@pytest.mark.parametrize("position", ["last", "first", "flexible", "average", "no padding", "no mask"])
@pytest.mark.parametrize("weights", ["random", pytest.param("file", marks=pytest.mark.slow)])
def test_a_loaded_classifier_gives_the_very_logits(
    nano, nano_weights, data_dir, monkeypatch, layers, position, weights
):
    if weights == "file":
        nano[nano.index("random")] = nano_weights
    further = {
        "average": ["--average_embeddings"],
        "no padding": ["--no_padding"],
        "no mask": ["--disable_causal_mask", "--context_length", "9"],
    }.get(position, ["--trainable_token_pos", position])
    layers, *bf16 = layers.split()
    further += ["--trainable_layers", layers, *(["--precision", "bf16"] if bf16 else [])]
    given = []  # what the run's own predictions are; the last are those of the test messages

    def noting(*arguments):
        given.append(PREDICT_BATCHES(*arguments))
        return given[-1]

    monkeypatch.setattr(ae, "predict_batches", noting)
    # Not saved by a classifier that is as it was drawn: a learning rate at which all of it changes.
    nano += [*further, "--learning_rate", "1e-3"]
    assert ae.main([*nano, "--save_model", "trained.safetensors"]) == 0

    classifier, experiment, labels = ae.load_classifier("trained.safetensors", {})
    texts = list(pd.read_csv(data_dir / "test.csv", keep_default_na=False)["Text"])
    assert ae.predict_texts(classifier, experiment, texts).equal(given[-1].logits)
    assert labels == ["0", "1"]


PREDICT_BATCHES = ae.predict_batches


@pytest.fixture(scope="module")
def trained(tmp_path_factory, nano_weights):
    """A classifier of the sample's messages: (its path, the path of the weights under it)."""
    path = tmp_path_factory.mktemp("trained") / "spam.safetensors"
    options = [
        "--demo",
        "--weights",
        nano_weights,
        "--trainable_layers",
        "last_two_blocks",
        "--num_epochs",
        "2",
        "--quiet",
    ]
    options += ["--average_embeddings", "--no_padding", "--learning_rate", "1e-3"]
    assert ae.main([*options, "--device", "cpu", "--save_model", str(path), "--results_file", ""]) == 0
    return str(path), nano_weights


def test_classify(trained, capsys, monkeypatch, tmp_path):
    path, _ = trained
    spam, ham = "URGENT! You have won a 1000 prize. Call 09061701461 now to claim", "ok, see you at home later"
    assert ae.main(["--load_model", path, "--classify", spam, ham]) == 0
    first, second = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert first[0] == "spam" and second[0] == "ham" and first[2] == spam and second[2] == ham
    assert 0.5 < float(first[1]) <= 1 and 0.5 < float(second[1]) <= 1

    (tmp_path / "lines").write_text(f"{spam}\n{ham}\n")
    with open(tmp_path / "lines") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", path, "--classify", "-"]) == 0
    assert capsys.readouterr().out == "\t".join(first) + "\n" + "\t".join(second) + "\n"


def classify(path, monkeypatch, content):
    """What `--classify -` prints for standard input with this content (bytes): a list of fields for each line."""
    Path("stdin").write_bytes(content)
    out = io.StringIO()
    with open("stdin") as file, redirect_stdout(out), monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", path, "--classify", "-"]) == 0
    assert out.getvalue().endswith("\n")
    return [line.split("\t") for line in out.getvalue().removesuffix("\n").split("\n")]


def test_standard_input_line_by_line(trained, monkeypatch):
    path, _ = trained
    [plain] = classify(path, monkeypatch, b"ok, see you\n")
    assert classify(path, monkeypatch, b"\xef\xbb\xbfok, see you\n") == [plain]  # a byte-order mark
    assert classify(path, monkeypatch, b"ok, see you") == [plain]
    first, empty, third = classify(path, monkeypatch, b"ok, see you\r\n\nok, see you\n")
    assert first == third == plain and empty == ["", "", ""]
    assert classify(path, monkeypatch, b"\n \n") == [["", "", ""], ["", "", " "]]
    [[label, probability, text]] = classify(path, monkeypatch, "a\tb\\c\rd\x1b[31m\u2028é\n".encode())
    assert text == r"a\tb\\c\rd\x1b[31m\u2028é" and label in ("ham", "spam") and 0.5 <= float(probability) <= 1


class Clock(io.StringIO):
    """Notes when each line was printed."""

    def __init__(self):
        super().__init__()
        self.times = []

    def write(self, text):
        self.times += [time.monotonic()] * text.count("\n")
        return super().write(text)


def test_a_slow_producer_is_answered_in_time(trained, monkeypatch):
    """Half a second after the first of some lines, or as soon as there are enough of them."""
    written, out = [], Clock()
    reader, writer = os.pipe()

    def produce():
        with open(writer, "w") as file:
            for number in (1, 1, 1000):
                file.write(f"message {number}\n" * number)
                file.flush()
                written.append(time.monotonic())
                time.sleep(1)

    monkeypatch.setattr(
        ae, "load_classifier", lambda *arguments, load=ae.load_classifier: (load(*arguments), start())[0]
    )
    start = threading.Thread(target=produce).start
    with open(reader) as file, redirect_stdout(out), monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", trained[0], "--classify", "-"]) == 0
    delays = [out.times[line] - begun for line, begun in zip((0, 1, 2), written, strict=True)]
    assert len(out.times) == 1002 and 0.5 <= delays[0] < 1 and 0.5 <= delays[1] < 1 and delays[2] < 1
    assert out.times[-1] - written[2] < 1  # without waiting for more


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


def test_standard_input_that_cannot_be_read(trained, monkeypatch, capsys):
    """Open for writing only."""
    with open("stdin", "wb") as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", trained[0], "--classify", "-"]) == 1
    assert capsys.readouterr().err == "error: [Errno 9] Bad file descriptor\n"


def test_standard_input_that_does_not_block(trained, monkeypatch, capsys):
    """As some parents leave it: that nothing is there yet is not the end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def produce():
        with open(writer, "w") as file:
            for number in range(2):
                time.sleep(0.7)
                print(f"message {number}", file=file, flush=True)

    threading.Thread(target=produce).start()
    with open(reader) as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", trained[0], "--classify", "-"]) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["message 0", "message 1"]


def test_lines_before_one_that_cannot_be_used(trained, monkeypatch, capsys):
    for content, message in (
        (b"one\ntwo\n\xff\nfour\n", "message 3: not UTF-8 text (invalid start byte)"),
        (b"", None),
    ):
        Path("stdin").write_bytes(content)
        with open("stdin") as file, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", file)
            assert ae.main(["--load_model", trained[0], "--classify", "-"]) == 2
        captured = capsys.readouterr()
        assert captured.err == f"error: {message or 'there is no message on standard input'}\n"
        assert [line.split("\t")[2] for line in captured.out.splitlines()] == (["one", "two"] if content else [])


def test_messages_that_look_like_options(trained, capsys):
    path, _ = trained
    options = ["--load_model", path, "--classify", "-5 degrees", "--hello", "-x", "--device", "cpu"]
    assert ae.main(options) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["-5 degrees", "--hello", "-x"]
    assert ae.main(["--load_model", path, "--device", "cpu", "--classify", "a", "--", "--device", "b"]) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["a", "--device", "b"]
    assert ae.main(["--load_model", path, "--classify", "two\nlines"]) == 0
    assert capsys.readouterr().out.endswith("\ttwo\\nlines\n")


def test_more_messages_than_one_pass_takes(trained, monkeypatch):
    path, _ = trained
    lines = [f"message {number}" if number % 7 else "" for number in range(23)]
    whole = classify(path, monkeypatch, "\n".join(lines).encode())
    monkeypatch.setattr(ae, "TEXTS_PER_PASS", 5)
    assert classify(path, monkeypatch, "\n".join(lines).encode()) == whole
    assert [fields[2] for fields in whole] == lines and [fields[0] == "" for fields in whole] == [not x for x in lines]


def test_a_saved_classifier_whose_values_are_not_finite(trained, tmp_path, capsys):
    description, tensors = read_tensors(trained[0], classifiers.KIND, classifiers.VERSION)
    tensors["out_head.bias"] = torch.tensor([0.0, float("nan")])
    path = str(tmp_path / "sick")
    write_tensors(path, classifiers.KIND, classifiers.VERSION, description, tensors)
    assert ae.main(["--load_model", path, "--classify", "a"]) == 2
    message = f"error: {path} cannot be used: parameter out_head.bias has values that are infinite or not a number\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "options, message",
    [
        (["a" + " " * 200_000 + "b"], "message 1: the text has more than 100,000 whitespace characters in a row"),
        (["a", "\udcff\udcfe"], "message 2: not UTF-8 text"),
        (["a", "--classify", "b"], "--classify is given twice"),
        ([], "--classify needs a message, or - for standard input"),
        (["a", "--model_size", "gpt2-small"], "--model_size gpt2-small (124M): {path} was trained on gpt2-nano (7M)"),
        (["a", "--weights", "random"], "--weights random: {path} was trained on other weights (by their SHA-256)"),
        (["a", "--seed", "3"], "--seed cannot be combined with --load_model, which trains nothing"),
        (["a", "--precision", "bf16"], "--precision cannot be combined with --load_model, which trains nothing"),
        ([" "], "message 1 is empty"),
        (["a", ""], "message 2 is empty"),
    ],
)
def test_classify_refuses(trained, capsys, options, message):
    path, _ = trained
    assert ae.main(["--load_model", path, "--classify", *options]) == 2
    assert capsys.readouterr().err == f"error: {message.format(path=path)}\n"


def test_a_classifier_of_the_first_version_is_read(trained, tmp_path, capsys):
    """Its format, written out: whatever this version writes must not change it."""
    description, tensors = read_tensors(trained[0], classifiers.KIND, classifiers.VERSION)
    keys = ("settings", "width", "labels", "base_sha256", "torch")
    assert tuple(description) == (*keys, "record") and description["labels"] == ["ham", "spam"]
    path = tmp_path / "first"
    write_tensors(path, "saved classifier", 1, {key: description[key] for key in keys}, tensors)
    for file in (trained[0], str(path)):
        assert ae.main(["--load_model", file, "--classify", "You have won"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_random_weights_are_hashed_only_to_save_a_classifier(nano, monkeypatch):
    hashed, frozen_sha256 = [], classifiers.frozen_sha256
    monkeypatch.setattr(classifiers, "frozen_sha256", lambda classifier: hashed.append(1) or frozen_sha256(classifier))
    assert ae.main([*nano, "--checkpoint", "run.ckpt", "--repeats", "2"]) == 0 and hashed == []
    assert ae.main([*nano, "--save_model", "trained.safetensors"]) == 0 and hashed == [1]


def test_weights_that_have_moved_or_changed(trained, tmp_path, capsys):
    path, weights = trained
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    other = save_random_weights(tmp_path / "other")
    damaged_at(-1)(Path(other))
    assert ae.main(["--load_model", path, "--classify", "a", "--weights", str(moved)]) == 0
    assert ae.main(["--load_model", path, "--classify", "a", "--weights", other]) == 2
    assert f"--weights {other}: {path} was trained on other weights" in capsys.readouterr().err


def test_weights_are_not_overwritten(nano, nano_weights, capsys):
    nano[nano.index("random")] = nano_weights
    before = Path(nano_weights).read_bytes()
    assert ae.main([*nano, "--save_model", nano_weights]) == 2
    assert f"--save_model {nano_weights} would overwrite the weights" in capsys.readouterr().err
    assert Path(nano_weights).read_bytes() == before


def test_a_classifier_trained_on_a_device_that_is_not_here(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    description, tensors = read_tensors(trained[0], classifiers.KIND, classifiers.VERSION)
    description["settings"] |= dict(device="cuda", precision="tf32")
    write_tensors(tmp_path / "elsewhere", classifiers.KIND, classifiers.VERSION, description, tensors)
    assert ae.main(["--load_model", str(tmp_path / "elsewhere"), "--classify", "a"]) == 0

    del tensors["out_head.weight"]
    write_tensors(tmp_path / "part", classifiers.KIND, classifiers.VERSION, description, tensors)
    assert ae.main(["--load_model", str(tmp_path / "part"), "--classify", "a"]) == 2
    assert "does not hold the trained parameters that its settings name" in capsys.readouterr().err
