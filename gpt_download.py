"""External files: GPT-2's weights, the SMS Spam Collection, the vocabulary.

    python gpt_download.py [--model_size small ...] [--data_dir DIR]    # fetch and check what runs need, nothing else

Each file is fetched from a pinned address, verified by its SHA-256 and opened. A download that fails raises a
`UserError` of status 1, which says what was asked for, why it failed and what to try; a file with unexpected
content raises one of status 2. No partial file stays behind.
"""

import argparse
import base64
import hashlib
import io
import os
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import huggingface_hub
import pandas as pd
import requests
import tiktoken
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from previous_chapters import GPT_SIZES, GPTConfig, GPTModel, WeightsError, is_mask, load_gpt2_weights
from runner.files import NonFiniteError, UserError, read_safetensors, require_finite, sha256_of, write_bytes

# --- what is fetched, and from where ---


@dataclass(frozen=True)
class HubFile:
    """A file of the Hugging Face hub at one revision."""

    repo_id: str
    revision: str
    sha256: str
    filename: str = "model.safetensors"


PRETRAINED = {
    "gpt2-small (124M)": HubFile(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium (355M)": HubFile(
        "openai-community/gpt2-medium",
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large (774M)": HubFile(
        "openai-community/gpt2-large",
        "32b71b12589c2f8d625668d2335a01cac3249519",
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "gpt2-xl (1558M)": HubFile(
        "openai-community/gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}

COLLECTION_URLS = (
    "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip",
)
COLLECTION_ZIP_SHA256 = "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3"
COLLECTION_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"
COLLECTION_MEMBER = "SMSSpamCollection"
COLLECTION_NAMES = (COLLECTION_MEMBER, COLLECTION_MEMBER + ".tsv")  # the second is the public original's name

DATA = Path(__file__).resolve().parent / "data"
VOCABULARY = DATA / "r50k_base.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
SAMPLE = DATA / "sms_sample.tsv"
SAMPLE_SHA256 = "256fc13f88349059fe708ccf792b1a77cd1c6c4bafbf951a16ba5ec2a1eb2662"


# --- fetching ---

# With these, a server that accepts connections but never answers costs less than a minute: 3 attempts at each of 2
# addresses for the collection; for the weights 6 attempts of the hub's client, a second apart.
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 8  # seconds: to connect to one address of a host, and without a byte


def announce(what):
    """Print what is being downloaded, before the wait for the server begins."""
    print(f"Downloading {what} (without an answer this ends within a minute)", file=sys.stderr, flush=True)


def describe_error(error):
    """Return an error in one line: that of its innermost cause, to which the outer exceptions add little."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(f"{type(error).__name__}: {error}".split())


def download(url, sha256):
    """Return the bytes behind `url`, whose SHA-256 must be `sha256`. Raises requests.RequestException."""
    announce(url)
    retry = Retry(
        total=2,
        connect=0,  # without a network this fails within seconds
        backoff_factor=0.5,  # seconds before the second retry
        status_forcelist=(408, 429, 500, 502, 503, 504),
        respect_retry_after_header=False,  # it may ask for hours
    )
    with requests.Session() as session:
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        response = session.get(url, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    response.raise_for_status()
    if (found := hashlib.sha256(response.content).hexdigest()) != sha256:
        raise requests.RequestException(f"the file's SHA-256 is {found}, not {sha256}")
    return response.content


def fetch_collection(data_dir):
    """Return the path of the SMS Spam Collection in the folder `data_dir`, after downloading it if it is missing.

    Raises UserError if another file has its name or if the download fails, and OSError.
    """
    for name in COLLECTION_NAMES:
        if (path := Path(data_dir, name)).exists():
            if sha256_of(path) != COLLECTION_SHA256:
                raise UserError(f"{path} is not the SMS Spam Collection; remove it to have the collection downloaded")
            return path

    path, reasons = Path(data_dir, COLLECTION_MEMBER), []
    for url in COLLECTION_URLS:
        try:
            archive = download(url, COLLECTION_ZIP_SHA256)
        except requests.RequestException as error:
            reasons.append(f"  {url}: {describe_error(error)}\n")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, zipfile.ZipFile(io.BytesIO(archive)).read(COLLECTION_MEMBER))
        return path
    raise UserError(
        f"the SMS Spam Collection could not be downloaded:\n{''.join(reasons)}"
        "Try: the same command later; --dataset sample or --demo, which need no network; or download the zip\n"
        f"by other means and put its member {COLLECTION_MEMBER} at {path}",
        status=1,
    )


def fetch_weights(model_size, quiet=False):
    """Return (path, `size_and_time`) of pretrained weights in the Hugging Face cache, downloaded if they are missing.

    The client of the hub downloads, with its cache, retries and settings (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE). Raises
    UserError if the download fails or the file is not the pinned one.
    """
    file = PRETRAINED[model_size]
    where = dict(repo_id=file.repo_id, filename=file.filename, revision=file.revision)
    if quiet:
        disable_progress_bars()
    hub_logging.set_verbosity_error()  # failures are reported once, below
    if "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ:
        constants.HF_HUB_DOWNLOAD_TIMEOUT = READ_TIMEOUT
    # Plain HTTP: the Xet client has no time-out that would bound a stalled download (huggingface/xet-core, issue 898).
    constants.HF_HUB_DISABLE_XET = True
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(**where), str):
            announce(f"{file.filename} of {file.repo_id} from {constants.ENDPOINT}")
            # Asked first, since the client waits six minutes for a silent server. Other errors it reports better.
            with suppress(HfHubHTTPError):
                url = huggingface_hub.hf_hub_url(**where)
                huggingface_hub.get_hf_file_metadata(url, token=False, timeout=READ_TIMEOUT)
        # The repositories are public, so the server behind HF_ENDPOINT does not need the user's token.
        path = Path(huggingface_hub.hf_hub_download(**where, token=False))
        # A file from the cache is verified too: a run that was killed here may have left it unverified.
        stat = size_and_time(path)
        if (found := sha256_of(path)) == file.sha256:
            return path, stat
        path.resolve().unlink()  # the cache's blob
        path.unlink(missing_ok=True)
        reason = f"the file's SHA-256 is {found}, not {file.sha256}; it was removed from the cache"
    except Exception as error:  # of the client, its HTTP library or the system
        reason = describe_error(error)
    raise UserError(
        f"{file.filename} of {file.repo_id} at revision {file.revision} could not be downloaded\n"
        f"  from {constants.ENDPOINT}: {reason}\n"
        "Try: the same command later; HF_ENDPOINT=URL for a mirror of the hub; --weights FILE for a file that was\n"
        "downloaded by other means; --weights random, or --demo, which needs no network",
        status=1,
    )


# --- weights ---


@dataclass(frozen=True)
class Weights:
    """The weights from which a classifier starts: random ones, or those of a file."""

    source: str  # "random", "pretrained" or the path of a file
    sha256: str | None = None  # of the file; None for random weights, as are the following
    tensors: dict | None = None  # {name: tensor}, memory-mapped
    path: Path | None = None
    stat: tuple | None = None  # `size_and_time` before the file was hashed

    @property
    def is_random(self):
        return self.source == "random"

    def require_unchanged(self):
        """Raise UserError if the file was changed since it was hashed: results may come from other weights."""
        if self.path is not None and size_and_time(self.path) != self.stat:
            raise UserError(f"the weights file {self.path} was changed while this run used it", status=1)


def is_published(model_size, sha256):
    """Return whether a file with this SHA-256 holds the pretrained weights of a model size."""
    return model_size in PRETRAINED and sha256 == PRETRAINED[model_size].sha256


def size_and_time(path):
    """Return the size of a file and the time of its last change in nanoseconds."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def load_weights(source, model_size, quiet=False):
    """Return the Weights that `source`, the value of --weights, names; the pretrained ones are downloaded if need be.

    Raises UserError if the download fails, if the file cannot be read, or if its tensors do not fit the model.
    """
    if source == "random":
        return Weights(source)
    if source == "pretrained":
        path, stat = fetch_weights(model_size, quiet)
        return Weights(source, PRETRAINED[model_size].sha256, read_safetensors(path)[0], path, stat)
    path, stat = Path(source), size_and_time(source)
    tensors, _ = read_safetensors(path)
    try:
        require_finite({name: tensor for name, tensor in tensors.items() if not is_mask(name)}, "tensor")
        with torch.device("meta"):
            load_gpt2_weights(GPTModel(GPTConfig(**GPT_SIZES[model_size])), tensors)
    except (NonFiniteError, WeightsError) as error:
        raise UserError(f"--weights {source} cannot be used as {model_size}: {error}") from None
    return Weights(source, sha256_of(path), tensors, path, stat)


# --- the collection ---

SPLITS = {"train": "Training", "validation": "Validation", "test": "Test"}
DEFAULT_DATA_DIR = "sms_spam_collection"

# The splits of the collection as they are written to --data_dir. Files with other sums are the user's own data.
UCI_SPLITS_SHA256 = {
    "train": "ec2895b026553ce06475815818c52cf44828af0605b07b257935a194e611195a",
    "validation": "f92996ef2ae2ed6d6937e96bc7a3f739f2bae59b07d1babd7f3725e473f2d2bd",
    "test": "f82216f37a6d785b52f99a84a3552dcc9835316018758c2117b2ca133e6c1409",
}


def make_uci_splits(data_dir):
    """Return the splits of the collection, {split: DataFrame with columns Label and Text}, after fetching it if needed.

    They are written to the folder `data_dir` if that is possible; existing files are kept. Raises UserError.
    """
    splits = balanced_splits(fetch_collection(data_dir))
    contents = {split: frame.to_csv(index=None, lineterminator="\n").encode() for split, frame in splits.items()}
    if {split: hashlib.sha256(content).hexdigest() for split, content in contents.items()} != UCI_SPLITS_SHA256:
        raise UserError(f"pandas {pd.__version__} splits the collection differently; see requirements.txt")
    with suppress(OSError):  # in a read-only folder they are made again each time, which takes a second
        for split, content in contents.items():
            if not os.path.lexists(path := Path(data_dir, f"{split}.csv")):
                write_bytes(path, content)
    return splits


def balanced_splits(path):
    """Return splits of 70, 10 and 20% of the spam and as much ham from a collection (lines of label, tab, text).

    Seeds and order of the shuffles are those of the public original. So are the rules for quotes: those of CSV, which
    join a few messages that begin with a quote with the ones after them.
    """
    messages = pd.read_csv(path, sep="\t", header=None, names=["Label", "Text"])
    spam, ham = (messages[messages["Label"] == label] for label in ("spam", "ham"))
    balanced = pd.concat([ham.sample(len(spam), random_state=123), spam])
    for _ in range(2):
        balanced = balanced.sample(frac=1, random_state=123).reset_index(drop=True)
    balanced["Label"] = balanced["Label"].map({"ham": 0, "spam": 1})
    train_end = int(0.7 * len(balanced))
    validation_end = train_end + int(0.1 * len(balanced))
    parts = balanced[:train_end], balanced[train_end:validation_end], balanced[validation_end:]
    return dict(zip(SPLITS, parts))


# --- the vocabulary and the sample ---


def check_unchanged(path, sha256):
    """Return the path of a file of the project. Raises UserError if it was changed."""
    if sha256_of(path) != sha256:
        raise UserError(f"{path} was changed: its SHA-256 is not {sha256}")
    return path


@cache
def load_vocabulary():
    """Return GPT-2's byte-pair encoding (tiktoken.Encoding). Raises UserError if its file in data/ was changed."""
    lines = check_unchanged(VOCABULARY, VOCABULARY_SHA256).read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    # The pattern that splits a text into words before merging: letters, digits or other signs, with at most one space
    # before them, and English contractions (Radford et al. 2019, section 2.2).
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


# --- python gpt_download.py ---


def main(argv=None):
    """Fetch and check what runs need, print where it is, and return the exit status."""
    sizes = {name.split(" ")[0].removeprefix("gpt2-"): name for name in PRETRAINED}
    parser = argparse.ArgumentParser(description="Fetch and check what runs need, and do nothing else.")
    parser.add_argument("--model_size", nargs="+", choices=sizes, default=["small"], help="default: small")
    parser.add_argument("--data_dir", default=DEFAULT_DATA_DIR, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        os.makedirs(args.data_dir, exist_ok=True)
        paths = {split: Path(args.data_dir, f"{split}.csv") for split in SPLITS}
        if not all(path.exists() for path in paths.values()):
            make_uci_splits(args.data_dir)
        for split, path in paths.items():
            if path.exists() and sha256_of(path) != UCI_SPLITS_SHA256[split]:  # a read-only folder may have none
                advice = "your own data is checked by the run that reads it; call this without --data_dir"
                raise UserError(f"{path} is no split of the SMS Spam Collection (by its SHA-256); {advice}")
        print(f"{args.data_dir}: the three splits of the SMS Spam Collection, with the right SHA-256")
        for size in args.model_size:
            print(fetch_weights(sizes[size])[0])
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "status", 1)


if __name__ == "__main__":
    sys.exit(main())
