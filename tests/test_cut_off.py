"""Runs that are cut off and go on, repeats, and what was trained put to use: all at the nano size."""

import csv
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_results import damaged_at, in_the_next_format, no_file_above, processes
from transformers import GPT2Config, GPT2LMHeadModel

import additional_experiments as ae
import results

CONFIGURATIONS = {
    "last_block": "",
    "last_layer": "--trainable_layers last_layer --average_embeddings",
    "all": "--trainable_layers all --trainable_token_pos flexible",
    "lora": "--trainable_layers lora --precision bf16",
    "accumulation": "--accumulation_steps 8",
    "accumulation, all": "--accumulation_steps 3 --trainable_layers all",
    "no padding": "--no_padding --trainable_layers last_two_blocks",
    "repeats": "--repeats 2",
}


@pytest.fixture
def options(nano):
    """Two epochs of 43 batches, so that losses are evaluated at steps 0 and 50."""
    return [*nano, "--num_epochs", "2", "--batch_size", "1"]


def numbers(text):
    """What a run printed, but for times and where it went on from."""
    begins = ("Ep ", "Training accuracy", "Validation accuracy", "Test accuracy")
    lines = [line for line in text.splitlines() if line.startswith(begins)]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| - |")]
    return lines, [row[:10] + row[11:] for row in rows]  # the eleventh cell is the time


def records(path="results.csv"):
    timed = ("run", "date", "minutes", "seconds", "peak_memory_gb")
    with open(path, newline="") as file:
        return [{name: cell for name, cell in line.items() if name not in timed} for line in csv.DictReader(file)]


def run_in_folder(folder, options):
    """A run in a process of its own, which prints into out.txt and err.txt of its folder; at its end its seconds."""
    os.chdir(folder)
    begin = time.perf_counter()
    with open("out.txt", "a") as out, open("err.txt", "a") as err, redirect_stdout(out), redirect_stderr(err):
        status = ae.main(options)
    Path("seconds").write_text(f"{time.perf_counter() - begin}")
    sys.exit(status)


# --- SIGKILL ---


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_killed_at_random_moments(options, tmp_path, name):
    """Three moments for each of eight configurations, some of them before there is a checkpoint."""
    options = [*options, *CONFIGURATIONS[name].split(), "--checkpoint", "run.ckpt", "--checkpoint_minutes", "0.005"]

    def start(folder):
        folder.mkdir(exist_ok=True)
        process = processes().Process(target=run_in_folder, args=(folder, options))
        process.start()
        return process

    def finish(folder):
        process = start(folder)
        process.join()
        assert process.exitcode == 0, (folder / "err.txt").read_text()

    finish(tmp_path / "whole")
    duration = float((tmp_path / "whole" / "seconds").read_text())
    whole = (tmp_path / "whole" / "out.txt").read_text()

    for number in range(3):
        folder, moment = tmp_path / f"cut {number}", random.uniform(0.2, 1) * duration
        process = start(folder)
        process.join(moment)
        process.kill()
        process.join()
        # Wherever it was: at most one file is being written, and that is cleared away by the next one.
        assert len(list(folder.glob("*.part"))) <= 1
        (folder / "out.txt").unlink(missing_ok=True)
        finish(folder)
        assert numbers((folder / "out.txt").read_text()) == numbers(whole), f"killed after {moment} s"
        assert records(folder / "results.csv") == records(tmp_path / "whole" / "results.csv")
        assert not list(folder.glob("*.part"))


# --- SIGTERM and Ctrl-C at chosen moments ---


