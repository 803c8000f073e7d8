"""Classifiers that are saved, loaded and used."""

import io
import os
import shutil
import signal
import threading
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from helpers import save_random_weights

import additional_experiments as ae
from runner.files import UserError
from runner.saved import classifiers

PREDICT_BATCHES = ae.predict_batches


@pytest.mark.parametrize(
    "further, on_file",
    [
        ("last_layer --trainable_token_pos flexible", True),
        ("last_block --precision bf16 --average_embeddings", True),
        ("all --disable_causal_mask --context_length 9", False),
        ("lora --no_padding --seed 7", True),
        ("lora_alternative --average_embeddings --no_padding", False),
    ],
)
def test_a_loaded_classifier_predicts_the_very_same(options, data_dir, monkeypatch, tmp_path, further, on_file):
    if on_file:
        options[options.index("random")] = save_random_weights(tmp_path, emb_dim=16)
    # At this learning rate all that is trained changes.
    options += ["--learning_rate", "1e-3", "--num_epochs", "1", "--batch_size", "8"]
    given = []  # what the run's own predictions are; the last are those of the test messages

    def noting(*arguments):
        given.append(PREDICT_BATCHES(*arguments))
        return given[-1]

    monkeypatch.setattr(ae, "predict_batches", noting)
    command = [*options, "--trainable_layers", *further.split(), "--save_model", "trained.safetensors"]
    assert ae.main(command) == 0
    texts = pd.read_csv(data_dir / "test.csv", keep_default_na=False)["Text"]
    labels, probabilities = ae.load_classifier("trained.safetensors").predict(texts)
    assert probabilities.equal(given[-1].logits.softmax(-1))
    assert labels == [str(label) for label in given[-1].logits.argmax(-1).tolist()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, nano_weights):
    """A classifier of the sample's messages: (its path, the path of the weights under it)."""
    path = str(tmp_path_factory.mktemp("trained") / "spam.safetensors")
    options = ["--demo", "--weights", nano_weights, "--trainable_layers", "last_two_blocks", "--no_padding"]
    options += ["--num_epochs", "1", "--learning_rate", "1e-3", "--device", "cpu", "--quiet", "--results", ""]
    assert ae.main([*options, "--save_model", path]) == 0
    return path, nano_weights


def test_classify_arguments_and_the_same_from_python(trained, capsys):
    """No record is written. From Python a list may be empty; a blank text has no class."""
    path, weights = trained
    Path("results").touch()
    texts = [
        "ok, see you at home",
        "URGENT! You have won a 1000 prize. Call 09061701461 now",
        "-5 degrees",
        "--hello you",
    ]
    assert ae.main(["--load_model", path, "--classify", *texts]) == 0
    printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    classifier = ae.load_classifier(path, device="cpu", weights=weights)
    labels, probabilities = classifier.predict(texts)
    assert labels[:2] == ["ham", "spam"] and classifier.class_names == ["ham", "spam"]
    of_labels = [probabilities[row, classifier.class_names.index(label)] for row, label in enumerate(labels)]
    assert printed == [[label, f"{one:.4f}", text] for label, one, text in zip(labels, of_labels, texts)]
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))
    assert classifier.predict([])[0] == [] and classifier.predict(texts[1])[0] == labels[1:2]  # one text
    with pytest.raises(UserError, match="text 1 is blank"):
        classifier.predict(["ok", " \n"])
    assert capsys.readouterr() == ("", "")


def classify(path, monkeypatch, content, status=0, buffering=-1):
    """What `--classify -` prints for standard input with this content (bytes): a list of fields for each line."""
    Path("stdin").write_bytes(content)
    out = io.StringIO()
    with open("stdin", buffering=buffering) as file, redirect_stdout(out), monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", path, "--classify", "-"]) == status
    return [line.split("\t") for line in out.getvalue().split("\n")[:-1]]


def test_standard_input_line_by_line(trained, monkeypatch, capsys):
    path, _ = trained
    byte_order_mark = b"\xef\xbb\xbf"
    content = byte_order_mark + "ok, see you\r\n\n \na\tb\\c\rd\x1b[31m\u2028é\nok, see you".encode()
    plain, empty, blank, [label, probability, text], last = classify(path, monkeypatch, content)
    assert plain == last and plain[2] == "ok, see you" and empty == ["", "", ""] and blank == ["", "", " "]
    assert text == r"a\tb\\c\rd\x1b[31m\u2028é" and label in ("ham", "spam") and 0.5 <= float(probability) <= 1
    assert classify(path, monkeypatch, b"\n") == [empty] and classify(path, monkeypatch, b"") == []

    answers = classify(path, monkeypatch, b"one\ntwo\n\xff\nfour\n", status=2)
    assert [message for _, _, message in answers] == ["one", "two"]
    assert capsys.readouterr().err == "error: message 3: not UTF-8 text\n"

    # More lines than one read takes: pieces end within lines, within characters and within line ends.
    texts = [f"é {number} " * (number % 5) for number in range(60)]
    answers = classify(path, monkeypatch, "\r\n".join(texts).encode(), buffering=37)
    assert [text for _, _, text in answers] == texts


