"""A run's history, its record, and the file that holds it."""

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import made_up_record

from additional_experiments import Experiment, main, parse_args
from gpt_download import PRETRAINED, Weights, load_weights
from runner.data.datasets import Repeats, find_repeats
from runner.files import sha256_of
from runner.results.records import History, identify, read_records, write_record
from runner.rows import ROWS
from runner.wording import command_line

UCI = SimpleNamespace(name="uci", sha256="01234567" * 8)
OWN = SimpleNamespace(name="own", sha256="89abcdef" * 8)


def identity_of(experiment, data=UCI):
    size, source = experiment.model_size, experiment.weights
    weights = Weights(size, source, PRETRAINED[size].sha256) if source == "pretrained" else load_weights(source, size)
    return identify(experiment, data, weights)


def test_a_record_survives_its_file(tmp_path):
    history = History([0, 50], [1.0, 0.5], [1.0, 0.6], [[30, 40]], [[35, 40]], ["a line"])
    record = made_up_record([1, 2, 299], history=history, note="two\nlines \u2028 \x1b[1m")
    path = write_record(tmp_path / "new", record)
    assert path == tmp_path / "new" / f"{record.run}.json"
    [found], problems = read_records([path.parent])
    assert write_record(tmp_path / "again", found).read_bytes() == path.read_bytes() and problems == []
    assert (found.confusions, found.history) == (record.confusions, history)
    write_record(path.parent, replace(record, minutes=9.0))  # the same run again
    assert [found.minutes for found in read_records([path.parent])[0]] == [9.0]


DAMAGES = [lambda text: text[:-50], lambda text: b"\xff\xfe", lambda text: b"[1, 2]"]
DAMAGES += [lambda text: text.replace(b'"version": 2', b'"version": 1')]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_record_is_named_and_skipped(tmp_path, damage):
    good, bad = (write_record(tmp_path, made_up_record([1], seed=seed)) for seed in (1, 2))
    bad.write_bytes(damage(bad.read_bytes()))
    records, [problem] = read_records([tmp_path])
    assert [record.seed for record in records] == [1] and problem.startswith(f"{bad} is no record of a run (")
    assert problem.endswith("; skipped") and "\n" not in problem


def test_the_name_of_a_run_is_what_it_is():
    def name_of(*options, **changes):
        return identity_of(parse_args(["--row", "16", *options])[0], **changes)["run"]

    name = name_of()
    assert name.startswith("row16-seed123-") and len(name) == len("row16-seed123-") + 8
    same = ("--data_dir", "elsewhere"), ("--features", "off"), ("--device", "cpu"), ("--activation_checkpointing",)
    assert {name_of(*options) for options in same} == {name}
    from_python = Experiment(trainable_token_pos="flexible", seed=np.int64(123), weight_decay=np.float32(0.1))
    assert identity_of(from_python)["run"] == name
    others = [("--seed", "7"), ("--precision", "bf16"), ("--num_epochs", "2"), ("--learning_rate", "1e-4")]
    assert len({name, *(name_of(*options) for options in others), name_of(data=OWN)}) == 6
    demo = identity_of(parse_args(["--demo"])[0])
    assert demo["run"].startswith("gpt2-nano-random-weights-all-layers-lr-0.0005-sample-data-seed123-")


def test_each_row_is_one_command_and_known_by_its_options():
    for number, row in ROWS.items():
        experiment, *_ = parse_args(shlex.split(command_line(row.options)))
        as_text = {name: value if value is True else str(value) for name, value in row.options.items()}
        assert experiment == parse_args(["--row", str(number)])[0] == Experiment(**as_text)
        assert identity_of(experiment)["row"] == number
        assert identity_of(experiment, OWN)["row"] is identity_of(replace(experiment, num_epochs=2))["row"] is None


def test_weights_from_a_file_are_known_by_their_content(nano_weights):
    experiment, content = Experiment(model_size="nano", weights=nano_weights), sha256_of(nano_weights)
    of_file = identity_of(experiment)
    assert of_file["options"]["weights"] == f"model.safetensors {content[:8]}"
    moved = Weights(experiment.model_size, "elsewhere/model.safetensors", content)
    assert identify(experiment, UCI, moved) == of_file
    assert identify(experiment, UCI, replace(moved, sha256="0" * 64))["run"] != of_file["run"]
    experiment = Experiment(weights=nano_weights)
    copied = Weights(experiment.model_size, nano_weights, PRETRAINED[experiment.model_size].sha256)
    assert identify(experiment, UCI, copied)["row"] == 1  # the published ones under another name


def test_repeated_messages_are_found():
    texts = dict(train=["Win 500 NOW!", "ok", "1234"], validation=["no"], test=["win now", "ok", "??", "OK.", "ok", "1234"])
    splits = {split: pd.DataFrame(dict(Text=found, Label=0)) for split, found in texts.items()}
    splits["test"].loc[4, "Label"] = -100  # has no label, and is in no accuracy
    found = find_repeats(splits)
    assert found == dict(validation=Repeats(), test=Repeats((1, 5), (1, 3, 5)))
    splits["test"].loc[0, "Text"] = "WIN 900 now"
    assert find_repeats(splits)["test"] == Repeats((1, 5), (0, 1, 3, 5))


def test_a_finished_run_is_skipped(options, capfd):
    further = ["--results", "r", "--skip_finished", "--note", "first"]
    assert main([*options, *further]) == 0
    first = capfd.readouterr().out
    [path] = Path("r").iterdir()
    before = path.read_bytes()
    assert f"Wrote the record to {path}" in first and first.endswith("additional_experiments.py --report r\n")
    assert main([*options, *further]) == 0
    again = capfd.readouterr().out
    assert f"Finished before: {path}" in again and "Ep 1" not in again and path.read_bytes() == before
    assert all(line in first for line in again.splitlines() if line.startswith("| "))
    assert main([*options, *further, "--repeats", "2"]) == 0
    out = capfd.readouterr().out
    assert "Run 1 of 2, seed 123" in out and "Run 2 of 2, seed 124" in out and out.count("Training completed") == 1
    assert out.count("| CPU/GPU |") == 1 and "| -, n=2 |" in out and len(list(Path("r").iterdir())) == 2
    assert [record.note for record in read_records(["r"])[0]] == ["first"] * 2
    assert main([*options, *further, "--save_model", "m.safetensors"]) == 2
