"""Exports: what transformers makes of them alone is what this program computes."""

import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import additional_experiments as ae
from gpt_download import find_weights, load_vocabulary
from runner.saved import export
from runner.saved.classifiers import SavedClassifier

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
RECORD = dict(data="sample", data_sha256="0123", minutes=1.5, device_name="CPU", date="2026-11-24")
RECORD |= dict(versions=dict(python="3", torch="2"), history=dict(lines=["Training completed in 1.50 minutes."]))


def saved(experiment, names, base_sha256=""):
    return SavedClassifier(asdict(experiment), 40, names, base_sha256, RECORD)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The exported tokenizer, as transformers loads it; it cuts at 40 tokens."""
    path = tmp_path_factory.mktemp("tokenizer")
    export.make_tokenizer(40).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("layers", ["last_layer", "last_block", "last_two_blocks", "all", "lora", "lora_alternative"])
@pytest.mark.parametrize("position, n_classes", [("flexible", 3), ("no padding", 7)])
def test_transformers_computes_the_same(tiny_size, tmp_path, sample_splits, tokenizer, layers, position, n_classes):
    texts = [*sample_splits["train"]["Text"][:198], "the end <|endoftext|> is not", "é" * 2000]  # some are cut
    how = dict(trainable_token_pos="flexible") if position == "flexible" else dict(no_padding=True)
    size = dict(model_size="gpt2-tiny (1M)", weights="random", context_length=40)
    experiment = ae.Experiment(device="cpu", trainable_layers=layers, **how, **size)
    classifier = ae.build_classifier(experiment, n_classes)
    for name, parameter in classifier.named_parameters():  # far from those with which they start
        if parameter.requires_grad or "norm" in name:
            parameter.data += torch.randn_like(parameter) * (0.01 if name.endswith(".B") else 0.05)
    expected = ae.predict_texts(classifier, experiment, texts)
    names = [f"class {number}" for number in range(n_classes)]
    ae.merge_lora(classifier)
    export.make_model(classifier, names).save_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert [model.config.id2label[number] for number in range(n_classes)] == names
    padded = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**padded).logits
        alone = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in texts[::20]]
    assert (found - expected).abs().max() < 1e-5 and (torch.cat(alone) - expected[::20]).abs().max() < 1e-5
    assert found.argmax(-1).equal(expected.argmax(-1)) and len(found.argmax(-1).unique()) > 1


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=60))
def test_any_text_has_the_same_tokens(tokenizer, text):
    expected = load_vocabulary().encode_ordinary(text)
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer(text, truncation=True)["input_ids"] == expected[:40]


def test_messages_and_all_tokens_are_the_same(tokenizer, sample_splits):
    vocabulary = load_vocabulary()
    texts = [text for frame in sample_splits.values() for text in frame["Text"]]
    for number in range(vocabulary.eot_token):
        try:
            texts.append(vocabulary.decode_single_token_bytes(number).decode())
        except UnicodeDecodeError:  # a part of a character
            continue
    texts += ["a<|endoftext|>b", "<|endoftext|>", "aaa" * 99, "  \t\n \u00a0\u2028 x", "I'LL we'll 東京 ½½ 12345"]
    for text, found in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert found == vocabulary.encode_ordinary(text), text


# --- beside training, and from a file ---


@pytest.fixture
def flexible(options):
    """The options of a run that can be exported, with labels that are never right for sure."""
    return [*options, "--trainable_token_pos", "flexible", "--learning_rate", "1e-3"]


@pytest.mark.parametrize(
    "further", ["", "--trainable_layers lora --precision bf16", "--no_padding --trainable_layers all"]
)
def test_an_export_answers_as_the_program_does(flexible, capfd, further):
    """As training wrote it, and as it is written from what --save_model wrote."""
    assert ae.main([*flexible, *further.split(), "--save_model", "trained", "--export", "out"]) == 0
    assert capfd.readouterr().err == ""
    Path("again").mkdir()  # an empty folder will do
    assert ae.main(["--load_model", "trained", "--export", "again", "--classify", "You have won", "ok"]) == 0
    answers = [line.split("\t") for line in capfd.readouterr().out.splitlines()[-2:]]
    for name in FILES - {"README.md"}:
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()
    for folder in ("out", "again"):
        assert {path.name for path in Path(folder).iterdir()} == FILES
        assert len({path.stat().st_mode for path in Path(folder).iterdir()}) == 1  # all can be read by others
    cards = [Path(folder, "README.md").read_text("utf-8") for folder in ("out", "again")]
    assert cards[0] == cards[1].replace("again", "out")
    classify = pipeline("text-classification", model="out", truncation=True)
    tolerance = 1e-3 if "bf16" in further else 1e-4  # four decimals are printed
    for answer, found in zip(answers, classify(["You have won", "ok"]), strict=True):
        assert answer[0] == found["label"] and float(answer[1]) == pytest.approx(found["score"], abs=tolerance)


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
    assert "- Base weights: random ones, drawn with seed 123" in card
    data = next(line for line in card if line.startswith("- Data: "))
    assert data.startswith("- Data: your own data, SHA-256 of labels and texts `")


def test_the_licence_on_the_model_card():
    experiment = ae.Experiment(trainable_token_pos="flexible", learning_rate=1e-3)
    published = ae.PRETRAINED["gpt2-small (124M)"].sha256
    card = export.model_card(Path("out"), saved(experiment, ["ham", "spam"], published), ae.DEFAULTS)
    assert "license: mit\n" in card and "those of openai-community/gpt2, " in card
    assert "`python additional_experiments.py --trainable_token_pos flexible --learning_rate 0.001`" in card
    assert "license" not in export.model_card(Path("out"), saved(experiment, ["ham", "spam"], "0123"), ae.DEFAULTS)


def test_weights_without_the_head_are_base_weights_again(flexible):
    assert ae.main([*flexible, "--export", "out"]) == 0
    tensors = load_file("out/model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, "base.safetensors")
    assert len(find_weights("base.safetensors", "gpt2-tiny (1M)").tensors) == len(tensors)


# --- what is refused, and what is never overwritten ---


@pytest.mark.parametrize(
    "further",
    ["--average_embeddings", "--disable_causal_mask", "--trainable_token_pos first", "--trainable_token_pos last"],
)
def test_what_the_format_cannot_express(flexible, capfd, further):
    assert ae.main([*flexible, *further.split(), "--export", "out"]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: --export needs --trainable_token_pos flexible") and captured.out == ""
    assert ae.main([*flexible, *further.split(), "--save_model", "trained"]) == 0
    assert ae.main(["--load_model", "trained", "--export", "out"]) == 2
    assert captured.err == capfd.readouterr().err and not Path("out").exists()


def test_more_classes_than_the_model_is_wide(flexible, data_dir, capfd):
    (data_dir / "train.csv").write_text("Label,Text\n" + "".join(f"{n},text {n}\n" for n in range(17)))
    assert ae.main([*flexible, "--export", "out"]) == 2
    assert capfd.readouterr().err == "error: --export takes 16 classes at most, the width of the model; there are 17\n"


def test_folders_that_are_not_new_or_empty(flexible, capfd):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("a")
    Path("itself").symlink_to("itself")
    for path, message in {
        "mine": "--export mine is not a new or empty folder",
        "mine/notes.txt": "--export mine/notes.txt is not a new or empty folder",
        "itself": "--export itself is not a new or empty folder",
        "nowhere/out": f"--export nowhere/out: nothing can be written into {Path('nowhere').absolute()}",
    }.items():
        assert ae.main([*flexible, "--export", path]) == 2
        assert capfd.readouterr().err == f"error: {message}\n"
    assert Path("mine/notes.txt").read_text() == "a"


@pytest.mark.parametrize("found", [[], [SimpleNamespace(version="4.57.1")]])
def test_transformers_is_needed_before_training(flexible, monkeypatch, capfd, found):
    monkeypatch.setattr(export.metadata, "distributions", lambda **_: found)
    assert ae.main([*flexible, "--export", "out"]) == 2
    message = 'error: --export needs transformers 5 or later: pip install "transformers>=5"\n'
    assert capfd.readouterr() == ("", message)


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (SafetensorError("No space left on device"), 1)])
def test_an_export_is_whole_or_absent(flexible, monkeypatch, capfd, error, status):
    def fail(*_):
        raise error

    monkeypatch.setattr(export, "make_model", fail)  # when the tokenizer is written
    assert ae.main([*flexible, "--export", "out"]) == status
    assert os.listdir("out") == []
    if status == 1:
        assert "could not be written to out: No space left on device" in capfd.readouterr().err