def test_a_closed_standard_input(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)  # as Python has it after <&-
    assert ae.main(["--load_model", trained[0], "--classify", "-"]) == 2
    assert capsys.readouterr().err == "error: --classify -: standard input is closed\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals")
def test_what_has_arrived_is_answered_at_once(trained, monkeypatch, capsys):
    """The next message is written only when the one before has its answer; half a line waits for its end; Ctrl-C."""
    reader, writer = os.pipe()
    answers, out = os.pipe()

    def produce():
        with open(writer, "w") as messages, open(answers) as answered:
            for number in range(3):
                for piece in ("half a ", f"message {number}\n"):
                    messages.write(piece)
                    messages.flush()
                    time.sleep(0.05)
                found.append(answered.readline().split("\t")[2])
            os.kill(os.getpid(), signal.SIGINT)  # while it waits for more
            has_ended.wait(10)

    found, has_ended, producer = [], threading.Event(), threading.Thread(target=produce)
    producer.start()
    with open(reader) as file, open(out, "w") as output, redirect_stdout(output), monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        assert ae.main(["--load_model", trained[0], "--classify", "-"]) == 130
        has_ended.set()
    producer.join()
    assert found == [f"half a message {number}\n" for number in range(3)]
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "options, message",
    [
        (["a", "--weights", "random"], "--weights random: the classifier was trained on other weights"),
        (["a", "--seed", "3"], "--seed cannot be combined with --load_model, which trains nothing"),
    ],
)
def test_classify_refuses(trained, capsys, options, message):
    assert ae.main(["--load_model", trained[0], "--classify", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_files_that_are_none_of_ours(trained, capsys):
    path, weights = trained
    Path("cut").write_bytes(Path(path).read_bytes()[:-1])
    for file, message in (weights, "was not written by"), ("cut", "cannot be read"), ("missing", "cannot be read"):
        assert ae.main(["--load_model", file, "--classify", "a"]) == 2
        assert f"error: {file} {message}" in capsys.readouterr().err


def test_damaged_classifiers_are_refused(trained, capsys):
    """A flipped bit in a tensor, settings that are missing or no settings, tensors of another shape or name."""
    saved, parameters = classifiers.read_classifier(trained[0])
    content = bytearray(Path(trained[0]).read_bytes())
    content[-100] ^= 4
    Path("flipped").write_bytes(content)
    first, *rest = parameters.items()
    for name, changes, tensors in [
        ("shape", {}, dict(rest) | {first[0]: first[1][:1].clone()}),
        ("missing", {}, dict(rest)),
        ("unknown", {}, parameters | dict(more=torch.ones(2))),
        ("settings", dict(settings=dict(model_size="gpt2-nano (7M)")), parameters),
        ("value", dict(settings=saved.settings | dict(trainable_layers="none")), parameters),
        ("classes", dict(class_names=["a", "b", "c"]), parameters),
    ]:
        classifiers.save_classifier(name, replace(saved, **changes), tensors)
    for path in Path().glob("*"):
        if path.is_file():
            assert ae.main(["--load_model", path.name, "--classify", "a"]) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1 and err.startswith("error: "), path


def test_memory_that_is_short_is_no_damage(trained, monkeypatch, capsys):
    monkeypatch.setattr(ae, "build_classifier", Mock(side_effect=RuntimeError("DefaultCPUAllocator: not enough")))
    assert ae.main(["--load_model", trained[0], "--classify", "a"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory\nTry: ") and "damaged" not in err


def test_a_million_spaces_are_cut(trained, capsys):
    assert ae.main(["--load_model", trained[0], "--classify", "a" + " " * 1_000_000, "a" + " " * 300_000]) == 0
    first, second = (line.split("\t")[:2] for line in capsys.readouterr().out.splitlines())
    assert first == second


def test_trained_on_a_device_that_is_not_here(trained, monkeypatch, capsys):
    """Or on several."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    saved, parameters = classifiers.read_classifier(trained[0])
    saved.settings |= dict(device="cuda", precision="tf32", shard=True, activation_checkpointing=True)
    classifiers.save_classifier("changed", saved, parameters)
    for file in (trained[0], "changed"):
        assert ae.main(["--load_model", file, "--classify", "You have won"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_weights_that_have_moved_or_changed(trained, options, monkeypatch, capsys):
    path, weights = trained
    content = Path(shutil.copy(weights, "moved.safetensors")).read_bytes()
    Path("changed.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert ae.main(["--load_model", path, "--classify", "a", "--weights", "moved.safetensors"]) == 0
    assert ae.main(["--load_model", path, "--classify", "a", "--weights", "changed.safetensors"]) == 2
    assert "changed.safetensors: the classifier was trained on other weights" in capsys.readouterr().err

    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 0
    # Random ones: PyTorch may come to draw others.
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor.data.zero_())
    assert ae.main(["--load_model", "trained.safetensors", "--classify", "a"]) == 2
    assert "--weights random: the classifier was trained on other weights" in capsys.readouterr().err
