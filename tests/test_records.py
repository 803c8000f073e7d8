"""A run's history, its record, and the file that holds it."""

import json
import shlex
import shutil
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import made_up_record

from additional_experiments import Experiment, main, parse_args
from gpt_download import PRETRAINED, Weights, load_weights
from runner.data.datasets import Duplicates, find_duplicates, normalized
from runner.files import sha256_of
from runner.results.page import render
from runner.results.records import History, identify, read_records, write_record
from runner.results.report import as_text, runs_as_csv
from runner.results.summary import summarize
from runner.rows import ROWS
from runner.wording import command_line

UCI = SimpleNamespace(name="uci", sha256="01234567" * 8)
OWN = SimpleNamespace(name="own", sha256="89abcdef" * 8)


def identity_of(experiment, data=UCI):
    size, source = experiment.model_size, experiment.weights
    weights = Weights(source, PRETRAINED[size].sha256) if source == "pretrained" else load_weights(source, size)
    return identify(experiment, data, weights)


def test_a_record_survives_its_file(tmp_path):
    history = History([0, 50], [1.0, 0.5], [1.0, 0.6], [[30, 40]], [[35, 40]], ["a line"])
    record = made_up_record([1, 2, 299], history=history, note="two\nlines \u2028 \x1b[1m")
    path = write_record(tmp_path / "new", record)
    assert path == tmp_path / "new" / f"{record.run_id}.json"
    [found], problems = read_records([path.parent])
    assert write_record(tmp_path / "again", found).read_bytes() == path.read_bytes() and problems == []
    assert (found.confusions, found.history) == (record.confusions, history)
    write_record(path.parent, replace(record, minutes=9.0))  # the same run again
    assert [found.minutes for found in read_records([path.parent])[0]] == [9.0]


def test_a_file_that_is_no_record_is_named_and_skipped(tmp_path):
    good, bad = (write_record(tmp_path, made_up_record([1], seed=seed)) for seed in (1, 2))
    content = bad.read_bytes()
    for damaged in (content[:-50], b"\xff\xfe", b"[1, 2]", b"[" * 100_000):
        bad.write_bytes(damaged)
        records, [problem] = read_records([tmp_path])
        assert [record.seed for record in records] == [1] and problem.startswith(f"{bad} is no record of a run (")
        assert problem.endswith("; skipped") and "\n" not in problem
    bad.write_bytes(content.replace(b'"version": 3', b'"version": 4'))
    assert "was written by a newer version" in read_records([tmp_path])[1][0]


def places_in(content, path=()):
    """Yield the path of every value in what JSON holds; of lists the first item only."""
    items = content.items() if isinstance(content, dict) else list(enumerate(content))[:1]
    for name, value in items:
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from places_in(value, (*path, name))


def with_value(content, path, value):
    """Return a copy of what JSON holds with another value at a path, or without the value if it is MISSING."""
    content = json.loads(json.dumps(content))
    inner = reduce(getitem, path[:-1], content)
    if value is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


MISSING = object()


SLOW = [pytest.param(None, id="null", marks=pytest.mark.slow), pytest.param(-7, id="number", marks=pytest.mark.slow)]


@pytest.mark.parametrize("damage", [pytest.param("text", id="text"), pytest.param(MISSING, id="missing"), *SLOW])
def test_a_record_with_one_damage_is_skipped_or_reported(tmp_path, damage):
    """A value that is missing or another, wherever it is, and every format of the report."""
    history = History([0, 50], [1.0, 0.5], [1.0, 0.6], [[30, 40]], [[35, 40]], ["a line"])
    options = dict(learning_rate=1e-3, model_size="gpt2-medium (355M)")
    whole = made_up_record([1, 2, 299], history=history, **options)
    others, n_skipped = [made_up_record([5], seed=7, **options), made_up_record([5], seed=7)], 0
    path = write_record(tmp_path, whole)
    content = json.loads(path.read_bytes())
    for place in places_in(content):
        path.write_text(json.dumps(with_value(content, place, damage)))
        records, problems = read_records([tmp_path])
        assert len(records) + len(problems) == 1
        n_skipped += len(problems)
        if records:
            summary = summarize(records + others)
            assert as_text(summary) and runs_as_csv(summary) and render(summary)
    assert n_skipped > 20


def test_records_are_in_the_order_of_time_in_any_time_zone(tmp_path):
    """Noon in Tokyo is before eight in London, though it is later as a text."""
    dates = ["2026-11-24T12:00:00+09:00", "2026-11-24T08:00:00+00:00", "2026-11-24T07:30:00-05:00"]
    for seed, date in zip((3, 1, 2), dates):
        write_record(tmp_path, made_up_record(date=date, seed=seed))
    assert [record.date for record in read_records([tmp_path])[0]] == dates


