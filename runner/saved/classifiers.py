"""Trained classifiers on disk: the trained parameters, and what is needed to use them; the messages of --classify."""

import json
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
from safetensors.torch import save_file

from runner.data.csv_files import read_messages
from runner.data.predictions import predictions_table, to_csv
from runner.files import UserError, atomic_write, read_safetensors, refuse_damaged, sha256_of_tensors
from runner.wording import printable

# --- on disk ---

KIND = "classifier of additional_experiments.py, format 6"


@dataclass
class SavedClassifier:
    """What is needed, besides the trained parameters, to use a classifier again. It can be stored as JSON."""

    settings: dict  # of the Experiment, by name
    limit: int  # the number of tokens to which messages are cut, and padded unless padding is off
    class_names: list  # of the K classes
    base_sha256: str  # see `sha256_of_base`
    command: str  # the options that trained it
    data: str  # "uci", "sample" or "own"
    results: list  # lines on the run that trained it and its accuracies

    @property
    def needs_base(self):
        """Whether it has frozen weights; with `all`, the trained parameters are all there is."""
        return self.settings["trainable_layers"] != "all"

    def settings_with(self, given):
        """Return the settings for use, in which `given` {name: value} replaces weights and device."""
        own = self.settings | dict(context_length=self.limit, shard=False)
        if own["device"] != "cpu":  # this machine may have no such device
            own |= dict(device="auto", precision=own["precision"].replace("tf32", "fp32"))
        return own | given | ({} if self.needs_base else dict(weights="random"))

    def check_base(self, weights, classifier):
        """Raise UserError if a Classifier made from these Weights is not on those that this one was trained on."""
        if self.needs_base and sha256_of_base(weights, classifier) != self.base_sha256:
            raise UserError(f"--weights {weights.source}: the classifier was trained on other weights (by SHA-256)")


def sha256_of_base(weights, classifier):
    """Return the SHA-256 of the weights file, or of the frozen parameters if the weights are random."""
    frozen = {name: p for name, p in classifier.named_parameters() if not p.requires_grad}
    return weights.sha256 or sha256_of_tensors(frozen)


def save_classifier(path, saved, parameters):
    """Write a SavedClassifier and the trained parameters {name: tensor} as a .safetensors file.

    Raises OSError or SafetensorError.
    """
    parameters = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    with atomic_write(path) as temporary:
        metadata = dict(kind=KIND, description=json.dumps(asdict(saved)), sha256=sha256_of_tensors(parameters))
        save_file(parameters, temporary, metadata)


def read_classifier(path):
    """Return (SavedClassifier, {name: tensor}) from a file of `save_classifier`. Raises UserError for other files."""
    parameters, metadata = read_safetensors(path)
    if metadata.get("kind") != KIND:
        raise UserError(f"{path} was not written by --save_model of this version")
    if metadata.get("sha256") != sha256_of_tensors(parameters):
        raise UserError(f"{path} is damaged: its tensors do not have the SHA-256 that it states")
    with refuse_damaged(path):
        return SavedClassifier(**json.loads(metadata["description"])), parameters


def load_parameters(classifier, parameters):
    """Replace all trained parameters of a classifier on the CPU by {name: tensor}, which may be on any device.

    Raises RuntimeError for other names or shapes.
    """
    frozen = {name: p for name, p in classifier.named_parameters() if not p.requires_grad}
    trained = {name: tensor.cpu() for name, tensor in parameters.items()}
    classifier.load_state_dict(frozen | trained, assign=True)


# --- messages and answers ---

# Characters that would end a field or a line or control the terminal, and the backslash, by their escape sequences.
ESCAPES = {n: chr(n).encode("unicode_escape").decode() for n in (*range(32), 92, *range(127, 160), 0x2028, 0x2029)}


