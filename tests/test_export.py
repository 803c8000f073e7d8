"""Exports: what transformers makes of them alone is what this program computes."""

import os
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from helpers import interrupt_at
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import additional_experiments as ae
from gpt_download import load_vocabulary, load_weights
from runner.saved import export
from runner.saved.classifiers import SavedClassifier

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The exported tokenizer, as transformers loads it; it cuts at 40 tokens."""
    path = tmp_path_factory.mktemp("tokenizer")
    export.make_tokenizer(40).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("layers", ["last_block", "all", "lora"])
def test_transformers_computes_the_same(tiny_size, tmp_path, sample_splits, tokenizer, layers):
    texts = [*sample_splits["train"]["Text"][:198], "the end <|endoftext|> is not", "é" * 2000]  # some are cut
    how, n_classes = (dict(no_padding=True), 7) if layers == "last_block" else (dict(trainable_token_pos="flexible"), 3)
    size = dict(model_size="gpt2-tiny (1M)", weights="random", context_length=40)
    experiment = ae.Experiment(device="cpu", trainable_layers=layers, **how, **size)
    classifier = ae.build_classifier(experiment, n_classes)
    for name, parameter in classifier.named_parameters():  # far from those with which they start
        if parameter.requires_grad or "norm" in name:
            parameter.data += torch.randn_like(parameter) * (0.01 if name.endswith(".B") else 0.05)
    encoded = ae.encode(load_vocabulary(), {"texts": pd.DataFrame(dict(Text=texts, Label=0))}, experiment)
    expected = ae.predict(classifier, encoded.pool, encoded.splits["texts"].indices)
    names = [f"class {number}" for number in range(n_classes)]
    classifier.merge_lora()
    export.make_model(classifier, names).save_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert [model.config.id2label[number] for number in range(n_classes)] == names
    padded = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**padded).logits
        alone = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in texts[::20]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(alone), expected[::20], rtol=0, atol=1e-5)


def test_messages_and_all_tokens_are_the_same(tokenizer, sample_splits):
    vocabulary = load_vocabulary()
    tokens = [vocabulary.decode_single_token_bytes(number) for number in range(vocabulary.eot_token)]
    texts = [text for frame in sample_splits.values() for text in frame["Text"]]
    texts += [token.decode(errors="ignore") for token in tokens]  # some are a part of a character
    texts += ["a<|endoftext|>b", "<|endoftext|>", "aaa" * 99, "  \t\n \u00a0\u2028 x", "I'LL we'll 東京 ½½ 12345"]
    for text, found in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert found == vocabulary.encode_ordinary(text), text


# --- beside training, and from a file ---


@pytest.fixture
def flexible(options):
    """The options of a run that can be exported, with labels that are never right for sure."""
    return [*options, "--trainable_token_pos", "flexible", "--learning_rate", "1e-3"]


def test_an_export_answers_as_the_program_does(flexible, capfd):
    """As training wrote it, and as it is written from what --save_model wrote."""
    command = [*flexible, "--trainable_layers", "lora", "--precision", "bf16"]
    assert ae.main([*command, "--save_model", "trained.safetensors", "--export", "out"]) == 0
    assert capfd.readouterr().err == ""
    Path("again").mkdir()  # an empty folder will do
    using = ["--load_model", "trained.safetensors", "--export", "again", "--classify", "You have won", "ok", "--quiet"]
    assert ae.main(using) == 0
    told = capfd.readouterr()
    assert "Wrote the export" not in told.err
    answers = [line.split("\t") for line in told.out.splitlines()]
    for name in FILES - {"README.md"}:
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()
    for folder in ("out", "again"):
        assert {path.name for path in Path(folder).iterdir()} == FILES
        assert len({path.stat().st_mode for path in Path(folder).iterdir()}) == 1  # all can be read by others
    cards = [Path(folder, "README.md").read_text("utf-8") for folder in ("out", "again")]
    assert cards[0] == cards[1].replace("again", "out")
    classify = pipeline("text-classification", model="out", truncation=True)
    for answer, found in zip(answers, classify(["You have won", "ok"]), strict=True):
        assert answer[0] == found["label"] and float(answer[1]) == pytest.approx(found["score"], abs=1e-3)

    tensors = load_file("out/model.safetensors")  # without the head they are base weights again
    del tensors["score.weight"]
    save_file(tensors, "base.safetensors")
    assert len(load_weights("base.safetensors", "gpt2-tiny (1M)").tensors) == len(tensors)


def test_the_model_card(flexible, data_dir, capfd):
    """What the run printed: also the accuracy without repeated messages, and F1, as there are few messages of spam."""
    frame = pd.read_csv(data_dir / "test.csv")
    frame = frame.sort_values("Label").head((frame["Label"] == 0).sum() + 1)
    repeated = pd.read_csv(data_dir / "train.csv").head(2).assign(Label=0)
    pd.concat([frame, repeated]).to_csv(data_dir / "test.csv", index=None)
    assert ae.main([*flexible, "--export", "out"]) == 0
    lines = capfd.readouterr().out.splitlines()
    card = Path("out/README.md").read_text("utf-8").splitlines()
    printed = ["Training accuracy: ", "Validation accuracy: ", "Test accuracy: ", "Test errors: "]
    printed += ["Test accuracy without the 2 that are like training messages: ", "Test macro-averaged F1: "]
    for beginning in printed:
        assert [line for line in lines if line.startswith(beginning)][-1] in card
    assert not any(line.startswith(("Most confident", "Ep 1")) for line in card)  # the first precedes messages
    assert "- Base weights: random" in card and "- Data: your own data" in card
    [command] = [line for line in card if line.startswith("- Trained by")]
    assert "--trainable_token_pos flexible" in command and "--learning_rate 0.001" in command
    assert "--num_epochs" in command and "--seed" not in command and "--export" not in command

    experiment = ae.Experiment(trainable_token_pos="flexible", learning_rate=1e-3)
    sha256 = ae.PRETRAINED["gpt2-small (124M)"].sha256
    published = SavedClassifier(asdict(experiment), 40, [0, 1], sha256, "--seed 5", "sample", [])
    card = export.model_card(Path("out"), published)
    assert "- Base weights: openai-community/gpt2, under OpenAI's MIT License" in card and "CC BY 4.0" in card
    assert "`python additional_experiments.py --seed 5`" in card


# --- what is refused, and what is never overwritten ---


def test_what_the_format_cannot_express(flexible, data_dir, capfd):
    """Averages, no causal mask, the first token, and more classes than the model is wide."""
    for further in ("--average_embeddings", "--disable_causal_mask", "--trainable_token_pos=first"):
        assert ae.main([*flexible, further, "--export", "out"]) == 2
        told = capfd.readouterr()
        assert told.err.startswith("error: --export needs --trainable_token_pos flexible") and told.out == ""
    assert ae.main([*flexible, further, "--save_model", "trained.safetensors"]) == 0
    assert ae.main(["--load_model", "trained.safetensors", "--export", "out"]) == 2
    assert told.err == capfd.readouterr().err and not Path("out").exists()
    (data_dir / "train.csv").write_text("Label,Text\n" + "".join(f"{n},text {n}\n" for n in range(17)))
    assert ae.main([*flexible, "--export", "out"]) == 2
    told = capfd.readouterr()
    assert "error: --export takes 16 classes at most" in told.err and "Ep 1" not in told.out  # before training


def test_folders_that_are_not_new_or_empty(flexible, capfd):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("a")
    for path in ("mine", "mine/notes.txt"):
        for command in (flexible, ["--load_model", "missing"]):
            assert ae.main([*command, "--export", path]) == 2
            assert capfd.readouterr().err == f"error: --export {path} is not a new or empty folder\n"
    assert Path("mine/notes.txt").read_text() == "a"


@pytest.mark.parametrize("found", [[], [SimpleNamespace(version="4.57.1")]])
def test_transformers_is_needed_before_training(flexible, monkeypatch, capfd, found):
    monkeypatch.setattr(export.metadata, "distributions", lambda **_: found)
    assert ae.main([*flexible, "--export", "out"]) == 2
    assert capfd.readouterr().err.startswith("error: --export needs transformers 5 or later: pip install ")


def test_an_export_that_fails_leaves_an_empty_folder(flexible, monkeypatch, capfd):
    monkeypatch.setattr(export, "make_model", Mock(side_effect=SafetensorError("No space left on device")))
    assert ae.main([*flexible, "--export", "out"]) == 1  # the tokenizer is written already
    assert os.listdir("out") == []
    assert "could not be written to out: No space left on device" in capfd.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals")
def test_half_an_export_does_not_load(flexible, monkeypatch):
    """Ctrl-C when some of the files are in their places."""
    assert ae.main([*flexible, "--num_epochs", "1", "--quiet", "--save_model", "trained.safetensors"]) == 0
    for n in (0, 2, len(FILES) - 1):
        with monkeypatch.context() as patch:
            interrupt_at(patch, Path, "rename", n + 1, signal.SIGINT)
            assert ae.main(["--load_model", "trained.safetensors", "--export", f"out{n}"]) == 130
        assert len(os.listdir(f"out{n}")) == n
        with pytest.raises((OSError, ValueError)):
            AutoModelForSequenceClassification.from_pretrained(f"out{n}")
