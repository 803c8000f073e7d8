"""Trained classifiers on disk: what training changed, and what is needed to use it; the messages of --classify."""

import json
import sys
from dataclasses import asdict, dataclass

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runner.files import UserError, atomic_write, sha256_of_tensors

# --- on disk ---

KIND = "classifier of additional_experiments.py, format 4"


@dataclass
class SavedClassifier:
    """What is needed to use the trained parameters of a run again; JSON can hold it."""

    settings: dict  # the Experiment's, by name
    limit: int  # tokens to which messages are cut, and padded where they are
    class_names: list  # of the K classes
    base_sha256: str  # of the weights file under the trained parameters, or what `frozen_sha256` gives
    record: dict  # of the run that trained it

    @property
    def needs_base(self):
        """Whether there are weights under the trained ones, or all were trained."""
        return self.settings["trainable_layers"] != "all"

    def settings_with(self, given):
        """The settings for use, with the weights and the device that `given`, {name: value}, has in place of theirs."""
        own = self.settings | dict(context_length=self.limit)
        if own["device"] != "cpu":
            own |= dict(device="auto", precision=own["precision"].replace("tf32", "fp32"))  # theirs may not be here
        return own | given | ({} if self.needs_base else dict(weights="random"))

    def check_base(self, weights, sha256):
        """Raises UserError if the `weights` given, with this SHA-256, are not those that it was trained on."""
        if self.needs_base and sha256 != self.base_sha256:
            raise UserError(f"--weights {weights}: the classifier was trained on other weights (by their SHA-256)")


def frozen_sha256(classifier):
    """SHA-256 of the parameters that are not trained: which random weights were drawn."""
    return sha256_of_tensors({name: p for name, p in classifier.named_parameters() if not p.requires_grad})


def save_classifier(path, saved, parameters):
    """Write a SavedClassifier and the trained parameters, {name: tensor}, as a .safetensors file.

    Raises OSError or SafetensorError.
    """
    parameters = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    with atomic_write(path) as temporary:
        save_file(parameters, temporary, dict(kind=KIND, description=json.dumps(asdict(saved))))


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
    return SavedClassifier(**json.loads(metadata["description"])), parameters


def load_parameters(classifier, parameters):
    """Copy {name: tensor} into all that `classifier` trains. Raises RuntimeError if a name or a shape is another."""
    frozen = {name: p for name, p in classifier.named_parameters() if not p.requires_grad}
    classifier.load_state_dict(frozen | parameters)


# --- messages and answers ---

# What would end a field or a line, or change the terminal, and the backslashes of what stands for it.
ESCAPES = {n: chr(n).encode("unicode_escape").decode() for n in (*range(32), 92, *range(127, 160), 0x2028, 0x2029)}


def chunks_of_texts(arguments):
    """The messages of `--classify` in lists: its arguments in one, or the lines of standard input as they arrive.

    A message may be empty. Raises UserError for one that is not UTF-8.
    """
    given = [text.encode("utf-8", "surrogatepass") for text in arguments]
    number = 0
    for lines in arriving_lines(sys.stdin.buffer) if given == [b"-"] else [given]:
        texts = []
        for number, line in enumerate(lines, number + 1):
            try:
                texts.append(line.decode("utf-8-sig"))  # a file may begin with a byte-order mark
            except UnicodeDecodeError:
                raise UserError(f"message {number}: not UTF-8 text") from None
        yield texts


def arriving_lines(file):
    """Lists of the lines, bytes, of an open file: each time those that have arrived, and at least one."""
    rest = b""
    while piece := file.read1():  # waits for the first byte, and for no more
        *lines, rest = (rest + piece).split(b"\n")
        if lines:
            yield [line.removesuffix(b"\r") for line in lines]
    if rest:
        yield [rest]


def print_answers(texts, probabilities, class_names):
    """Print label, probability and message, separated by tabs, for each of `texts`.

    probabilities (n, K) are those of the texts that are not empty; an empty one gets an empty label and probability.
    """
    answers = zip(*(part.tolist() for part in probabilities.max(-1)))
    for text in texts:
        answer = "", ""
        if text.strip():
            probability, best = next(answers)
            answer = class_names[best], f"{probability:.4f}"
        print(*answer, text.translate(ESCAPES), sep="\t")
    sys.stdout.flush()
