import signal

import pandas as pd
import pytest

import additional_experiments
import gpt_download

# A shell script starts what it puts into the background with Ctrl-C ignored, and children inherit that: without this
# line the tests of Ctrl-C would fail where the whole suite runs so.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sample_splits():
    return additional_experiments.balanced_splits(gpt_download.SAMPLE)


@pytest.fixture
def data_dir(tmp_path, sample_splits):
    """A folder with somebody's own three files: 43, 9 and 17 messages of at most 30 letters."""
    sizes = {"train": 43, "validation": 9, "test": 17}
    for split, size in sizes.items():
        frame = sample_splits[split].head(size)
        frame = pd.DataFrame({"Label": frame["Label"], "Text": frame["Text"].str[:30]})
        frame.to_csv(tmp_path / f"{split}.csv", index=None)
    return tmp_path


@pytest.fixture
def nano(data_dir):
    """Options of a run that takes a second: own data, the smallest model, one epoch."""
    options = ["--model_size", "gpt2-nano", "--weights", "random", "--device", "cpu", "--num_epochs", "1"]
    return [*options, "--data_dir", str(data_dir)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Each test runs in an empty folder of its own: a finished run writes its record where it was called."""
    monkeypatch.chdir(tmp_path_factory.mktemp("called_from"))