def classify(arguments, load):
    """Print the predictions for the arguments of `--classify`; `load()` returns the TrainedClassifier.

    Problems with the arguments are reported before it is loaded. Raises UserError.
    """
    file, chunks = file_of_texts(arguments), chunks_of_texts(arguments)
    classifier = load()
    if file is not None:
        classify_file(file, classifier)
        return
    for texts in chunks:
        labels, probabilities = classifier.predict([text for text in texts if text.strip()])
        print_answers(texts, labels, probabilities)


def file_of_texts(arguments):
    """Return the path of the CSV file that `--classify` names, or None. Raises UserError for a file among others.

    Arguments that are probably not meant as messages get a line of advice on standard error.
    """
    files = [argument for argument in arguments if os.path.isfile(argument)]
    tables = [file for file in files if file.lower().endswith((".csv", ".tsv"))]
    if tables and len(arguments) > 1:
        raise UserError(f"--classify {tables[0]}: a file is classified alone, without other messages")
    for file in [] if tables else files:
        advice = f"its name is classified, not its content; for its lines: --classify - < {printable(file)}"
        print(f"warning: {printable(file)} is a file; {advice}", file=sys.stderr)
    if len(arguments) == 1 and not files and arguments[0].lower().endswith((".csv", ".tsv")):
        raise UserError(f"--classify {printable(arguments[0])}: there is no such file")
    if not all(argument.strip() for argument in arguments):
        print("warning: a message is empty and gets no label; is a shell variable not set?", file=sys.stderr)
    return tables[0] if tables else None


def classify_file(path, classifier):
    """Print a table of predictions for the texts in a CSV file, as CSV. Blank texts get no label. Raises UserError."""
    columns = classifier.experiment.text_column, classifier.experiment.label_column
    frame, warnings = read_messages(path, *columns, is_labelled=False)
    for warning in warnings:
        print(f"warning: {path}: {warning}", file=sys.stderr)
    is_blank = (frame["Text"].str.strip() == "").to_numpy()
    probabilities = np.full((len(frame), len(classifier.class_names)), np.nan)
    probabilities[~is_blank] = classifier.predict(frame["Text"][~is_blank])[1].numpy()
    table = predictions_table(frame["Text"], frame["Label"], probabilities, classifier.class_names)
    table.loc[is_blank, "predicted"] = ""
    print(to_csv(table), end="", flush=True)


def chunks_of_texts(arguments):
    """Yield lists of the messages of `--classify`: all arguments, or the lines of standard input as they arrive.

    A message may be empty. Raises UserError for one that is not UTF-8.
    """
    given = [text.encode("utf-8", "surrogatepass") for text in arguments]
    if given == [b"-"] and sys.stdin is None:
        raise UserError("--classify -: standard input is closed")
    count = 0
    for lines in arriving_lines(sys.stdin.buffer) if given == [b"-"] else [given]:
        texts = []
        for count, line in enumerate(lines, count + 1):
            try:
                texts.append(line.decode("utf-8-sig"))  # a file may begin with a byte-order mark
            except UnicodeDecodeError:
                yield texts  # those before it
                raise UserError(f"message {count}: not UTF-8 text") from None
        yield texts


def arriving_lines(file):
    """Yield lists of the lines (bytes) of an open file: those that have arrived, at least one."""
    rest = b""
    while piece := file.read1():  # waits for the first byte only
        *lines, rest = (rest + piece).split(b"\n")
        if lines:
            yield [line.removesuffix(b"\r") for line in lines]
    if rest:
        yield [rest]


def print_answers(texts, labels, probabilities):
    """Print label, probability and message, separated by tabs, for each of `texts`.

    `labels` and `probabilities` (n, K) are those of the texts that are not blank; a blank one gets empty fields.
    """
    answers = zip(labels, probabilities.amax(-1).tolist(), strict=True)
    for text in texts:
        label, probability = next(answers) if text.strip() else ("", None)
        confidence = "" if probability is None else f"{probability:.4f}"
        print(label, confidence, text.translate(ESCAPES), sep="\t")
    sys.stdout.flush()
