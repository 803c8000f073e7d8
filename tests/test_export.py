"""Exports: what transformers makes of them alone is what this program computes."""

import signal
from pathlib import Path

import pytest
import torch
from helpers import interrupt_at
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import additional_experiments as ae
from gpt_download import Weights, find_weights, load_vocabulary
from runner import files
from runner.saved import export

NANO = "gpt2-nano (7M)"
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}


def made_up_classifier(experiment, n_classes):
    """A Classifier all of whose trained parameters, and norms, are far from those with which they start."""
    classifier = ae.build_classifier(experiment, n_classes)
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad or "norm" in name:
            parameter.data += torch.randn_like(parameter) * (0.01 if name.endswith(".B") else 0.05)
    return classifier


@pytest.fixture(scope="module")
def texts(sample_splits):
    """Two hundred messages, some of which are cut, and one that looks like a special token."""
    texts = [*sample_splits["train"]["Text"][:198], "the end <|endoftext|> is not", "é" * 2000]
    return texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The exported tokenizer, as transformers loads it; it cuts at 40 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "export"
    experiment = ae.Experiment(model_size=NANO, weights="random", device="cpu", trainable_token_pos="flexible")
    weights = Weights(NANO, "random")
    classifier = ae.build_classifier(experiment, 2)
    ae.export_classifier(path, classifier, experiment, weights, 40, ["ham", "spam"], None)
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("layers", ["last_layer", "last_block", "last_two_blocks", "all", "lora", "lora_alternative"])
@pytest.mark.parametrize(
    "position, n_classes",
    [
        ("flexible", 3),
        ("no padding", 7),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("flexible", 2), ("flexible", 7))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("no padding", 2), ("no padding", 3))),
    ],
)
def test_transformers_computes_the_same(tmp_path, texts, tokenizer, layers, position, n_classes):
    how = dict(trainable_token_pos="flexible") if position == "flexible" else dict(no_padding=True)
    experiment = ae.Experiment(
        model_size=NANO, weights="random", device="cpu", trainable_layers=layers, context_length=40, **how
    )
    classifier = made_up_classifier(experiment, n_classes)
    expected = ae.predict_texts(classifier, experiment, texts)
    names = [f"class {number}" for number in range(n_classes)]
    ae.export_classifier(tmp_path / "out", classifier, experiment, Weights(NANO, "random"), 40, names, None)
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
def test_tokens_are_the_same(tokenizer, text):
    expected = load_vocabulary().encode_ordinary(text)
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer(text, truncation=True)["input_ids"] == expected[:40]


def test_merges_are_those_of_the_vocabulary(tokenizer):
    """Every token comes of its own bytes."""
    vocabulary = load_vocabulary()
    for number in range(vocabulary.eot_token):
        try:
            text = vocabulary.decode_single_token_bytes(number).decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        assert tokenizer(text)["input_ids"] == vocabulary.encode_ordinary(text)


# --- beside training, and from a file ---


@pytest.fixture
def flexible(options):
    """The options of a run that can be exported, with labels that are never right for sure."""
    return [*options, "--trainable_token_pos", "flexible", "--learning_rate", "1e-3"]


