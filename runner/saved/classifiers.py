"""Trained classifiers on disk: what training changed, and what is needed to use it; the messages of --classify."""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runner.files import UserError, atomic_write, require_finite, sha256_of_tensors

# --- on disk ---

KIND = "classifier of additional_experiments.py, format 2"


@dataclass
class SavedClassifier:
    """What is needed to use the trained parameters of a run again; JSON can hold it."""

    settings: dict  # the Experiment's, by name
    limit: int  # tokens to which messages are cut, and padded where they are
    class_names: list  # of the K classes
    base_sha256: str  # of the weights file under the trained parameters, or what `frozen_sha256` gives
    record: dict  # of the run that trained it

    def settings_with(self, given):
        """The settings for use, with the weights and the device that `given`, {name: value}, has in place of theirs.

        Raises UserError for another model size.
        """
        if (size := given.get("model_size", self.settings["model_size"])) != self.settings["model_size"]:
            raise UserError(f"--model_size {size}: the classifier was trained on {self.settings['model_size']}")
        changed = dict(context_length=self.limit, device="cpu" if self.settings["device"] == "cpu" else "auto")
        if self.settings["precision"] == "tf32":
            changed["precision"] = "fp32"  # the device may have no TF32
        if not self.needs_base:
            given = given | dict(weights="random")
        return self.settings | changed | given

    @property
    def needs_base(self):
        """Whether there are weights under the trained ones, or all were trained."""
        return self.settings["trainable_layers"] != "all"

    def check_base(self, weights, sha256):
        """Raises UserError if the `weights` given, with this SHA-256, are not those that it was trained on."""
        if self.needs_base and sha256 != self.base_sha256:
            raise UserError(f"--weights {weights}: the classifier was trained on other weights (by their SHA-256)")


def frozen_sha256(classifier):
    """SHA-256 of the parameters that are not trained: which random weights were drawn."""
    return sha256_of_tensors({name: p for name, p in classifier.named_parameters() if not p.requires_grad})


def save_classifier(path, saved, parameters):
    """Write a SavedClassifier and the trained parameters, {name: tensor}, as a .safetensors file. Raises OSError."""
    parameters = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(parameters, temporary, dict(kind=KIND, description=json.dumps(asdict(saved))))
        except SafetensorError as error:  # raised for a full disk and the like
            raise OSError(str(error)) from error


def read_classifier(path):
    """(SavedClassifier, {name: tensor}) of a file that `save_classifier` wrote. Raises UserError for any other."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parameters = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a saved classifier: {error}") from None
    if metadata.get("kind") != KIND:
        raise UserError(f"{path} was not written by --save_model of this version")
    require_finite(parameters, f"{path}: parameter")
    return SavedClassifier(**json.loads(metadata["description"])), parameters


@torch.no_grad()
def load_parameters(classifier, parameters):
    """Copy {name: tensor} into what `classifier` trains. Raises UserError unless all names and shapes are the same."""
    trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    expected, found = ({name: p.shape for name, p in group.items()} for group in (trained, parameters))
    if wrong := expected.items() ^ found.items():
        raise UserError(f"saved parameter {min(name for name, _ in wrong)} is missing, left over or of another shape")
    for name, parameter in trained.items():
        parameter.copy_(parameters[name])


# --- messages and answers ---


def chunks_of_texts(arguments):
    """The messages of `--classify` in lists: its arguments in one, the lines of standard input as they come.

    Raises UserError for arguments that cannot be used at once; for standard input see `chunks_of_lines`.
    """
    if list(arguments) == ["-"]:
        if sys.stdin is None:
            raise UserError("standard input is closed")
        return chunks_of_lines(sys.stdin.fileno())
    for number, text in enumerate(arguments, 1):
        if not text.strip():
            raise UserError(f"message {number}: the text is empty")
    return [arguments]


def chunks_of_lines(descriptor):
    """The lines of an open file, as text, in lists of what has arrived. A line may be empty.

    Raises UserError for a line that cannot be used, after those before it were given, and for a file without lines.
    """
    number = 0
    for lines in lines_as_they_come(descriptor):
        texts, problem = [], None
        for line in lines:
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text ({error.reason})"
            if problem:
                break
            texts.append(text)
        yield texts
        if problem:
            raise UserError(f"message {number}: {problem}")
    if number == 0:
        raise UserError("there is no message on standard input")


def lines_as_they_come(descriptor):
    """Lists of the lines (bytes) of an open file: each time those that have arrived, and at least one."""
    rest = b""
    while piece := os.read(descriptor, 1 << 16):  # waits for the first byte, and for no more
        *lines, rest = (rest + piece).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


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