def test_the_name_of_a_run_is_what_it_is():
    def name_of(*options, **changes):
        return identity_of(parse_args(["--row", "16", *options])[0], **changes)["run_id"]

    name = name_of()
    assert name.startswith("row16-seed123-") and len(name) == len("row16-seed123-") + 8
    same = ("--data_dir", "elsewhere"), ("--features", "off"), ("--device", "cpu"), ("--activation_checkpointing",)
    assert {name_of(*options) for options in same} == {name}
    from_python = Experiment(trainable_token_pos="flexible", seed=np.int64(123), weight_decay=np.float32(0.1))
    assert identity_of(from_python)["run_id"] == name
    others = [("--seed", "7"), ("--precision", "bf16"), ("--num_epochs", "2"), ("--learning_rate", "1e-4")]
    assert len({name, *(name_of(*options) for options in others), name_of(data=OWN)}) == 6
    demo = identity_of(parse_args(["--demo"])[0])
    assert demo["run_id"].startswith("gpt2-nano-random-weights-all-layers-lr-0.0005-sample-data-seed123-")


def test_each_row_is_one_command_and_known_by_its_options():
    for number, row in ROWS.items():
        experiment, *_ = parse_args(shlex.split(command_line(row.options)))
        as_text = {name: value if value is True else str(value) for name, value in row.options.items()}
        assert experiment == parse_args(["--row", str(number)])[0] == Experiment(**as_text)
        assert identity_of(experiment)["row"] == number
        assert identity_of(experiment, OWN)["row"] is identity_of(replace(experiment, num_epochs=2))["row"] is None


def test_weights_from_a_file_are_known_by_their_content(nano_weights, tmp_path):
    experiment, content = Experiment(model_size="nano", weights=nano_weights), sha256_of(nano_weights)
    of_file = identity_of(experiment)
    assert of_file["options"]["weights"] == f"file {content[:8]}"
    renamed = shutil.copy(nano_weights, tmp_path / "another_name.safetensors")
    assert identity_of(replace(experiment, weights=renamed)) == of_file
    others = Weights(nano_weights, "0" * 64)
    assert identify(experiment, UCI, others)["run_id"] != of_file["run_id"]
    experiment = Experiment(weights=nano_weights)
    copied = Weights(nano_weights, PRETRAINED[experiment.model_size].sha256)
    assert identify(experiment, UCI, copied)["row"] == 1  # the published ones under another name


def test_repeated_messages_are_found():
    texts = dict(train=["Win 500 NOW!", "ok", "1234"], validation=["no"])
    texts["test"] = ["win now", "ok", "??", "OK.", "ok", "1234"]
    splits = {split: pd.DataFrame(dict(Text=found, Label=0)) for split, found in texts.items()}
    splits["test"].loc[4, "Label"] = -100  # has no label, and is in no accuracy
    assert find_duplicates(splits) == dict(validation=Duplicates(), test=Duplicates((1, 5), (0, 1, 3, 5)))


def test_messages_that_differ_in_case_numbers_or_punctuation_are_similar():
    """Marks and symbols make other messages."""
    same = [("call now - free", "call now free"), ("Win £500!", "win £9"), ("ＦＲＥＥ", "free"), ("Straße", "STRASSE")]
    for a, b in [*same, ("a_b", "ab"), ("№ ④", "no"), ("e\u0301te\u0301", "ÉTÉ")]:
        assert normalized(a) == normalized(b) != ""
    others = [("काम", "कम"), ("I love it 😂", "I love it 😡"), ("50 £", "50 $"), ("therapist", "the rapist")]
    assert not any(normalized(a) == normalized(b) for a, b in others)


def test_a_finished_run_is_skipped(options, capfd):
    further = ["--results", "my r", "--skip_finished", "--note", "first"]
    assert main([*options, *further]) == 0
    first = capfd.readouterr().out
    [path] = Path("my r").iterdir()
    before = path.read_bytes()
    assert f"Wrote the record to {path}" in first and first.endswith('additional_experiments.py --report "my r"\n')
    assert main([*options, *further]) == 0
    again = capfd.readouterr().out
    assert f"Finished before: {path}" in again and "Ep 1" not in again and path.read_bytes() == before
    assert all(line in first for line in again.splitlines() if line.startswith("| "))
    assert main([*options, *further, "--repeats", "2"]) == 0
    out = capfd.readouterr().out
    assert "Run 1 of 2, seed 123" in out and "Run 2 of 2, seed 124" in out and out.count("Training completed") == 1
    assert out.count("| CPU/GPU |") == 1 and "| -, n=2 |" in out and len(list(Path("my r").iterdir())) == 2
    assert [record.note for record in read_records(["my r"])[0]] == ["first"] * 2
    assert main([*options, *further, "--save_model", "m.safetensors"]) == 2
    path.write_text(path.read_text().replace('"no_padding": false', '"no_padding": true'))
    capfd.readouterr()
    assert main([*options, *further]) == 2
    assert f"error: {path} was changed: its settings are not those of this run" in capfd.readouterr().err
