"""Everything that comes from elsewhere: GPT-2's weights, the SMS Spam Collection, the vocabulary.

Each is fetched from a pinned address, verified by its SHA-256 and opened. What cannot be had raises
`FetchError`, whose message names what was asked for, why it failed and the ways on; a file that is there but
is not what it should be raises `FileError`. Nothing half-written stays behind.
"""

import glob
import hashlib
import io
import os
import shutil
import tempfile
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import requests
import tiktoken
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError, safe_open
from tiktoken.load import load_tiktoken_bpe
from tqdm import tqdm


class FetchError(RuntimeError):
    """Something could not be fetched."""


class FileError(ValueError):
    """A file is damaged, or is not the file that it should be."""


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
        repo_id="openai-community/gpt2",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium (355M)": HubFile(
        repo_id="openai-community/gpt2-medium",
        revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        sha256="fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large (774M)": HubFile(
        repo_id="openai-community/gpt2-large",
        revision="32b71b12589c2f8d625668d2335a01cac3249519",
        sha256="5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "gpt2-xl (1558M)": HubFile(
        repo_id="openai-community/gpt2-xl",
        revision="15ea56dee5df4983c59b2538573817e1667135e2",
        sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
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

ATTEMPTS = 3
RETRY_AFTER = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two pieces of the answer
LARGEST_ARCHIVE = 50_000_000  # bytes; the collection has 203,415


# --- fetching ---


def retrying(attempt, give_up=()):
    """What `attempt()` returns, tried up to ATTEMPTS times; errors of the kinds in `give_up` are final at once."""
    for retries_left in reversed(range(ATTEMPTS)):
        try:
            return attempt()
        except Exception as error:
            if retries_left == 0 or isinstance(error, give_up):
                raise
            time.sleep(RETRY_AFTER * 2 ** (ATTEMPTS - 1 - retries_left))


class FinalAnswer(requests.RequestException):
    """An answer that a further attempt would not change."""


def download(url, sha256, progress=False):
    """The bytes behind `url`, whose SHA-256 must be `sha256`. Raises requests.RequestException."""

    def attempt():
        content = io.BytesIO()
        with requests.get(url, stream=True, timeout=TIMEOUT) as answer:
            if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
                raise FinalAnswer(f"{answer.status_code} {answer.reason}")
            answer.raise_for_status()
            size = int(answer.headers.get("Content-Length", 0)) or None
            with tqdm(desc=url.rsplit("/", 1)[-1], total=size, unit="B", unit_scale=True, disable=not progress) as bar:
                for piece in answer.iter_content(1 << 16):
                    content.write(piece)
                    bar.update(len(piece))
                    if content.tell() > LARGEST_ARCHIVE:
                        raise FinalAnswer(f"more than {LARGEST_ARCHIVE:,} bytes")
        # Checked inside the attempt: what a proxy or a cut connection garbled may come whole the next time.
        if (found := hashlib.sha256(content.getvalue()).hexdigest()) != sha256:
            raise requests.RequestException(f"the file's SHA-256 is {found}, not {sha256}")
        return content.getvalue()

    return retrying(attempt, give_up=FinalAnswer)


def fetch_collection(data_dir, progress=False):
    """Path of the SMS Spam Collection in the folder `data_dir`, downloaded if it is not there.

    Raises FileError if a file of its name is there and is another, FetchError if it cannot be had.
    """
    for name in COLLECTION_NAMES:
        if (path := Path(data_dir, name)).exists():
            if not path.is_file() or sha256_of(path) != COLLECTION_SHA256:
                raise FileError(
                    f"{path} is not the SMS Spam Collection: its SHA-256 is not {COLLECTION_SHA256}; remove it to have "
                    "the collection downloaded"
                )
            return path

    path = Path(data_dir, COLLECTION_MEMBER)
    check_writable(path.parent)
    reasons = []
    for url in COLLECTION_URLS:
        try:
            archive = download(url, COLLECTION_ZIP_SHA256, progress)
        except requests.RequestException as error:
            reasons.append(f"  {url}: {reason(error)}")
            continue
        write_whole(path, zipfile.ZipFile(io.BytesIO(archive)).read(COLLECTION_MEMBER))
        return path
    raise FetchError(
        "\n".join(
            [
                "the SMS Spam Collection could not be downloaded:",
                *reasons,
                "Ways on: try again later; use --dataset sample (or --demo), which needs no network; or fetch the zip",
                f"by other means and put its member {COLLECTION_MEMBER} at {path}",
            ]
        )
    )


def fetch_weights(model_size, progress=False):
    """Path of the pretrained weights of `model_size` in the Hugging Face cache, downloaded if not there.

    The hub's client does the work, so that its cache and its settings (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE)
    hold. Raises FetchError if the file cannot be had or is not the one that is pinned.
    """
    file = PRETRAINED[model_size]
    where = dict(repo_id=file.repo_id, filename=file.filename, revision=file.revision)
    if not progress:
        disable_progress_bars()
    try:
        path = Path(
            retrying(
                lambda: huggingface_hub.hf_hub_download(**where),
                # Entries "not found" are also those that the client, offline or after seven attempts, did not reach.
                give_up=(EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError),
            )
        )
        # Also of a file that was in the cache: a run that was killed here may have left it unverified.
        if (found := sha256_of(path)) != file.sha256:
            path.resolve().unlink()  # the cache's blob
            path.unlink(missing_ok=True)
            raise FileError(f"the file's SHA-256 is {found}, not {file.sha256}; it was removed from the cache")
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        raise FetchError(
            f"{file.filename} of {file.repo_id} at revision {file.revision} could not be downloaded\n"
            f"  from {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}: {reason(error)}\n"
            "Ways on: try again later; set HF_ENDPOINT to a mirror of the hub; fetch the file by other means and\n"
            "give its path as --weights FILE; use --weights random, or --demo, which needs no network"
        ) from error
    return path


def reason(error):
    """An error in one line: the innermost cause says why, what is wrapped around it says little."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(f"{type(error).__name__}: {error}".split())


# --- files ---


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder):
    """Make `folder` if it is not there. Raises FetchError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FetchError(
            f"nothing can be written into {folder} ({error.strerror or error})\n"
            "Ways on: name another folder with --data_dir, or use --dataset sample"
        ) from error


@contextmanager
def written_whole(path):
    """A path to write to, whose file takes the place of `path` at the end, flushed to disk; after an error it does not.

    It lies in a folder beside `path` that a process which is killed leaves behind, and a later one clears away.
    """
    path = Path(path).resolve()  # of a link the file that it points to is replaced
    for left_over in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if not is_running(left_over.suffixes[-2][1:]):
            shutil.rmtree(left_over, ignore_errors=True)
    folder = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir()
        yield folder / path.name
        with open(folder / path.name, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(folder / path.name, 0o666 & ~umask)  # some writers make files that nobody else may read
        os.replace(folder / path.name, path)
        if os.name == "posix":  # the new name is to outlast a power failure too
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_running(pid):
    """Whether another process of this number may be running; where that cannot be told, as on Windows, it may."""
    if os.name != "posix" or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return int(pid) != os.getpid()


def write_whole(path, content):
    """Write `content` (bytes) to `path` so that the file is there whole or not at all, whatever happens meanwhile."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


# --- opening ---


def open_weights(path):
    """The tensors of a `.safetensors` file by name, memory-mapped: nothing is read until a tensor is used.

    Raises FileError for a file that is missing, truncated or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read as a .safetensors file: {reason(error)}") from error


def load_vocabulary():
    """GPT-2's byte-pair encoding, from the file that the project carries. Raises FileError if it is not as it was."""
    # The file itself is looked at too, because tiktoken's loader may read its cache's copy instead.
    if not VOCABULARY.is_file() or sha256_of(VOCABULARY) != VOCABULARY_SHA256:
        raise FileError(f"the vocabulary {VOCABULARY} is missing or changed: its SHA-256 is not {VOCABULARY_SHA256}")
    ranks = load_tiktoken_bpe(str(VOCABULARY), expected_hash=VOCABULARY_SHA256)
    # The pattern that cuts text into words before merging: letters, digits or other signs with at most one
    # space before them, English contractions apart (Radford et al. 2019, section 2.2).
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def sample_path():
    """Path of the sample of messages that the project carries. Raises FileError if it is not as it was."""
    if not SAMPLE.is_file() or sha256_of(SAMPLE) != SAMPLE_SHA256:
        raise FileError(f"the sample {SAMPLE} is missing or changed: its SHA-256 is not {SAMPLE_SHA256}")
    return SAMPLE