def of_file(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize(
    "further", ["", "--trainable_layers lora --precision bf16", "--no_padding --trainable_layers all"]
)
def test_an_export_answers_as_the_program_does(flexible, capfd, further):
    """As training wrote it, and as it is written from what --save_model wrote."""
    saving = ["--save_model", "trained.safetensors", "--checkpoint", "run.ckpt"]
    assert ae.main([*flexible, *further.split(), *saving, "--export", "out"]) == 0
    assert (
        ae.main(["--load_model", "trained.safetensors", "--export", "again", "--classify", "You have won", "ok"]) == 0
    )
    answers = [line.split("\t") for line in capfd.readouterr().out.splitlines()[-2:]]
    assert of_file("out")["model.safetensors"] == of_file("again")["model.safetensors"]
    assert of_file("out").keys() == of_file("again").keys() == FILES
    classify = pipeline("text-classification", model="out", truncation=True)
    tolerance = 1e-3 if "bf16" in further else 1e-4  # four decimals are printed
    for answer, found in zip(answers, classify(["You have won", "ok"]), strict=True):
        assert answer[0] == found["label"] and float(answer[1]) == pytest.approx(found["score"], abs=tolerance)
    before = of_file("out")
    assert ae.main([*flexible, *further.split(), *saving, "--export", "out"]) == 0  # finished: it is written again
    assert of_file("out") == before


def test_the_model_card(flexible, capfd):
    assert ae.main([*flexible, "--save_model", "trained.safetensors", "--export", "out"]) == 0
    out = capfd.readouterr().out
    card = Path("out/README.md").read_text()
    test = next(line for line in out.splitlines() if line.startswith("Test accuracy")).removeprefix("Test accuracy: ")
    assert f"| Test | {test} |" in card
    assert next(line for line in out.splitlines() if line.startswith("Test errors: ")).removeprefix("Test ") in card
    assert "--trainable_token_pos flexible" in card and "there is no licence but your own" in card
    assert "- Data: your own data, SHA-256 of labels and texts `" in card and f"PyTorch {torch.__version__}" in card
    published = Weights("gpt2-small (124M)", "pretrained", ae.PRETRAINED["gpt2-small (124M)"].sha256)
    settings = ae.asdict(ae.Experiment(trainable_token_pos="flexible"))
    card = export.model_card("out", settings, ae.DEFAULTS, published, 120, ["ham", "spam"], None)
    assert "license: mit\n" in card and "those of openai-community/gpt2 " in card
    assert "`python additional_experiments.py --trainable_token_pos flexible`" in card


def test_weights_without_the_head_are_base_weights_again(flexible, tmp_path, tiny_size):
    assert ae.main([*flexible, "--export", "out"]) == 0
    tensors = load_file("out/model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, "base.safetensors")
    weights = find_weights("base.safetensors", "gpt2-tiny (1M)")
    assert len(weights.tensors) == len(tensors)


# --- what is refused, and what is never overwritten ---


@pytest.mark.parametrize(
    "further, message",
    [
        ("--average_embeddings", "--average_embeddings; transformers classifies the last token that is not padding"),
        ("--disable_causal_mask", "--disable_causal_mask: GPT-2 in transformers has its mask"),
        ("--trainable_token_pos first", "--trainable_token_pos first; transformers classifies"),
        ("--trainable_token_pos last", "--trainable_token_pos last; transformers classifies"),
    ],
)
def test_what_the_format_cannot_express(flexible, capfd, further, message):
    assert ae.main([*flexible, *further.split(), "--export", "out"]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith(f"error: --export cannot be combined with {message}") and captured.out == ""
    assert ae.main([*flexible, *further.split(), "--save_model", "trained.safetensors"]) == 0
    capfd.readouterr()
    assert ae.main(["--load_model", "trained.safetensors", "--export", "out"]) == 2
    assert message in capfd.readouterr().err and not Path("out").exists()


def test_more_classes_than_the_model_is_wide(flexible, data_dir, capfd):
    (data_dir / "train.csv").write_text("Label,Text\n" + "".join(f"{n},text {n}\n" for n in range(17)))
    assert ae.main([*flexible, "--export", "out"]) == 2
    assert capfd.readouterr().err == "error: --export takes 16 classes at most, the width of the model; there are 17\n"


def test_other_folders_stay(flexible, monkeypatch, capfd):
    for path, content in {"mine/notes.txt": "a", "old/config.json": "{}", "odd/config.json": "[]"}.items():
        Path(path).parent.mkdir()
        Path(path).write_text(content)
        assert ae.main([*flexible, "--export", str(Path(path).parent)]) == 2
        assert "the folder holds something else than an unchanged export, which stays" in capfd.readouterr().err
        assert Path(path).read_text() == content
    assert ae.main([*flexible, "--export", "old/config.json"]) == 2
    assert ae.main([*flexible, "--export", "nowhere/out"]) == 2
    assert ae.main([*flexible, "--export", "out", "--repeats", "2"]) == 2
    assert "--export is for one classifier" in capfd.readouterr().err
    Path("empty").mkdir()
    assert ae.main([*flexible, "--export", "empty", "--results_file", "empty/results.csv"]) == 2
    assert "--results_file empty/results.csv is in the folder of --export" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.chdir("empty")
        assert ae.main([*flexible, "--export", "."]) == 2
    assert "--export . is the current folder" in capfd.readouterr().err
    assert ae.main([*flexible, "--export", ""]) == 2
    assert "--export is given without the name of a folder" in capfd.readouterr().err
    assert ae.main([*flexible, "--export", "empty"]) == 0 and of_file("empty").keys() == FILES
    (Path("empty") / "added").touch()
    assert ae.main([*flexible, "--export", "empty"]) == 2


def saved_again(folder):
    """What a user gets who trains an export further with transformers: its config keeps all entries."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight += 1
    model.save_pretrained(folder)


def a_folder_inside(folder):
    (Path(folder) / "README.md").unlink()
    (Path(folder) / "README.md").mkdir()
    (Path(folder) / "README.md" / "notes").touch()


def a_link(folder):
    (Path(folder) / "README.md").rename("elsewhere.md")
    (Path(folder) / "README.md").symlink_to(Path("elsewhere.md").absolute())


@pytest.mark.parametrize(
    "change",
    [
        saved_again,
        a_folder_inside,
        a_link,
        lambda folder: (Path(folder) / "README.md").write_text("my own card"),
        lambda folder: (Path(folder) / "config.json").write_text((Path(folder) / "config.json").read_text()[:-1] + ","),
        lambda folder: (Path(folder) / "tokenizer.json").unlink(),
    ],
)
def test_an_export_that_was_changed_stays(flexible, capfd, change):
    assert ae.main([*flexible, "--export", "out"]) == 0
    assert export.may_be_replaced("out")
    change("out")
    assert ae.main([*flexible, "--export", "out"]) == 2
    assert "the folder holds something else than an unchanged export, which stays" in capfd.readouterr().err


def test_files_that_appear_while_it_is_written(flexible, monkeypatch, capfd):
    """After all checks but the last, which looks at the folder when it is moved aside."""
    assert ae.main([*flexible, "--export", "out"]) == 0
    before, save = of_file("out"), export.save_file
    monkeypatch.setattr(export, "save_file", lambda *arguments: (Path("out/mine").touch(), save(*arguments)))
    assert ae.main([*flexible, "--seed", "7", "--export", "out"]) == 1
    assert of_file("out") == before | {"mine": b""} and not list(Path().glob("*.part"))


def test_interrupted_between_the_two_moves(flexible, monkeypatch):
    """By Ctrl-C: the earlier export is back at once. By SIGKILL: the next export finds it and puts it back."""
    assert ae.main([*flexible, "--export", "out"]) == 0
    before = of_file("out")
    with monkeypatch.context() as patch:
        interrupt_at(patch, export, "check_moved", 1, signal.SIGINT)
        assert ae.main([*flexible, "--seed", "7", "--export", "out"]) == 130
    assert of_file("out") == before and not list(Path().glob("*.part"))

    left = Path(f"out.{files.host_name()}.999999999.0123abcd.part")
    left.mkdir()
    Path("out").rename(left / "old")
    with pytest.raises(ZeroDivisionError), files.replace_folder("out", export.check_moved):
        1 / 0
    assert of_file("out") == before and not left.exists()


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_checkpoint_of_a_later_seed(flexible, monkeypatch, capfd, is_interrupted):
    """It holds the parameters of the last seed only, and no other's are exported in their place."""
    saving = [*flexible, "--checkpoint", "run.ckpt"]
    with monkeypatch.context() as patch:
        if is_interrupted:  # in the second of two seeds
            interrupt_at(patch, ae, "accumulate_gradients", 130, signal.SIGTERM)
        assert ae.main([*saving, "--repeats", "2"]) == (143 if is_interrupted else 0)
    assert ae.main([*saving, "--export", "out"]) == 2
    err = capfd.readouterr().err
    assert "error: --export: run.ckpt no longer holds the classifier of seed 123, but a later one\n" in err
    assert not Path("out").exists()


def test_the_tokenizer_alone_cuts_too(tokenizer):
    """As the tokenizers library reads the file, which knows nothing of the other one."""
    path = Path(tokenizer.name_or_path) / "tokenizer.json"
    assert len(Tokenizer.from_file(str(path)).encode("word " * 500).ids) == 40


def test_a_folder_that_appears_while_it_trains(flexible, monkeypatch, capfd):
    train = ae.train

    def appearing(*arguments):
        Path("out").mkdir()
        Path("out/mine").touch()
        train(*arguments)

    monkeypatch.setattr(ae, "train", appearing)
    assert ae.main([*flexible, "--export", "out"]) == 1
    assert "error: training finished, but the export could not be written to out" in capfd.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["mine"] and Path("results.csv").exists()


@pytest.mark.parametrize("function", ["save_file", "tokenizer_json"])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_interrupted_export_leaves_nothing(flexible, monkeypatch, function, is_first):
    if not is_first:
        assert ae.main([*flexible, "--export", "out"]) == 0
        before = of_file("out")
    with monkeypatch.context() as patch:
        interrupt_at(patch, export, function, 1, signal.SIGINT)
        assert ae.main([*flexible, "--seed", "7", "--export", "out"]) == 130
    assert Path("out").exists() != is_first and not list(Path().glob("*.part"))
    if not is_first:
        assert of_file("out") == before
    assert ae.main([*flexible, "--seed", "7", "--export", "out"]) == 0
    if not is_first:
        assert of_file("out")["model.safetensors"] != before["model.safetensors"]


def test_a_disk_that_is_full(flexible, monkeypatch, capfd):
    def full(*arguments):
        raise export.SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    assert ae.main([*flexible, "--export", "out"]) == 1
    assert "the export could not be written to out: No space left on device" in capfd.readouterr().err
    assert not Path("out").exists() and not list(Path().glob("*.part")) and Path("results.csv").exists()
