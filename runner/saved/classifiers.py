"""Trained classifiers on disk: what training changed, and all that is needed to use it again."""

import os
import queue
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from runner.data.datasets import problem_of_text
from runner.data.tensor_files import read_tensors, write_tensors
from runner.files import NonFiniteError, UserError, require_finite, sha256_of_tensors
from runner.machine.devices import resolve_device
from runner.results.records import Record

KIND, VERSION = "saved classifier", 1


def frozen_sha256(classifier):
    """SHA-256 of the parameters that are not trained, as they were drawn or read."""
    return sha256_of_tensors({name: p for name, p in classifier.named_parameters() if not p.requires_grad})


def save_classifier(path, experiment, data, base, parameters, record):
    """Write the trained parameters, {name: tensor}, what is needed to use them, and their Record. Raises OSError.

    `base` is the SHA-256 of the weights file under them, or what `frozen_sha256` gives for weights that were drawn.
    """
    description = dict(
        settings=asdict(experiment),
        width=data.limit,
        labels=data.class_names,
        base_sha256=base,
        torch=torch.__version__,
        record=record.to_dict(),
    )
    write_tensors(path, KIND, VERSION, description, parameters)


@dataclass
class SavedClassifier:
    """What `save_classifier` wrote."""

    path: str
    settings: dict  # of the Experiment, by name; the context length is the number of tokens it came to
    class_names: list  # of the K classes
    base_sha256: str
    parameters: dict  # {name: tensor}
    record: Record | None = None  # of the run that trained it; None: of an earlier version, which kept none

    @property
    def needs_base(self):
        """Whether there are weights under the trained ones, or all were trained."""
        return self.settings["trainable_layers"] != "all"

    def settings_with(self, given):
        """The settings, with the model size, weights and device that `given`, {name: value}, has in place of theirs.

        TF32 becomes float32 where the device has none. Raises UserError for another model size, for a weights file
        that is not there, and for a device that is not.
        """
        if (size := given.get("model_size", self.settings["model_size"])) != self.settings["model_size"]:
            raise UserError(f"--model_size {size}: {self.path} was trained on {self.settings['model_size']}")
        base = given.get("weights", self.settings["weights"]) if self.needs_base else "random"
        if base not in ("pretrained", "random") and not Path(base).is_file():
            raise UserError(f"{self.path} was trained on {base}, which does not exist; use --weights FILE")
        device, _ = resolve_device(given.get("device", "cpu" if self.settings["device"] == "cpu" else "auto"))
        precision = self.settings["precision"]
        if precision == "tf32" and device.type != "cuda":
            precision = "fp32"
        return self.settings | dict(weights=base, device=device.type, precision=precision)

    def check_base(self, weights, sha256):
        """Raises UserError if the `weights` given, with this SHA-256, are not those that it was trained on."""
        if self.needs_base and sha256 != self.base_sha256:
            raise UserError(f"--weights {weights}: {self.path} was trained on other weights (by their SHA-256)")

    @torch.no_grad()
    def restore(self, classifier):
        """Copy the trained parameters into a Classifier of the same settings. Raises UserError for other ones."""
        trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        if {name: p.shape for name, p in trained.items()} != {name: p.shape for name, p in self.parameters.items()}:
            raise UserError(f"{self.path} does not hold the trained parameters that its settings name")
        for name, parameter in trained.items():
            parameter.copy_(self.parameters[name])


def read_classifier(path):
    """The SavedClassifier at `path`. Raises UserError for a file that cannot be used."""
    description, parameters = read_tensors(path, KIND, VERSION)
    try:
        require_finite(parameters, "parameter")
    except NonFiniteError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    settings = description["settings"] | dict(context_length=description["width"])
    record = Record.from_dict(description["record"]) if "record" in description else None
    return SavedClassifier(path, settings, description["labels"], description["base_sha256"], parameters, record)


def chunks_of_texts(arguments, size, seconds):
    """The messages of `--classify`, its arguments or the lines of standard input, in lists of at most `size`.

    Raises UserError for arguments that cannot be used; for standard input see `chunks_of_lines`.
    """
    if list(arguments) == ["-"]:
        if sys.stdin is None:
            raise UserError("standard input is closed")
        return chunks_of_lines(sys.stdin.fileno(), size, seconds)
    for number, text in enumerate(arguments, 1):
        if not text.strip():
            raise UserError(f"message {number} is empty")
        if problem := problem_of_text(text):
            raise UserError(f"message {number}: {problem}")
    return [arguments[start : start + size] for start in range(0, len(arguments), size)]


def chunks_of_lines(descriptor, size, seconds):
    """The lines of a file as they come: lists of at most `size`, of what has come within `seconds` of the first.

    A line may be empty: each has its line of output. Raises UserError for one that cannot be used, after those before
    it were given, and for a file without lines.
    """
    n_given = 0
    for lines in lines_in_time(descriptor, size, seconds):
        texts, problem = [], None
        for number, line in enumerate(lines, n_given + 1):
            try:
                texts.append(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
                problem = problem_of_text(texts[-1])
            except UnicodeDecodeError as error:
                texts.append(None)
                problem = f"not UTF-8 text ({error.reason})"
            if problem:
                break
        n_given += len(texts)
        yield texts[:-1] if problem else texts
        if problem:
            raise UserError(f"message {n_given}: {problem}")
    if n_given == 0:
        raise UserError("there is no message on standard input")


def lines_in_time(descriptor, size, seconds):
    """Lists of at most `size` lines (bytes) of a file; each is given `seconds` after its first line, or sooner.

    Raises OSError where the file cannot be read.
    """
    lines, failures = queue.Queue(maxsize=2 * size), []  # a fast writer waits
    threading.Thread(target=read_lines, args=(descriptor, lines, failures), daemon=True).start()
    while (line := next_line(lines)) is not None:
        chunk, end = [line], time.monotonic() + seconds
        with suppress(queue.Empty):
            while len(chunk) < size and (line := lines.get(timeout=max(end - time.monotonic(), 0))) is not None:
                chunk.append(line)
        yield chunk
        if line is None:
            break
    if failures:
        raise failures[0]


def next_line(lines):
    """The next entry of a queue, however long it takes."""
    while True:
        with suppress(queue.Empty):
            return lines.get(timeout=1)  # without a time-out Windows would not see Ctrl-C


def read_lines(descriptor, lines, failures):
    """Put the lines of a file into a queue, and None at its end; an exception that was the end goes to `failures`."""
    try:
        if hasattr(os, "set_blocking"):
            os.set_blocking(descriptor, True)  # a parent may have left it otherwise, which would look like the end
        # A file object of its own: Python's, which it closes at the end of the program, must not be in use then.
        with open(descriptor, "rb", closefd=False) as file:
            for line in file:
                lines.put(line)
    except Exception as error:
        failures.append(error)
    lines.put(None)


def escape(text):
    """A text as one field of one line: backslashes, tabs, line breaks and other control characters escaped."""
    return re.sub(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda m: m[0].encode("unicode_escape").decode(), text)


def print_answers(texts, probabilities, class_names):
    """Print label, probability and message, separated by tabs, for each of `texts`.

    probabilities (n, K) are those of the texts that are not empty; an empty one gets an empty label and probability.
    """
    answers = zip(*(part.tolist() for part in probabilities.max(-1)))
    for text in texts:
        if text.strip():
            probability, best = next(answers)
            print(class_names[best], f"{probability:.4f}", escape(text), sep="\t")
        else:
            print("", "", escape(text), sep="\t")
    sys.stdout.flush()
