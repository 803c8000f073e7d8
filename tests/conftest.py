import os
import signal
import sys
from collections import Counter

if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores: one thread each, and what they start too
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the processes that tests start

import pandas as pd
import pytest

import gpt_download
from previous_chapters import GPT_SIZES, TransformerBlock

# A shell script starts what it puts into the background with Ctrl-C ignored, and children inherit that: without this
# line the tests of Ctrl-C would fail where the whole suite runs so.
signal.signal(signal.SIGINT, signal.default_int_handler)

# For tests that run the whole program many times: most of its time at this size is not the model's.
TINY, TINY_SIZE = "gpt2-tiny (1M)", dict(emb_dim=16, n_layers=4, n_heads=4)


@pytest.fixture
def tiny_size(monkeypatch):
    monkeypatch.setitem(GPT_SIZES, TINY, TINY_SIZE)


@pytest.fixture(scope="session")
def sample_splits():
    return gpt_download.balanced_splits(gpt_download.SAMPLE)


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


@pytest.fixture
def quick(nano, tiny_size):
    """The options of `nano` with a model of width 16, which only this process knows."""
    return [option.replace("gpt2-nano", "gpt2-tiny") for option in nano]


@pytest.fixture
def options(quick):
    """The options of `quick` with two epochs of 43 batches: losses at steps 0 and 50."""
    return [*quick, "--num_epochs", "2", "--batch_size", "1"]


@pytest.fixture
def seen(monkeypatch):
    """How many messages each block has computed, from the first block to the last."""
    counts, forward = Counter(), TransformerBlock.forward

    def counting(block, x, *arguments):
        counts[block] += len(x)
        return forward(block, x, *arguments)

    monkeypatch.setattr(TransformerBlock, "forward", counting)
    return counts


@pytest.fixture(scope="session")
def nano_weights(tmp_path_factory):
    """The path of a weights file of the nano size, as transformers writes it."""
    from helpers import save_random_weights

    return save_random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Each test runs in an empty folder of its own: a finished run writes its record where it was called."""
    monkeypatch.chdir(tmp_path_factory.mktemp("called_from"))
