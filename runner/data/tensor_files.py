"""Files of tensors, `.safetensors` with a description and a checksum: checkpoints and saved classifiers."""

import json

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runner.files import UserError, atomic_write, sha256_of_tensors


def write_tensors(path, kind, version, description, tensors):
    """Write named tensors and a description (anything JSON can hold) as a .safetensors file, whole or not at all.

    `kind` says what the file is, `version` the version of that kind's format. Raises OSError.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = dict(kind=kind, format=str(version), description=json.dumps(description))
    metadata["sha256"] = sha256_of_tensors(tensors, *metadata.values())
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # raised for a full disk and the like
            raise OSError(str(error)) from error


def read_tensors(path, kind, version):
    """(description, tensors) of a file that `write_tensors` wrote. Nothing in it can run code.

    Raises UserError for a file that is damaged, of another kind or of another version of the format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a {kind}: {error}") from None
    check_kind(path, metadata, kind, version)
    check_sha256(path, metadata, sha256_of_tensors(tensors, kind, str(version), metadata.get("description")))
    return json.loads(metadata["description"]), tensors


def check_kind(path, metadata, kind, version):
    """Raises UserError for a file of another kind or format, according to its metadata."""
    if metadata.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} of this program")
    if metadata.get("format") != str(version):
        raise UserError(f"{path} is a {kind} in format {metadata.get('format')}; this program reads format {version}")


def check_sha256(path, metadata, sha256):
    """Raises UserError for a file whose content has another SHA-256 than its metadata say."""
    if metadata.get("sha256") != sha256:
        raise UserError(f"{path} is damaged: its SHA-256 differs from the one that it was written with")