def interrupt_at(monkeypatch, owner, name, call, number):
    """Have this process send itself a signal at the beginning of the `call`-th call of a function."""
    calls, function = [], getattr(owner, name)

    def interrupting(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, interrupting)


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself these signals on Windows")
@pytest.mark.parametrize("name", ["last_block", "accumulation", "accumulation, all", "repeats"])
@pytest.mark.parametrize(
    "owner, function, call",
    [
        (ae, "mean_loss", 1),  # in an evaluation, the first, second and third
        (ae, "mean_loss", 2),
        (ae, "mean_loss", 3),
        (ae, "accumulate", 3),
        (torch.optim.AdamW, "step", 1),  # in an update
        (torch.optim.AdamW, "step", 4),
        (ae, "accuracy", 1),  # at the end of an epoch
        (ae, "accuracy", 6),  # at the end of the run
        (ae.results, "append_record", 1),
        (ae.results, "write_checkpoint", 2),
    ],
)
def test_interrupted(options, tmp_path, monkeypatch, capfd, name, owner, function, call):
    options = [*options, *CONFIGURATIONS[name].split()]
    assert ae.main(options) == 0
    expected, expected_records = numbers(capfd.readouterr().out), records()
    Path("results.csv").unlink()

    signal_number, status = random.choice([(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    options += ["--checkpoint", "run.ckpt"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, function, call, signal_number)
        before = [signal.getsignal(number) for number in results.Lifeline.SIGNALS]
        assert ae.main(options) == status
        assert [signal.getsignal(number) for number in results.Lifeline.SIGNALS] == before
    told = capfd.readouterr().err
    assert told == "interrupted; the same command goes on from run.ckpt\n" or not Path("run.ckpt").exists()

    assert ae.main(options) == 0
    assert numbers(capfd.readouterr().out) == expected
    assert records() == expected_records


def test_interrupted_before_there_is_anything_to_keep(options, monkeypatch, capfd):
    interrupt_at(monkeypatch, ae, "compute_features", 1, signal.SIGTERM)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 143
    assert capfd.readouterr().err == "interrupted\n" and list(Path().iterdir()) == []


def test_going_on_is_said_and_what_was_printed_before_is_shown_again(options, monkeypatch, capfd):
    options += ["--checkpoint", "run.ckpt"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, ae, "accumulate", 60, signal.SIGINT)
        assert ae.main(options) == 130
    before = numbers(capfd.readouterr().out)[0]
    assert ae.main(options) == 0
    out = capfd.readouterr().out
    assert "Going on from run.ckpt, after 59 batches; what was printed before:\n" + before[0] in out


def test_a_finished_run_is_not_run_again(options, monkeypatch, capfd):
    options += ["--checkpoint", "run.ckpt"]
    assert ae.main(options) == 0
    expected = numbers(capfd.readouterr().out)
    monkeypatch.setattr(ae, "train", None)
    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 0
    out = capfd.readouterr().out
    assert numbers(out) == expected and "Finished before, says run.ckpt" in out
    assert len(records()) == 1 and ae.load_classifier("trained.safetensors", {})


def test_other_circumstances_are_told(cut_off, capfd):
    """Sums in another order, as with another number of threads, may differ in the last digits."""
    assert ae.main([*cut_off, "--features", "off"]) == 0
    told = "warning: run.ckpt was begun with features kept and goes on with worked out anew: last digits may differ\n"
    assert capfd.readouterr().err == told


def test_an_error_in_training_loses_no_more_than_an_interruption(options, monkeypatch, capfd):
    options += ["--checkpoint", "run.ckpt"]
    accumulate, calls = ae.accumulate, []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("MPS backend out of memory")
        accumulate(*arguments)

    monkeypatch.setattr(ae, "accumulate", fail_once)
    assert ae.main(options) == 1
    assert "error: out of memory\nWays on: " in capfd.readouterr().err
    assert ae.main(options) == 0
    assert "Going on from run.ckpt, after 19 batches" in capfd.readouterr().out


def test_more_repeats_of_a_finished_run(options, capfd):
    options += ["--checkpoint", "run.ckpt", "--repeats"]
    assert ae.main([*options, "1"]) == 0
    assert ae.main([*options, "3"]) == 0
    assert [record["seed"] for record in records()] == ["123", "124", "125"]
    assert "mean ± standard deviation of 3 seeds" in capfd.readouterr().out


# --- faults ---


@pytest.fixture
def cut_off(options, monkeypatch, capfd):
    """The options of a run whose checkpoint run.ckpt holds its first epoch."""
    options += ["--checkpoint", "run.ckpt"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, ae, "accumulate", 50, signal.SIGINT)
        assert ae.main(options) == 130
    capfd.readouterr()
    return options


@pytest.mark.parametrize(
    "further, message",
    [
        (["--learning_rate", "0.1"], "with learning_rate 5e-05, not 0.1"),
        (["--trainable_layers", "all"], "with trainable_layers last_block, not all"),
        (["--seed", "7"], "with seed 123, not 7"),
        (["--precision", "bf16"], "with precision fp32, not bf16"),
    ],
)
def test_checkpoint_of_other_settings(cut_off, capfd, further, message):
    before = Path("run.ckpt").read_bytes()
    assert ae.main([*cut_off, *further]) == 2
    out, err = capfd.readouterr()
    assert err == f"error: run.ckpt is of a run {message}; --restart overwrites it\n" and "Ep 1" not in out
    assert Path("run.ckpt").read_bytes() == before
    assert ae.main([*cut_off, *further, "--restart"]) == 0
    assert Path("run.ckpt").read_bytes() != before and len(records()) == 1


def test_checkpoint_of_other_data(cut_off, data_dir, capfd):
    with open(data_dir / "test.csv", "a") as file:
        file.write("0,one more\n")
    assert ae.main(cut_off) == 2
    assert "run.ckpt is of a run with data " in capfd.readouterr().err


def test_checkpoint_of_other_weights(cut_off, tmp_path, capfd):
    options = [save_random_weights(tmp_path / "w") if option == "random" else option for option in cut_off]
    assert ae.main(options) == 2
    assert "run.ckpt is of a run with weights random, not " in capfd.readouterr().err


def test_what_changes_no_number_may_change(cut_off, data_dir, tmp_path):
    """The folder of the data, where features are kept, and what else the call is to do."""
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    further = ["--data_dir", str(moved), "--features", "host", "--quiet", "--plot", "run.svg"]
    assert ae.main([*cut_off, *further]) == 0


@pytest.mark.parametrize(
    "damage, message",
    [
        (damaged_at(-1000), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "cannot be read as a checkpoint"),
        (lambda path: path.write_text("my diary\n" * 100), "cannot be read as a checkpoint"),
        (in_the_next_format, "in format 2"),
    ],
)
def test_checkpoint_that_cannot_be_used(cut_off, capfd, damage, message):
    damage(Path("run.ckpt"))
    before = Path("run.ckpt").read_bytes()
    assert ae.main(cut_off) == 2
    err = capfd.readouterr().err
    assert message in err and err.endswith("; --restart overwrites it\n") and err.count("\n") == 1
    assert Path("run.ckpt").read_bytes() == before


def test_full_disk(cut_off, capfd):
    """No file may grow beyond 10,000 bytes: the record fits, the checkpoint does not, and the last good one stays."""
    before = Path("run.ckpt").read_bytes()
    with no_file_above(10_000):
        assert ae.main([*cut_off, "--checkpoint_minutes", "0"]) == 0
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and "warning: the checkpoint run.ckpt could not be written: " in err
    assert "File too large" in err and "Test accuracy: " in out and len(records()) == 1
    assert Path("run.ckpt").read_bytes() == before and not list(Path().glob("*.part"))


def test_nothing_can_be_written(options, capsys):
    """Not even the record: the result stays on the screen, and the exit status says that something is lost."""
    Path("results.csv").touch()
    with no_file_above(0):
        status = ae.main([*options, "--save_model", "trained.safetensors", "--plot", "run.png"])
    out, err = capsys.readouterr()
    assert status == 1 and "Test accuracy: " in out and "| - | gpt2-nano (7M) |" in out
    for what in ("the record could not be written to results.csv", "the classifier could", "the picture could"):
        assert f"warning: {what}" in err
    assert Path("results.csv").read_bytes() == b"" and [path.name for path in Path().iterdir()] == ["results.csv"]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that even root cannot write into")
def test_read_only_folder(options, capfd):
    further = ["--checkpoint", "/sys/run.ckpt", "--results_file", "/sys/results.csv"]
    assert ae.main([*options, *further]) == 1
    out, err = capfd.readouterr()
    assert "Test accuracy: " in out
    assert "warning: the checkpoint /sys/run.ckpt could not be written" in err
    assert "warning: the record could not be written to /sys/results.csv" in err and "Traceback" not in err


def test_folder_that_vanishes(options, monkeypatch, capfd):
    Path("kept").mkdir()
    accumulate = ae.accumulate

    def remove_then_accumulate(*arguments):
        shutil.rmtree("kept", ignore_errors=True)
        accumulate(*arguments)

    monkeypatch.setattr(ae, "accumulate", remove_then_accumulate)
    assert ae.main([*options, "--checkpoint", "kept/run.ckpt", "--results_file", "kept/results.csv"]) == 1
    out, err = capfd.readouterr()
    assert "Test accuracy: " in out and "No such file or directory" in err and err.count("the checkpoint") == 1


def test_results_file_with_other_columns(options, capfd):
    Path("results.csv").write_text("a,b\n")
    assert ae.main(options) == 0
    told = "warning: results.csv has other columns and stays as it is; the record is in results-2.csv\n"
    assert capfd.readouterr().err == told
    assert Path("results.csv").read_text() == "a,b\n" and len(records("results-2.csv")) == 1


def test_no_record_is_asked_for(options):
    assert ae.main([*options, "--results_file", ""]) == 0
    assert list(Path().iterdir()) == []


def test_memory_that_cannot_be_enough_is_told_item_by_item(options, monkeypatch, capfd):
    monkeypatch.setattr(ae, "free_memory", lambda device: 50_000_000)
    assert ae.main([*options, "--trainable_layers", "all"]) == 0
    assert capfd.readouterr().err == (
        "warning: this run needs 0.12 GB and 0.05 GB are free: weights 0.03 GB, gradients 0.03 GB, optimizer 0.06 GB, "
        "frozen features 0.00 GB\n"
    )


# --- results of several seeds ---


def save_random_weights(folder):
    """The path of a weights file as transformers writes it."""
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4)).save_pretrained(folder)
    return str(folder / "model.safetensors")


def test_repeats_share_what_does_not_depend_on_the_seed(options, tmp_path, monkeypatch, capfd):
    options[options.index("random")] = save_random_weights(tmp_path / "weights")
    blocks = []
    forward = ae.GPTModel.blocks
    monkeypatch.setattr(ae.GPTModel, "blocks", lambda self, x, *rest: blocks.append(len(x)) or forward(self, x, *rest))

    alone = []
    for seed in range(123, 128):
        blocks.clear()
        assert ae.main([*options, "--seed", str(seed)]) == 0
        alone.append(records()[-1])
    of_one_run = list(blocks)
    assert sum(of_one_run) == 69  # messages, each once
    Path("results.csv").unlink()
    capfd.readouterr()

    blocks.clear()
    assert ae.main([*options, "--repeats", "5", "--quiet"]) == 0
    assert blocks == of_one_run
    assert records() == alone
    *rows, mean = capfd.readouterr().out.splitlines()
    assert len(rows) == 5 and "mean ± standard deviation of 5 seeds" in mean
    tests = [100 * float(record["test_fraction"]) for record in alone]
    average, deviation = results.spread(tests)
    assert f"| {average:.2f}% ± {deviation:.2f} |" in mean


def test_random_weights_change_with_the_seed(options):
    assert ae.main([*options, "--repeats", "2"]) == 0
    assert ae.main([*options, "--seed", "124"]) == 0
    first, second, alone = records()
    assert second == alone and first != second


# --- what was trained, put to use ---


@pytest.mark.parametrize(
    "layers", ["last_layer", "last_block", "last_two_blocks", "all", "lora", "lora_alternative", "last_block bf16"]
)
@pytest.mark.parametrize("position", ["last", "first", "flexible", "average", "no padding", "no mask"])
@pytest.mark.parametrize("weights", ["random", "file"])
def test_a_loaded_classifier_gives_the_very_logits(options, data_dir, tmp_path, monkeypatch, layers, position, weights):
    if weights == "file":
        options[options.index("random")] = save_random_weights(tmp_path / "weights")
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
    options += [*further, "--num_epochs", "1", "--batch_size", "8", "--learning_rate", "1e-3"]
    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 0

    classifier, experiment, labels, device = ae.load_classifier("trained.safetensors", {})
    texts = list(pd.read_csv(data_dir / "test.csv", keep_default_na=False)["Text"])
    assert ae.predict_texts(classifier, experiment, texts, device).equal(given[-1].logits)
    assert labels == ["0", "1"]


PREDICT_BATCHES = ae.predict_batches


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier of the sample's messages: (its path, the path of the weights under it)."""
    folder = tmp_path_factory.mktemp("trained")
    path, weights = folder / "spam.safetensors", save_random_weights(folder)
    options = ["--demo", "--weights", weights, "--trainable_layers", "last_two_blocks", "--num_epochs", "3", "--quiet"]
    options += ["--average_embeddings", "--no_padding", "--learning_rate", "1e-3"]
    assert ae.main([*options, "--device", "cpu", "--save_model", str(path), "--results_file", ""]) == 0
    return str(path), weights


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


@pytest.mark.parametrize(
    "options, message",
    [
        (["a", "--model_size", "gpt2-small"], "--model_size gpt2-small (124M): {path} was trained on gpt2-nano (7M)"),
        (["a", "--weights", "random"], "--weights random: {path} was trained on other weights (by their SHA-256)"),
        (["a", "--seed", "3"], "--seed has no place beside --load_model, which trains nothing"),
        (["a", "--precision", "bf16"], "--precision has no place beside --load_model, which trains nothing"),
        ([" "], "message 1 is empty"),
        (["a", ""], "message 2 is empty"),
    ],
)
def test_classify_refuses(trained, capsys, options, message):
    path, _ = trained
    assert ae.main(["--load_model", path, "--classify", *options]) == 2
    assert capsys.readouterr().err == f"error: {message.format(path=path)}\n"


def test_weights_that_have_moved_or_changed(trained, tmp_path, capsys):
    path, weights = trained
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    other = save_random_weights(tmp_path / "other")
    damaged_at(-1)(Path(other))
    assert ae.main(["--load_model", path, "--classify", "a", "--weights", str(moved)]) == 0
    assert ae.main(["--load_model", path, "--classify", "a", "--weights", other]) == 2
    assert f"--weights {other}: {path} was trained on other weights" in capsys.readouterr().err


def test_published_weights_under_another_name_are_the_row_too(options, tmp_path, monkeypatch, capfd):
    weights = save_random_weights(tmp_path / "weights")
    pinned = ae.gpt_download.HubFile("nobody/nano", "0", ae.gpt_download.sha256_of(weights))
    monkeypatch.setitem(ae.gpt_download.PRETRAINED, ae.NANO, pinned)
    monkeypatch.setitem(ae.ROWS, 20, ae.Row(dict(model_size=ae.NANO, num_epochs=2, batch_size=1), ae.ROWS[1].published))
    load_splits = ae.load_splits
    monkeypatch.setattr(ae, "load_splits", lambda *arguments: (load_splits(*arguments)[0], "uci"))
    options[options.index("random")] = weights
    assert ae.main([*options, "--quiet"]) == 0
    assert capfd.readouterr().out.startswith("| 20 |") and records()[0]["row"] == "20"


def test_a_classifier_that_the_checkpoint_has_let_go_of(options, capfd):
    options += ["--checkpoint", "run.ckpt"]
    assert ae.main([*options, "--repeats", "2"]) == 0
    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 2
    told = "error: --save_model: run.ckpt holds seed 124 and has let go of the one before\n"
    assert capfd.readouterr().err == told and not Path("trained.safetensors").exists()


def test_weights_are_not_overwritten(options, tmp_path, capsys):
    weights = save_random_weights(tmp_path / "weights")
    options[options.index("random")] = weights
    before = Path(weights).read_bytes()
    assert ae.main([*options, "--save_model", weights]) == 2
    assert f"--save_model {weights} would overwrite the weights" in capsys.readouterr().err
    assert Path(weights).read_bytes() == before


def test_a_classifier_trained_on_a_device_that_is_not_here(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    description, tensors = results.read_tensors(trained[0], ae.CLASSIFIER)
    description["settings"] |= dict(device="cuda", precision="tf32")
    results.write_tensors(tmp_path / "elsewhere", ae.CLASSIFIER, description, tensors)
    assert ae.main(["--load_model", str(tmp_path / "elsewhere"), "--classify", "a"]) == 0

    del tensors["out_head.weight"]
    results.write_tensors(tmp_path / "part", ae.CLASSIFIER, description, tensors)
    assert ae.main(["--load_model", str(tmp_path / "part"), "--classify", "a"]) == 2
    assert "does not hold the trained parameters that its settings name" in capsys.readouterr().err


# --- the command line ---


@pytest.mark.parametrize(
    "options, message",
    [
        ("--report_plot a.png", "--report_plot needs --report"),
        ("--classify a", "--classify needs --load_model"),
        ("--load_model a", "--load_model needs --classify"),
        ("--restart", "--restart needs --checkpoint"),
        ("--plot a.gif", '"a.gif" does not end in .png, .pdf, .svg'),
        ("--repeats 0", "0 is less than 1"),
        ("--repeats 2 --save_model a", "--save_model saves one classifier, --repeats trains several"),
        ("--checkpoint nowhere/a", "--checkpoint nowhere/a: there is no folder nowhere"),
        ("--checkpoint .", "--checkpoint . is a folder"),
        ("--checkpoint=", "--checkpoint is given without the name of a file"),
        ("--checkpoint a --save_model ./a", "--checkpoint and --save_model name the same file, ./a"),
        ("--plot results.csv.png --save_model results.csv", "--save_model and --results_file name the same file"),
        ("--checkpoint_minutes -1", "-1.0 is less than 0"),
        ("--report --row 3", "--row has no place beside --report"),
        ("--report --repeats 2", "--repeats has no place beside --report"),
        ("--report missing.csv", "missing.csv cannot be read: No such file or directory"),
        ("--load_model missing --classify a", "missing cannot be read as a saved classifier"),
    ],
)
def test_bad_options(options, message, capsys):
    assert ae.main(options.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and list(Path().iterdir()) == []


def test_pictures_need_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(ae.importlib.util, "find_spec", lambda name: None)
    assert ae.main(["--plot", "a.png"]) == 2
    assert "pictures need matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err


def test_report_and_pictures_from_the_command_line(options, capfd):
    assert ae.main([*options, "--plot", "run.png"]) == 0
    capfd.readouterr()
    with open("results.csv", "a") as file:
        file.write("cut off")
    assert ae.main(["--report", "--report_plot", "report.svg"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("| Row | Options |") and out.count("missing; ") == 19 * 4
    assert err == "results.csv: no whole record on line 3; left out\n"
    assert Path("run.png").stat().st_size > 10_000 and "<svg" in Path("report.svg").read_text()
