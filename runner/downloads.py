"""Downloads over HTTP: whether a host can be reached, further attempts, checksums, errors in one line."""

import hashlib
import io
import socket
import threading
import time
from urllib.parse import urlsplit

import requests
from requests.utils import get_environ_proxies, select_proxy
from tqdm import tqdm

ATTEMPTS = 3
RETRY_AFTER = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two pieces of the answer
LARGEST_ARCHIVE = 50_000_000  # bytes; the collection has 203,415


def describe_error(error):
    """An error in one line: the innermost cause says why, outer exceptions add little."""
    while not isinstance(error, Unreachable) and (cause := error.__cause__ or error.__context__):
        error = cause
    name = "" if isinstance(error, Unreachable) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())


def retrying(attempt, give_up=()):
    """What `attempt()` returns, tried up to ATTEMPTS times; errors of the types in `give_up` are raised at once."""
    for retries_left in reversed(range(ATTEMPTS)):
        try:
            return attempt()
        except Exception as error:
            if retries_left == 0 or isinstance(error, give_up):
                raise
            time.sleep(RETRY_AFTER * 2 ** (ATTEMPTS - 1 - retries_left))


class PermanentError(requests.RequestException):
    """A response that a further attempt would not change."""


class Unreachable(ConnectionError):
    """There is no way to a host; the message says to which."""


REACHABLE_WITHIN = 4.0  # seconds to look up a host and to connect to one of its addresses


def check_reachable(url):
    """Raises Unreachable, within seconds, where neither the host of `url` nor its proxy can be reached at all.

    It spares a machine without a network the attempts of the clients, which take up to half a minute.
    """
    address = url
    try:
        if proxy := select_proxy(url, get_environ_proxies(url)):
            address = proxy if "://" in proxy else f"http://{proxy}"
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise Unreachable(f"{address} is not an address: {error}") from None
    if not host:
        raise Unreachable(f'"{address}" is not an address')
    name = f"the proxy {host}:{port}" if proxy else host
    failure = [TimeoutError(f"no answer within {REACHABLE_WITHIN:.0f} seconds")]

    def connect():
        try:  # half of the time for each address, since the first one may be dead
            socket.create_connection((host, port), timeout=REACHABLE_WITHIN / 2).close()
            failure.clear()
        except OSError as error:
            failure[:] = [error]

    thread = threading.Thread(target=connect, daemon=True)  # DNS lookups have no time-out
    thread.start()
    thread.join(REACHABLE_WITHIN)
    if failure:
        raise Unreachable(f"{name} cannot be reached: {describe_error(failure[0])}")


def content_length(response):
    """The size that a response announces, in bytes, or None."""
    sizes = {size.strip() for size in response.headers.get("Content-Length", "").split(",")}  # a proxy may repeat it
    return int(size) if len(sizes) == 1 and (size := sizes.pop()).isdigit() else None


def download(url, sha256, quiet=False):
    """The bytes behind `url`, whose SHA-256 must be `sha256`.

    Raises Unreachable, requests.RequestException or urllib3's HTTPError.
    """
    check_reachable(url)
    return retrying(lambda: download_once(url, sha256, quiet), give_up=PermanentError)


def download_once(url, sha256, quiet):
    """One attempt of `download`."""
    content = io.BytesIO()
    with requests.get(url, stream=True, timeout=TIMEOUT) as response:
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise PermanentError(f"{response.status_code} {response.reason}")
        response.raise_for_status()
        name, size = url.rsplit("/", 1)[-1], content_length(response)
        with tqdm(desc=name, total=size, unit="B", unit_scale=True, disable=quiet or None) as bar:
            for piece in response.iter_content(1 << 16):
                content.write(piece)
                bar.update(len(piece))
                if content.tell() > LARGEST_ARCHIVE:
                    raise PermanentError(f"more than {LARGEST_ARCHIVE:,} bytes")
    # Checked in each attempt: a corrupted download may succeed on the next attempt.
    if (found := hashlib.sha256(content.getvalue()).hexdigest()) != sha256:
        raise requests.RequestException(f"the file's SHA-256 is {found}, not {sha256}")
    return content.getvalue()
