"""Fine-tune GPT-2 as a spam classifier, one configuration per call, one row of a table of 19.

    python additional_experiments.py --demo            # no network, about a minute on two cores
    python additional_experiments.py                   # row 1: pretrained 124M, last block, last token
    python additional_experiments.py --row 16          # any other row of the table below

With `--weights random --device cpu` and its other defaults a run gives the numbers of the public original of
this experiment: every printed loss to three decimals, every accuracy to the example. It does so because it
draws its random numbers in the same order; where that order matters, a comment says so.

The file reads in the order of a run: the rows, the command line, data, classifier, training, evaluation, report.
In the shapes B is messages in a batch, T tokens in a message, D the embedding width, K classes.
"""

import os
import signal
import sys

# Importing PyTorch takes seconds; Ctrl-C is to end them as quietly as the rest. (A shell may have it ignored.)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import math
import platform
import re
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from itertools import islice, takewhile
from pathlib import Path

import pandas as pd
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import gpt_download
import results
from gpt_download import FetchError, FileError
from previous_chapters import GPT_SIZES, GPTConfig, GPTModel, WeightsError, load_gpt2_weights, pick

# --- the 19 rows ---


@dataclass(frozen=True)
class Row:
    """One row of the table: the options that differ from the defaults, and what was published for them."""

    options: dict
    published: results.Published


def row(train, validation, test, minutes, **options):
    return Row(options, results.Published(train, validation, test, minutes))


MEDIUM, LARGE, XL, NANO = "gpt2-medium (355M)", "gpt2-large (774M)", "gpt2-xl (1558M)", "gpt2-nano (7M)"

# Accuracies in percent, then minutes on an A100.
ROWS = {
    1: row(96.63, 99.33, 95.00, 0.28),
    2: row(78.46, 80.54, 75.00, 0.28, trainable_token_pos="first"),
    3: row(78.65, 79.87, 72.00, 0.25, trainable_layers="last_layer"),
    4: row(98.85, 98.66, 98.33, 0.33, trainable_layers="last_two_blocks"),
    5: row(99.62, 96.64, 96.67, 0.69, trainable_layers="all"),
    6: row(87.50, 91.28, 84.67, 0.75, model_size=MEDIUM),
    7: row(99.52, 98.66, 96.67, 1.50, model_size=LARGE),
    8: row(99.81, 99.81, 98.33, 2.83, model_size=XL),  # 99.81% of 149 messages is an erratum: no count gives it
    9: row(100.00, 98.66, 98.67, 8.12, model_size=XL, trainable_layers="all"),
    10: row(100.00, 96.64, 93.67, 0.69, weights="random", trainable_layers="all"),
    11: row(100.00, 97.32, 96.67, 0.75, trainable_layers="lora", lora_rank=16, lora_alpha=16.0),
    12: row(100.00, 98.66, 98.33, 5.79, trainable_layers="lora", lora_rank=16, lora_alpha=8.0, model_size=XL),
    13: row(83.08, 87.92, 78.33, 2.46, context_length="model_context_length"),
    14: row(100.00, 98.66, 98.00, 1.75, no_padding=True, batch_size=1),
    15: row(99.33, 98.66, 98.33, 1.70, no_padding=True, batch_size=1, accumulation_steps=8),
    16: row(99.42, 98.66, 98.33, 0.30, trainable_token_pos="flexible"),
    17: row(99.23, 98.66, 95.33, 0.29, disable_causal_mask=True),
    18: row(96.63, 99.33, 95.00, 0.28, ignore_index=50256),
    19: row(97.79, 99.33, 96.33, 0.32, average_embeddings=True),
}

DEMO = dict(model_size=NANO, weights="random", trainable_layers="all", dataset="sample", learning_rate=5e-4)


# --- the command line ---


class UsageError(ValueError):
    """An option, a combination of options or a file of the user's that cannot be used."""


def model_size(text):
    for name in GPT_SIZES:
        if text in (name, name.split(" ")[0]):
            return name
    hint = ""
    if (start := text.find("--")) > 0:
        hint = f'; is a space missing before "{text[start:]}"?'
    raise argparse.ArgumentTypeError(f'"{text}" is none of {", ".join(GPT_SIZES)}{hint}')


def whole_number(minimum=-(2**63), maximum=2**63 - 1):  # PyTorch's integers
    def parse(text):
        if not re.fullmatch(r"[+-]?\d+", text):
            raise argparse.ArgumentTypeError(f'"{text}" is not a whole number')
        return within(int(text), minimum, maximum)

    return parse


def within(number, minimum, maximum):
    if minimum is not None and number < minimum:
        raise argparse.ArgumentTypeError(f"{number} is less than {minimum}")
    if maximum is not None and number > maximum:
        raise argparse.ArgumentTypeError(f"{number} is more than {maximum}")
    return number


def positive_number(text):
    number = real_number(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return number


def real_number(text):
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f'"{text}" is not a finite number')
    return number


def non_negative_number(text):
    return within(real_number(text), 0, None)


def picture(text):
    if Path(text).suffix not in results.PICTURES:
        raise argparse.ArgumentTypeError(f'"{text}" does not end in {", ".join(results.PICTURES)}')
    if not importlib.util.find_spec("matplotlib"):
        raise argparse.ArgumentTypeError("pictures need matplotlib, which is not installed: pip install matplotlib")
    return text


MAX_CONTEXT = GPTConfig.context_length


def context_length(text):
    if text in ("longest_training_example", "model_context_length"):
        return text
    try:
        return whole_number(1, MAX_CONTEXT)(text)
    except argparse.ArgumentTypeError as error:
        named = "longest_training_example, model_context_length"
        raise argparse.ArgumentTypeError(f"{error} (it is {named} or a number from 1 to {MAX_CONTEXT})") from None


# The headings of --help.
MODEL, INPUT, TRAINING, DATA = "what is fine-tuned", "what it looks at", "training", "data"
MACHINE, RESULTS, CUT_OFF, USE = "machine", "results", "runs that are cut off", "using what was trained"


def option(default, group, help, **settings):
    """A field of Experiment or Call, with what argparse needs to know of it."""
    return field(default=default, metadata=dict(group=group, help=help, **settings))


@dataclass(frozen=True)
class Experiment:
    """All settings of one run; each field is an option of the command line, with its default.

    The parser checks single values. Raises UsageError for values that do not go together.
    """

    model_size: str = option(
        "gpt2-small (124M)", MODEL, f"{', '.join(GPT_SIZES)}; the name without the bracket will do", type=model_size
    )
    weights: str = option(
        "pretrained", MODEL, "pretrained, random, or the path of a GPT-2 .safetensors file", metavar="W"
    )
    trainable_layers: str = option(
        "last_block",
        MODEL,
        "what is trained besides the new head; LoRA adapts every linear layer, lora_alternative is the same with the "
        "product merged into the weight",
        choices=("last_block", "last_layer", "last_two_blocks", "all", "lora", "lora_alternative"),
    )
    lora_rank: int = option(8, MODEL, "inner dimension of the LoRA matrices", type=whole_number(1))
    lora_alpha: float = option(8.0, MODEL, "factor of the LoRA product (not divided by the rank)", type=positive_number)
    trainable_token_pos: str = option(
        "last",
        INPUT,
        "the position whose output is classified; flexible: the last token that is no padding",
        choices=("last", "first", "flexible"),
    )
    average_embeddings: bool = option(
        False,
        INPUT,
        "classify the mean of the outputs at all positions instead; with flexible or --no_padding at those of real "
        "tokens only",
        action="store_true",
    )
    context_length: str | int = option(
        "longest_training_example",
        INPUT,
        "messages are cut to it and padded to it: longest_training_example, model_context_length, or a number from 1 "
        f"to {MAX_CONTEXT}",
        type=context_length,
    )
    no_padding: bool = option(
        False, INPUT, "pad no message: in a batch each gives what it gives alone", action="store_true"
    )
    disable_causal_mask: bool = option(
        False, MODEL, "let every token attend to every other, also to later ones", action="store_true"
    )
    ignore_index: int = option(-100, TRAINING, "label that adds nothing to the loss", type=whole_number())
    batch_size: int = option(8, TRAINING, "messages in a batch", type=whole_number(1))
    accumulation_steps: int = option(
        1, TRAINING, "batches whose gradients are averaged into one update", type=whole_number(1)
    )
    num_epochs: int = option(5, TRAINING, "passes over the training messages", type=whole_number(1))
    learning_rate: float = option(5e-5, TRAINING, "step size of AdamW", type=positive_number)
    weight_decay: float = option(0.1, TRAINING, "decoupled weight decay of AdamW", type=non_negative_number)
    seed: int = option(
        123, TRAINING, "seed of the random weights, the head and the order of training", type=whole_number(0)
    )
    device: str = option(
        "auto", MACHINE, "where to run; auto: cuda, else mps, else cpu", choices=("auto", "cpu", "mps", "cuda")
    )
    precision: str = option(
        "fp32",
        MACHINE,
        "of the matrix products; trained weights, optimizer, loss and final logits stay float32. bf16: bfloat16; tf32: "
        "on CUDA only",
        choices=("fp32", "bf16", "tf32"),
    )
    features: str = option(
        "auto",
        MACHINE,
        "where to keep what the frozen blocks give, which is worked out once per message; auto: on the device while it "
        "fits into half of what is free there, else in host memory likewise, else off: worked out anew each time",
        choices=("auto", "device", "host", "off"),
    )
    data_dir: str = option(
        "sms_spam_collection",
        DATA,
        "folder of the collection and of train.csv, validation.csv and test.csv (columns Label, Text); if the three "
        "are there they are used as they are, so they can be your own",
        metavar="DIR",
    )
    dataset: str = option(
        "uci",
        DATA,
        "uci: the SMS Spam Collection, or your own files in --data_dir; sample: the 1,500 messages that the project "
        "carries, for trying things out",
        choices=("uci", "sample"),
    )

    def __post_init__(self):
        if self.weights == "pretrained" and self.model_size not in gpt_download.PRETRAINED:
            raise UsageError(f"{self.model_size} has no pretrained weights; use --weights random or --weights FILE")
        if self.weights not in ("pretrained", "random") and not Path(self.weights).is_file():
            raise UsageError(f"--weights {self.weights}: neither pretrained nor random, and no such file")
        if self.lora_rank > (width := GPT_SIZES[self.model_size]["emb_dim"]):
            raise UsageError(f"--lora_rank {self.lora_rank} is over the width {width} of {self.model_size}")
        if self.average_embeddings and self.trainable_token_pos == "first":
            raise UsageError("--average_embeddings takes all positions and --trainable_token_pos first only one")

    @property
    def config(self):
        return GPTConfig(**GPT_SIZES[self.model_size], causal=not self.disable_causal_mask)


@dataclass(frozen=True)
class Call:
    """What one call is to do beside its experiment, or in place of it. No number of a seed depends on it.

    Raises UsageError for what does not go together, or has no folder to be written to.
    """

    quiet: bool = option(False, RESULTS, "print finished rows only", action="store_true")
    results_file: str = option(
        "results.csv", RESULTS, 'file to which each finished run appends its record; "" for none', metavar="FILE"
    )
    repeats: int = option(
        1,
        RESULTS,
        "runs with as many seeds, --seed and those after it, then mean and standard deviation",
        type=whole_number(1),
    )
    plot: str | None = option(
        None, RESULTS, "draw losses and accuracies over the epochs (.png, .pdf or .svg)", type=picture, metavar="FILE"
    )
    report: str | None = option(
        None,
        RESULTS,
        "train nothing; print the table from a file of records (without FILE: results.csv), published figures beside "
        "measured ones",
        nargs="?",
        const="results.csv",
        metavar="FILE",
    )
    report_plot: str | None = option(None, RESULTS, "with --report: draw it too", type=picture, metavar="FILE")
    checkpoint: str | None = option(
        None,
        CUT_OFF,
        "keep the state of training in FILE, after each epoch, now and then, on Ctrl-C and SIGTERM; the same command "
        "goes on from it",
        metavar="FILE",
    )
    checkpoint_minutes: float = option(
        10.0, CUT_OFF, "minutes after which the state is written again", type=non_negative_number
    )
    restart: bool = option(False, CUT_OFF, "begin anew and overwrite what --checkpoint names", action="store_true")
    save_model: str | None = option(
        None, USE, "write what was trained, with all that is needed to use it (.safetensors)", metavar="FILE"
    )
    load_model: str | None = option(
        None,
        USE,
        "train nothing; use what --save_model wrote (with --weights FILE if that file has moved)",
        metavar="FILE",
    )
    classify: tuple = option(
        (),
        USE,
        "with --load_model: messages to classify; - for one per line of standard input",
        nargs="+",
        metavar="TEXT",
    )

    def __post_init__(self):
        for name, needed in (("report_plot", "report"), ("classify", "load_model"), ("restart", "checkpoint")):
            if getattr(self, name) and getattr(self, needed) is None:
                raise UsageError(f"--{name} needs --{needed}")
        if self.load_model is not None and not self.classify:
            raise UsageError("--load_model needs --classify")
        if self.save_model is not None and self.repeats > 1:
            raise UsageError("--save_model saves one classifier, --repeats trains several")
        names = {}
        for name in ("plot", "report_plot", "checkpoint", "save_model", "load_model", "results_file"):
            if (path := getattr(self, name)) is None or (path == "" and name == "results_file"):
                continue
            if path == "":
                raise UsageError(f"--{name} is given without the name of a file")
            if not Path(path).parent.is_dir():
                raise UsageError(f"--{name} {path}: there is no folder {Path(path).parent}")
            if Path(path).is_dir():
                raise UsageError(f"--{name} {path} is a folder")
            if (other := names.setdefault(Path(path).resolve(), name)) != name:
                raise UsageError(f"--{other} and --{name} name the same file, {path}")


# A row is the same row with other values of these.
NO_PART_OF_A_ROW = ("seed", "device", "precision", "features", "data_dir")


def row_number(experiment):
    """The number of the row whose options `experiment` has, or None."""
    for number, row in ROWS.items():
        same = {name: getattr(experiment, name) for name in NO_PART_OF_A_ROW}
        if experiment == Experiment(**row.options, **same):
            return number
    return None


# What may stand beside an option with which nothing is trained.
BESIDE = {"report": ("report_plot",), "load_model": ("classify", "model_size", "weights", "device")}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse's own prints the whole usage before the one line that matters
        raise UsageError(f"{message} (--help lists the options)")


def parse_args(argv=None):
    """The command line as (Experiment, Call, options of the experiment that it gives). Raises UsageError.

    Where nothing is to be trained there is no Experiment: None.
    """
    parser = Parser(
        description="Fine-tune GPT-2 as a spam classifier: one configuration, one row of the table.",
        argument_default=argparse.SUPPRESS,  # so that options given can be told from defaults and presets
        allow_abbrev=False,
    )
    preset = parser.add_argument_group("presets").add_mutually_exclusive_group()
    preset.add_argument(
        "--row",
        type=whole_number(1, len(ROWS)),
        metavar="N",
        help=f"preset the options of row N of the table, 1 to {len(ROWS)}; options given beside it win",
    )
    preset.add_argument(
        "--demo",
        action="store_true",
        help="preset a run that needs no network and about a minute: "
        + ", ".join(f"{name} {value}" for name, value in DEMO.items()),
    )
    groups = {}
    for setting in (*fields(Experiment), *fields(Call)):
        arguments = dict(setting.metadata)
        heading = arguments.pop("group")
        if setting.default not in (False, None, ()):
            arguments["help"] += f" (default: {setting.default})"
        if "choices" not in arguments and "action" not in arguments:
            arguments.setdefault("metavar", "N" if setting.type in (int, float) else setting.name.upper())
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(f"--{setting.name}", **arguments)

    given = vars(parser.parse_args(argv))
    call = {setting.name: given.pop(setting.name) for setting in fields(Call) if setting.name in given}
    for mode, beside in BESIDE.items():
        if mode in call and (refused := sorted((given.keys() | call.keys()) - {mode, *beside})):
            raise UsageError(f"--{refused[0]} has no place beside --{mode}, which trains nothing")
    call = Call(**call)
    if call.report is not None or call.load_model is not None:
        return None, call, given
    presets = DEMO if given.pop("demo", False) else {}
    if (number := given.pop("row", None)) is not None:
        presets = ROWS[number].options
    settings = presets | given
    if settings.get("dataset") == "sample" and "data_dir" in given:
        raise UsageError("--data_dir is not looked at with the sample; add --dataset uci, or leave --data_dir out")
    experiment = Experiment(**settings)
    for name in ("checkpoint", "save_model", "plot", "results_file"):
        if getattr(call, name) and Path(getattr(call, name)).resolve() == Path(experiment.weights).resolve():
            raise UsageError(f"--{name} {experiment.weights} would overwrite the weights")
    return experiment, call, given


def resolve_device(name):
    """The torch.device that `--device` names. Raises UsageError where there is none of that kind."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UsageError(f"--device {name}: PyTorch finds none here; use --device auto")
    return torch.device(name)


def set_precision(precision, device):
    """Let float32 products be TF32 ones or not. Raises UsageError where there are none."""
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"--precision tf32 is for CUDA; the device is {device}")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


# --- data ---

SPLITS = ("train", "validation", "test")
PAD_TOKEN = 50256
# Of the splits of the collection as they are written to --data_dir; other files are somebody's own data.
UCI_SPLITS_SHA256 = {
    "train": "ec2895b026553ce06475815818c52cf44828af0605b07b257935a194e611195a",
    "validation": "f92996ef2ae2ed6d6937e96bc7a3f739f2bae59b07d1babd7f3725e473f2d2bd",
    "test": "f82216f37a6d785b52f99a84a3552dcc9835316018758c2117b2ca133e6c1409",
}


def load_splits(experiment, progress=False):
    """The labelled messages of each split, and what they are: "uci", "sample" or "own".

    Returns ({split: DataFrame with columns Label (int) and Text (str)}, name). Downloads the collection if need
    be. Raises UsageError or FileError for files that cannot be used, FetchError for a download that failed.
    """
    if experiment.dataset == "sample":
        return balanced_splits(gpt_download.sample_path()), "sample"

    data_dir = Path(experiment.data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        raise UsageError(f"--data_dir {data_dir} is not a folder")
    paths = {split: data_dir / f"{split}.csv" for split in SPLITS}
    if not all(path.exists() for path in paths.values()):
        write_uci_splits(data_dir, paths, progress)
    splits = {split: read_labelled_csv(path) for split, path in paths.items()}
    is_uci = all(gpt_download.sha256_of(paths[split]) == UCI_SPLITS_SHA256[split] for split in SPLITS)
    return splits, "uci" if is_uci else "own"


def write_uci_splits(data_dir, paths, progress):
    for split, path in paths.items():  # a run that was killed here may have left some; all others are the user's
        if path.exists() and gpt_download.sha256_of(path) != UCI_SPLITS_SHA256[split]:
            missing = " and ".join(other.name for other in paths.values() if not other.exists())
            raise UsageError(f"{data_dir} holds {path.name} but not {missing}; your own data needs all three")
    gpt_download.check_writable(data_dir)
    splits = balanced_splits(gpt_download.fetch_collection(data_dir, progress))
    contents = {split: frame.to_csv(index=None, lineterminator="\n").encode() for split, frame in splits.items()}
    for split, content in contents.items():
        if hashlib.sha256(content).hexdigest() != UCI_SPLITS_SHA256[split]:
            raise FileError(f"pandas {pd.__version__} splits the collection differently; see requirements.txt")
    for split, content in contents.items():
        gpt_download.write_whole(paths[split], content)


def balanced_splits(path):
    """70% / 10% / 20% of the spam and as much ham from the collection at `path` (lines of label, tab, text).

    Seed and order of the shuffles are those of the public original. So is the reading: quotes are taken as CSV
    takes them, and a few messages that begin with one run together with their neighbours.
    """
    messages = pd.read_csv(path, sep="\t", header=None, names=["Label", "Text"])
    spam, ham = (messages[messages["Label"] == label] for label in ("spam", "ham"))
    balanced = pd.concat([ham.sample(len(spam), random_state=123), spam])
    for _ in range(2):
        balanced = balanced.sample(frac=1, random_state=123).reset_index(drop=True)
    balanced["Label"] = balanced["Label"].map({"ham": 0, "spam": 1})
    train_end = int(0.7 * len(balanced))
    validation_end = train_end + int(0.1 * len(balanced))
    return {
        "train": balanced[:train_end],
        "validation": balanced[train_end:validation_end],
        "test": balanced[validation_end:],
    }


def read_labelled_csv(path):
    """The columns Label and Text of a CSV file, each row beside the line on which it ends.

    Raises UsageError that names file and line. (Not pandas: it takes a message "NA" for a missing one, and knows
    no line numbers.)
    """

    def refuse(problem, line=None):
        raise UsageError(f"{path}{f', line {line}' if line else ''}: {problem}")

    records = []
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames is None:
                refuse("the file is empty")
            for column in ("Label", "Text"):
                if column not in reader.fieldnames:
                    refuse(f"column {column} is missing; there are {', '.join(reader.fieldnames)}")
            for record in reader:
                label, text = record["Label"], record["Text"]
                if not re.fullmatch(r"\s*-?\d+\s*", label or ""):
                    refuse(f'label "{label or ""}" is not a whole number', reader.line_num)
                if not (text or "").strip():
                    refuse("the text is empty", reader.line_num)
                if None in record:
                    refuse("more fields than columns; a text with a comma needs quotes", reader.line_num)
                records.append((int(label), text, reader.line_num))
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 text ({error.reason} at byte {error.start})")
    except csv.Error as error:
        refuse(error, reader.line_num)
    except OSError as error:
        refuse(error.strerror)
    if not records:
        refuse("no messages below the header")
    return pd.DataFrame(records, columns=["Label", "Text", "line"])


def count_classes(splits, experiment):
    """K, from the labels 0..K-1 of the training messages. Raises UsageError for labels that are not these.

    A negative label that is the ignore index marks a message without a label: it adds nothing to the loss and is
    not counted in an accuracy.
    """

    def refuse(split, wrong, problem):
        first = splits[split][wrong].iloc[0]
        raise UsageError(f"{experiment.data_dir}/{split}.csv, line {first['line']}: label {first['Label']}, {problem}")

    def unlabelled(labels):
        return (labels < 0) & (labels == experiment.ignore_index)

    train = splits["train"]["Label"]
    if (train == experiment.ignore_index).all():
        raise UsageError(f"every training label is the ignored one, {experiment.ignore_index}: nothing to learn from")
    classes = sorted(set(train[~unlabelled(train)]))
    if classes[0] != 0:
        refuse("train", train == classes[0], f"but labels begin at 0; the training file's are {classes[0]} and up")
    for label, expected in zip(classes, range(len(classes))):
        if label != expected:
            refuse("train", train == label, f"but no training message has label {expected}")
    if len(classes) == 1:
        raise UsageError(f"{experiment.data_dir}/train.csv: every label is 0; there is nothing to tell apart")
    for split in SPLITS:
        labels = splits[split]["Label"]
        foreign = ~labels.isin(classes) & ~unlabelled(labels)
        if foreign.any():
            refuse(split, foreign, f"which no training message has; theirs are 0 to {classes[-1]}")
    if experiment.batch_size > len(train):
        raise UsageError(f"--batch_size {experiment.batch_size}: there are only {len(train)} training messages")
    return len(classes)


@dataclass
class Batch:
    """B messages side by side, padded on the right to the longest of them."""

    x: torch.Tensor  # (B, T) token ids, or (B, T, D) what the frozen blocks made of them
    positions: torch.Tensor  # (B,) the position that is asked for, or the last one that is averaged over
    key_mask: torch.Tensor | None  # (B, 1, 1, T) True where a message has something to attend to; None: everywhere
    shortcut: torch.Tensor | None = None  # (B, 1, D) beside a standardized x: x itself at the position asked for


@dataclass
class Messages:
    """The n messages of a split, of unequal lengths, end to end."""

    x: torch.Tensor  # (N,) token ids, or (N, D) what the frozen blocks made of them
    lengths: torch.Tensor  # (n,)
    positions: torch.Tensor  # (n,) as in Batch
    labels: torch.Tensor  # (n,)
    shortcut: torch.Tensor | None = None  # (n, D) as in Batch

    def __post_init__(self):
        self.starts = self.lengths.cumsum(0) - self.lengths

    def __len__(self):
        return len(self.lengths)

    def rows(self, indices):
        """Where in x the messages that `indices` (B,) numbers stand: (B, T), and (B, T) True where that is no pad.

        Pads point at the message's last token.
        """
        lengths = self.lengths[indices, None]
        steps = torch.arange(int(lengths.max()))
        return self.starts[indices, None] + steps.minimum(lengths - 1), steps < lengths

    def batch(self, indices, device):
        """The messages that `indices` (B,) numbers, as a Batch on `device`."""
        rows, real = self.rows(indices)
        return Batch(
            self.x[rows.to(self.x.device)].to(device),
            self.positions[indices].to(device),
            None if real.all() else real[:, None, None].to(device),
            None if self.shortcut is None else self.shortcut[indices.to(self.x.device), None].to(device),
        )


def encode(tokenizer, splits, experiment):
    """The splits as token ids: ({split: Messages}, tokens that a padded message has).

    Only what the output asked for can see is kept. Under the causal mask that is what stands before it: `first`
    sees one token, `flexible` no pads.
    """
    # encode_ordinary: "<|endoftext|>" in a message is text like any other
    encoded = {split: tokenizer.encode_ordinary_batch(list(frame["Text"])) for split, frame in splits.items()}
    match experiment.context_length:
        case "longest_training_example":
            width = min(max(len(tokens) for tokens in encoded["train"]), MAX_CONTEXT)
        case "model_context_length":
            width = MAX_CONTEXT
        case number:
            width = number

    def end_to_end(token_lists, labels):
        visible, positions = [], []
        for tokens in token_lists:
            tokens = tokens[:width]
            real = len(tokens)
            if not experiment.no_padding:
                tokens = tokens + [PAD_TOKEN] * (width - real)
            match experiment.trainable_token_pos:
                case "last":
                    position = len(tokens) - 1
                case "first":
                    position = 0
                case "flexible":
                    position = real - 1
            seen = len(tokens) if experiment.disable_causal_mask else position + 1
            visible.append(torch.tensor(tokens[:seen]))
            positions.append(position)
        lengths = torch.tensor([len(tokens) for tokens in visible])
        return Messages(torch.cat(visible), lengths, torch.tensor(positions), torch.tensor(list(labels)))

    return {split: end_to_end(encoded[split], splits[split]["Label"]) for split in splits}, width


@dataclass
class Material:
    """What a run works on, whatever its seed."""

    messages: dict  # of each split, Messages
    width: int  # tokens of a padded message
    dataset: str  # "uci", "sample" or "own"
    data_sha256: str  # of all labels and texts
    labels: list  # the K classes by name
    weights_sha256: str | None  # of the file; None: random
    is_pretrained: bool  # the weights are the published ones, from wherever they came


def gather(experiment, progress):
    """The Material of an experiment. The weights are not read yet, but for those of `--weights FILE` their sum."""
    pinned = gpt_download.PRETRAINED.get(experiment.model_size)
    match experiment.weights:
        case "pretrained":
            weights_sha256 = pinned.sha256
        case "random":
            weights_sha256 = None
        case path:
            weights_sha256 = gpt_download.sha256_of(path)
    splits, dataset = load_splits(experiment, progress)
    n_classes = count_classes(splits, experiment)
    content = json.dumps([[splits[split]["Label"].tolist(), splits[split]["Text"].tolist()] for split in SPLITS])
    messages, width = encode(gpt_download.load_vocabulary(), splits, experiment)
    return Material(
        messages,
        width,
        dataset,
        data_sha256=hashlib.sha256(content.encode()).hexdigest(),
        labels=[str(number) for number in range(n_classes)] if dataset == "own" else ["ham", "spam"],
        weights_sha256=weights_sha256,
        is_pretrained=pinned is not None and weights_sha256 == pinned.sha256,
    )


# --- classifier ---
#
# The idea of this program is to compute only what the loss can see, and that only once:
#   1. visible prefix: tokens that the output asked for cannot see are cut off      (encode)
#   2. one query: in the last block only the position asked for is worked out       (GPTModel.blocks)
#   3. frozen features: what comes before the first trained parameter runs once     (compute_features)
#   4. no keys and values: the last block, on frozen features, forms none           (attend_to_normalized)
# None of it changes a number beyond rounding.


class LinearWithLoRA(nn.Module):
    """A linear layer and a product of two thin matrices beside it (Hu et al. 2021, section 4.1).

    x W + b + alpha x A B, with A (in, rank) and B (rank, out), which starts at zero. Unlike the paper's, and like
    the public original's, the factor is alpha, not alpha / rank.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.alpha = linear, alpha
        self.A = nn.Parameter(torch.empty(linear.in_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, linear.out_features))

    def forward(self, x):
        thin = x @ self.A
        out = self.linear(x)
        # Added in place: the product is thin, so that a second `out` would cost more to write than to work out.
        out.view(-1, out.shape[-1]).addmm_(thin.flatten(0, -2), self.B.to(thin.dtype), alpha=self.alpha)
        return out


class LinearWithMergedLoRA(LinearWithLoRA):
    """The same function, with the product added to the weight before the weight meets x."""

    def forward(self, x):
        return F.linear(x, self.linear.weight + self.alpha * (self.A @ self.B).T, self.linear.bias)


def add_lora(module, lora, rank, alpha):
    """Wrap every nn.Linear below `module`, depth first: the order in which the A matrices are drawn."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, lora(child, rank, alpha))
        else:
            add_lora(child, lora, rank, alpha)


class Classifier(nn.Module):
    """GPT-2 with a head of K classes at one position of a message, or at the mean over all its positions.

    It runs in two parts. What comes before the first trained parameter gives the same for a message each time, so
    that `compute_features` may run the frozen part once per message; the trained part goes on from there.
    """

    def __init__(self, gpt, n_classes, average, bf16=False):
        super().__init__()
        self.gpt, self.average, self.bf16 = gpt, average, bf16
        self.out_head = nn.Linear(gpt.cfg.emb_dim, n_classes)
        self.n_frozen = 0  # blocks before the first trained parameter; if all, the final norm is not trained either

    @property
    def all_frozen(self):
        return self.n_frozen == len(self.gpt.trf_blocks)

    @property
    def keys_not_needed(self):
        """Whether the frozen part ends before the last block, of which one query per message is asked."""
        return self.n_frozen == len(self.gpt.trf_blocks) - 1 and not self.average

    def forward(self, batch):
        """A Batch to logits (B, K)."""
        return self.trained_part(self.frozen_part(batch))

    @torch.no_grad()
    def frozen_part(self, batch):
        """A Batch of token ids as far as it goes without trained parameters; of kept features, as it is.

        Its x becomes the input (B, T, D) of the first trained block; the standardized input, with the shortcut
        beside it, if that is the last block with one query; or, if no block is trained, the head's input (B, 1, D).
        """
        if self.n_frozen == 0 or batch.x.is_floating_point():
            return batch
        with self.autocast(batch):
            x = self.gpt.blocks(self.gpt.embed(batch.x), 0, self.n_frozen, batch.key_mask, self.query_at(batch))
        if self.all_frozen:
            return Batch(self.pooled(x, batch), torch.zeros_like(batch.positions), key_mask=None)
        if not self.keys_not_needed:
            return replace(batch, x=x)
        # The standardized input goes into products only, so with bf16 it may be kept in bfloat16.
        x_hat = self.gpt.trf_blocks[-1].standardize(x).to(torch.bfloat16 if self.bf16 else x.dtype)
        return replace(batch, x=x_hat, shortcut=pick(x, batch.positions))

    def trained_part(self, batch):
        """What `frozen_part` gave to logits (B, K), the head in full precision."""
        x = batch.x
        if not self.all_frozen:
            with self.autocast(batch):
                if batch.shortcut is not None:
                    x = self.gpt.trf_blocks[-1].forward_normalized(batch.shortcut, x, batch.key_mask)
                else:
                    x = self.gpt.embed(x) if self.n_frozen == 0 else x
                    end = len(self.gpt.trf_blocks)
                    x = self.gpt.blocks(x, self.n_frozen, end, batch.key_mask, self.query_at(batch))
            x = self.pooled(x, batch)
        return self.out_head(x.squeeze(1))

    def query_at(self, batch):
        """The one position (B,) that is asked for after the last block, or None where the mean over all is."""
        return None if self.average else batch.positions

    def pooled(self, x, batch):
        """What the last block gave to the head's input (B, 1, D)."""
        x = self.gpt.final_norm(x)
        return mean_up_to(x, batch.positions) if self.average else x

    def autocast(self, batch):
        return torch.autocast(batch.x.device.type, torch.bfloat16, enabled=self.bf16)


def count_frozen_blocks(gpt):
    def is_frozen(module):
        return not any(parameter.requires_grad for parameter in module.parameters())

    if not is_frozen(gpt.tok_emb) or not is_frozen(gpt.pos_emb):
        return 0
    return len(list(takewhile(is_frozen, gpt.trf_blocks)))


def mean_up_to(x, positions):
    """The mean of each message's vectors up to its own position: x (B, T, D), positions (B,) to (B, 1, D).

    The head is linear, so that it may be applied to this mean instead of to each vector.
    """
    counted = torch.arange(x.shape[1], device=x.device) <= positions[:, None]  # (B, T)
    weights = counted / counted.sum(1, keepdim=True).to(x.dtype)
    return weights[:, None] @ x


def prepare_frozen(classifier):
    """Give the frozen layers the form in which they are fastest; call it when the classifier is on its device.

    Trained parameters are left alone, so is the function that the classifier computes (with bf16: in its products).
    """
    for module in classifier.gpt.trf_blocks.modules():
        # A merged LoRA product is added to the weight before bfloat16 would swallow it, so that weight stays as it is.
        if classifier.bf16 and type(module) is LinearWithLoRA:
            module.linear.to(torch.bfloat16)
    for block in classifier.gpt.trf_blocks[: classifier.n_frozen]:
        for module in block.modules():
            if classifier.bf16 and isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        block.att.fuse()


def build_classifier(experiment, n_classes, weights=None):
    """The classifier of an experiment, on the CPU, with what is not trained frozen.

    `weights` maps the names of a GPT-2 checkpoint to tensors; None draws random ones. The draws are, in this
    order and each after seeding anew: the model, then the head and the LoRA matrices.
    """
    torch.manual_seed(experiment.seed)
    with nullcontext() if weights is None else torch.device("meta"):  # names and shapes only, nothing drawn or stored
        gpt = GPTModel(experiment.config)
    if weights is not None:
        load_gpt2_weights(gpt, weights)
    gpt.requires_grad_(False)

    torch.manual_seed(experiment.seed)
    classifier = Classifier(gpt, n_classes, experiment.average_embeddings, bf16=experiment.precision == "bf16")
    match experiment.trainable_layers:
        case "last_layer":
            trained = []
        case "last_block":
            trained = [gpt.trf_blocks[-1], gpt.final_norm]
        case "last_two_blocks":
            trained = [gpt.trf_blocks[-2:], gpt.final_norm]
        case "all":
            trained = [gpt]
        case "lora" | "lora_alternative" as kind:
            trained = []
            lora = LinearWithLoRA if kind == "lora" else LinearWithMergedLoRA
            add_lora(classifier, lora, experiment.lora_rank, experiment.lora_alpha)
    for module in trained:
        module.requires_grad_(True)
    classifier.n_frozen = count_frozen_blocks(gpt)
    if weights is not None:
        for parameter in classifier.parameters():
            if parameter.requires_grad:  # out of the file's memory map, and laid out as the optimizer likes it
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return classifier


# --- what is computed once ---

# Tokens in a forward pass without gradients: enough to keep the device busy; more cost memory and gain nothing.
TOKENS_AT_ONCE = {"cpu": 1024, "mps": 4096, "cuda": 16384}


def split_by_tokens(lengths, device):
    """Numbers of the messages of these lengths (n,) from short to long, cut into lists for one pass each."""
    lengths, order = lengths.sort(stable=True)
    start, longest = 0, lengths.tolist()
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * longest[end] > TOKENS_AT_ONCE[device.type]:
            yield order[start:end]
            start = end


def features_size(classifier, messages):
    """Bytes that the features of these Messages take."""
    vectors = len(messages) if classifier.all_frozen else int(messages.lengths.sum())
    width = classifier.gpt.cfg.emb_dim
    if not classifier.keys_not_needed:
        return 4 * vectors * width
    return (2 if classifier.bf16 else 4) * vectors * width + 4 * len(messages) * width


def place_features(experiment, size, device, in_use=0):
    """The torch.device on which `size` bytes of features are kept, or None where they are worked out anew.

    `in_use` bytes of `device` are still to be taken for other things.
    """
    places = {"device": device, "host": torch.device("cpu"), "off": None}
    if experiment.features != "auto":
        return places[experiment.features]
    for place in (device, places["host"]):
        if size <= (free_memory(place) - (in_use if place == device else 0)) / 2:
            return place
    return None


def free_memory(device):
    """Bytes that can still be had on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):  # not Linux, which alone says what could be had: half of all there is
        has_sysconf = hasattr(os, "sysconf")  # not on Windows, which is taken to have 8 GB
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if has_sysconf else 4 * 10**9
    try:  # a container's limit
        limit, used = (Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such file, or "max"
        return free


def memory_needs(experiment, n_classes, messages, device):
    """Bytes on `device` that a run needs at least, item by item: activations are not among them."""
    with torch.device("meta"):
        classifier = build_classifier(experiment, n_classes)
        prepare_frozen(classifier)
    weights = sum(p.numel() * p.element_size() for p in classifier.parameters())
    trained = sum(p.numel() * p.element_size() for p in classifier.parameters() if p.requires_grad)
    features = sum(features_size(classifier, split) for split in messages.values()) if classifier.n_frozen else 0
    place = place_features(experiment, features, device, in_use=weights)
    return {
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,  # two moments of each parameter
        "frozen features": features if place is not None and place.type == device.type else 0,
    }


def peak_memory(device):
    """The most memory that this process has held, in bytes: of the device, or main memory; None where unknown."""
    match device.type:
        case "cuda":
            return torch.cuda.max_memory_allocated(device)
        case "mps":
            return torch.mps.driver_allocated_memory()
    if not importlib.util.find_spec("resource"):  # Windows
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compute_features(classifier, messages, device, place, bar):
    """Messages with what the frozen blocks make of them in place of their token ids, kept on `place`.

    Each message runs once, together with others of like length.
    """
    lengths = torch.ones_like(messages.lengths) if classifier.all_frozen else messages.lengths
    features = replace(messages, x=None, lengths=lengths)
    was_training = classifier.training
    classifier.eval()
    for indices in split_by_tokens(messages.lengths, device):
        batch = classifier.frozen_part(messages.batch(indices, device))
        if features.x is None:
            width = batch.x.shape[2]
            features.x = torch.empty(int(lengths.sum()), width, dtype=batch.x.dtype, device=place)
            if batch.shortcut is not None:
                features.shortcut = torch.empty(len(messages), width, dtype=batch.shortcut.dtype, device=place)
        rows, real = features.rows(indices)
        features.x[rows[real].to(place)] = batch.x[real.to(device)].to(place)
        if batch.shortcut is not None:
            features.shortcut[indices.to(place)] = batch.shortcut.squeeze(1).to(place)
        bar.update(len(indices))
    classifier.train(was_training)
    return features


def keep_features(classifier, messages, experiment, device, say, progress):
    """The splits with their frozen features, if there are any and there is room for them, and a word about it."""
    size = sum(features_size(classifier, split) for split in messages.values())
    if classifier.n_frozen == 0:
        return messages
    place = place_features(experiment, size, device)
    what = f"Frozen features: {classifier.n_frozen} of {len(classifier.gpt.trf_blocks)} blocks"
    if place is None:
        say(f"{what}, worked out anew each time (they would take {size / 1e9:.2f} GB)")
        return messages

    start = time.perf_counter()
    n_messages = sum(len(split) for split in messages.values())
    n_tokens = sum(int(split.lengths.sum()) for split in messages.values())
    with tqdm(desc="features", total=n_messages, unit="message", disable=not progress) as bar:
        features = {name: compute_features(classifier, split, device, place, bar) for name, split in messages.items()}
    seconds = time.perf_counter() - start
    where = "on the device" if place.type != "cpu" else "in host memory" if device.type != "cpu" else "in memory"
    say(
        f"{what}, {n_messages:,} messages, {n_tokens:,} tokens, computed once in {seconds:.0f} s "
        f"({size / 1e9:.2f} GB, kept {where})"
    )
    return features


# --- training ---

EVALUATE_EVERY = 50  # batches
EVALUATE_BATCHES = 5
MESSAGES_AT_ONCE = 64  # in a pass of the trained part over frozen features


def make_loader(messages, batch_size, shuffle):
    """The one place that makes batches: an iterable of message numbers (B,).

    Each iter() over it draws from PyTorch's global random state, also without shuffling; the sequence of these
    draws is part of a run's numbers.
    """
    return DataLoader(range(len(messages)), batch_size, shuffle=shuffle, drop_last=shuffle)


def windows(batches, size):
    """Lists of `size` batches, the last one of what is left."""
    batches = iter(batches)
    while window := list(islice(batches, size)):
        yield window


def loss_weights(labels, sizes, ignore_index):
    """What the cross entropy of each message weighs in the mean over batches of the batches' means.

    labels (n,) of batches of these `sizes`, one after the other; to (n,). An ignored label weighs nothing, a batch
    of which all are ignored is not counted, and if that is every batch all weights are zero: never NaN.
    """
    counts = [(batch != ignore_index).double() for batch in labels.cpu().split(sizes)]
    n_batches = sum(int(count.any()) for count in counts)
    return torch.cat([count / count.sum().clamp(min=1) for count in counts]) / max(n_batches, 1)


def accumulate(classifier, messages, window, experiment, device):
    """Add to the gradients those of the mean loss over the batches of an accumulation window.

    Over frozen features little is left to run, and the window runs in passes of MESSAGES_AT_ONCE, wherever its
    batches end. Elsewhere accumulation is there to save memory, and each batch is a pass.
    """
    indices = torch.cat(window)
    weights = loss_weights(messages.labels[indices], [len(batch) for batch in window], experiment.ignore_index)
    size = MESSAGES_AT_ONCE if classifier.n_frozen else experiment.batch_size
    for some, some_weights in zip(indices.split(size), weights.split(size)):
        logits = classifier(messages.batch(some, device))
        labels = messages.labels[some].to(device)
        losses = F.cross_entropy(logits, labels, ignore_index=experiment.ignore_index, reduction="none")
        (losses @ some_weights.to(losses)).backward()


@dataclass
class History:
    """What a run printed, as numbers and as lines."""

    steps: list = field(default_factory=list)
    train_losses: list = field(default_factory=list)
    val_losses: list = field(default_factory=list)
    train_accuracies: list = field(default_factory=list)  # results.Accuracy, after each epoch
    val_accuracies: list = field(default_factory=list)
    lines: list = field(default_factory=list)

    def add_losses(self, epoch, step, train_loss, val_loss):
        self.steps.append(step)
        self.train_losses.append(train_loss)
        self.val_losses.append(val_loss)
        self.lines.append(f"Ep {epoch} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")

    def add_accuracies(self, train, val):
        self.train_accuracies.append(train)
        self.val_accuracies.append(val)
        self.lines.append(
            f"Training accuracy: {train} | Validation accuracy: {val} ({train.correct}/{train.total}, "
            f"{val.correct}/{val.total}; 95% intervals {train.bounds}, {val.bounds})"
        )

    @classmethod
    def from_dict(cls, entries):
        """What `dataclasses.asdict` made of a History, also after a way through JSON."""
        history = cls(**{name: list(values) for name, values in entries.items()})
        for accuracies in (history.train_accuracies, history.val_accuracies):
            accuracies[:] = [results.Accuracy(**accuracy) for accuracy in accuracies]
        return history


class TrainingState:
    """All that training changes, and how far it has come: what a run needs to go on as if it had never stopped."""

    def __init__(self, classifier, experiment, device, seed_begun=None, training_begun=None):
        self.trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=experiment.learning_rate, weight_decay=experiment.weight_decay, fused=True
        )
        self.device = device
        self.history = History()
        self.n_batches = 0  # whose updates are made
        self.order = torch.empty(0, dtype=torch.long)  # message numbers of the epoch under way, batch after batch
        now = time.perf_counter()
        self.begun = dict(training=training_begun or now, total=seed_begun or now)
        self.before = dict(training=0.0, total=0.0, peak_memory=0)

    def spent(self):
        """Seconds of training and in all, and the most bytes of memory, over all parts of a run that was cut off."""
        seconds = {kind: self.before[kind] + time.perf_counter() - begun for kind, begun in self.begun.items()}
        return seconds | dict(peak_memory=max(self.before["peak_memory"], peak_memory(self.device) or 0))

    def moment(self):
        """How far training has come: (what JSON can hold, tensors), which later steps leave as they are."""
        rng = {"rng.cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            rng[f"rng.{self.device.type}"] = getattr(torch, self.device.type).get_rng_state()
        entries = dict(n_batches=self.n_batches, spent=self.spent(), history=asdict(self.history))
        return entries, dict(order=self.order, **rng)

    def tensors(self, with_optimizer):
        """Trained parameters by name, and the optimizer's tensors: they change in updates only."""
        tensors = {f"model.{name}": parameter for name, parameter in self.trained.items()}
        for name, parameter in self.trained.items() if with_optimizer else ():
            for kind, tensor in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{kind}.{name}"] = tensor
        return tensors

    @torch.no_grad()
    def restore(self, entries, tensors):
        """Go back to a moment: its entries, its tensors and those of `tensors()`."""
        self.n_batches, self.before = entries["n_batches"], entries["spent"]
        self.history, self.order = History.from_dict(entries["history"]), tensors["order"].clone()
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[f"model.{name}"])
            for kind in ("step", "exp_avg", "exp_avg_sq"):  # none yet of a parameter that had no gradient
                if (tensor := tensors.get(f"optimizer.{kind}.{name}")) is not None:
                    self.optimizer.state[parameter][kind] = tensor.to(parameter.device, copy=True)
        torch.set_rng_state(tensors["rng.cpu"].clone())
        if self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(tensors[f"rng.{self.device.type}"].clone())


def train(classifier, messages, experiment, device, say, progress, state=None, lifeline=None):
    """Fine-tune `classifier` on messages["train"] and say how it goes, in the public original's own lines.

    Goes on from `state`, if there is one. Each change of parameters is made within `lifeline.update`, and wherever
    the run might go on from, `lifeline.safe` is told. Returns a History.
    """
    loaders = {split: make_loader(messages[split], experiment.batch_size, shuffle=split == "train") for split in SPLITS}
    state, lifeline = state or TrainingState(classifier, experiment, device), lifeline or results.Lifeline()
    history, per_epoch = state.history, len(loaders["train"])
    classifier.train()

    def predict_split(split):
        return predict_batches(classifier, messages[split], loaders[split], device, EVALUATE_BATCHES)

    def evaluate_if_due(epoch, step):
        if step % EVALUATE_EVERY == 0 and step not in history.steps[-1:]:
            train_loss = mean_loss(predict_split("train"), experiment.ignore_index)
            val_loss = mean_loss(predict_split("validation"), experiment.ignore_index)
            history.add_losses(epoch, step, train_loss, val_loss)
            say(history.lines[-1])

    total = experiment.num_epochs * per_epoch
    with tqdm(desc="training", total=total, initial=state.n_batches, unit="batch", disable=not progress) as bar:
        while (epoch := len(history.train_accuracies) + 1) <= experiment.num_epochs:
            done = state.n_batches - (epoch - 1) * per_epoch
            if done == 0:
                state.order = torch.cat(list(loaders["train"]))
            else:  # the run was cut off after this update, perhaps before its evaluation
                evaluate_if_due(epoch, state.n_batches - 1)
            batches = state.order.split(experiment.batch_size)[done:]
            for window in windows(batches, experiment.accumulation_steps):
                accumulate(classifier, messages["train"], window, experiment, device)
                last = state.n_batches + len(window) - 1
                for step in range(state.n_batches, last):  # evaluations fall between the batches of a window too
                    evaluate_if_due(epoch, step)
                with lifeline.update(state):
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                    state.n_batches = last + 1
                evaluate_if_due(epoch, last)
                lifeline.safe(state)
                bar.update(len(window))
            history.add_accuracies(accuracy(predict_split("train")), accuracy(predict_split("validation")))
            say(history.lines[-1])
            lifeline.safe(state, epoch_ends=True)
    return history


# --- evaluation ---


def predict(classifier, messages, indices, device):
    """Logits (n, K) of the messages that `indices` (n,) numbers. Messages of like length run together."""
    was_training = classifier.training
    classifier.eval()
    logits, order = [], []
    with torch.no_grad():
        for some in split_by_tokens(messages.lengths[indices], device):
            logits.append(classifier(messages.batch(indices[some], device)))
            order.append(some)
    classifier.train(was_training)
    return torch.cat(logits)[torch.cat(order).argsort().to(device)]


@dataclass
class Predictions:
    """What one pass over a loader gave: logits (n, K) and labels (n,), batch after batch of these sizes."""

    logits: torch.Tensor
    labels: torch.Tensor
    sizes: list


def predict_batches(classifier, messages, loader, device, n_batches=None):
    """The Predictions of the first `n_batches` of a loader, by default of all of them."""
    batches = list(islice(loader, n_batches))
    indices = torch.cat(batches)
    logits = predict(classifier, messages, indices, device)
    return Predictions(logits, messages.labels[indices].to(device), [len(batch) for batch in batches])


def mean_loss(predictions, ignore_index):
    """The mean of the batches' mean cross entropies, each over the labels that count."""
    losses = F.cross_entropy(predictions.logits, predictions.labels, ignore_index=ignore_index, reduction="none")
    return (losses @ loss_weights(predictions.labels, predictions.sizes, ignore_index).to(losses)).item()


def accuracy(predictions):
    """How many of the labelled messages were classified as their label says, as a results.Accuracy."""
    right = predictions.logits.argmax(-1) == predictions.labels
    return results.Accuracy(correct=int(right.sum()), total=int((predictions.labels >= 0).sum()))


# --- report ---

DATASET_NAMES = {
    "uci": "SMS Spam Collection",
    "sample": "sample of the SMS Spam Collection (numbers do not compare with the table)",
    "own": "your own data (numbers do not compare with the table)",
}


def describe_device(device):
    match device.type:
        case "cuda":
            return torch.cuda.get_device_name(device)
        case "mps":
            return f"MPS, {platform.machine()}"
        case _:
            return f"CPU, {torch.get_num_threads()} threads"


def describe_data(experiment, device, material):
    """What will happen, as far as it is known before the weights are there: three lines."""
    counts = ", ".join(f"{len(material.messages[split]):,} {split}" for split in SPLITS)
    return "\n".join(
        [
            f"Device: {describe_device(device)}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
            f"tiktoken {tiktoken.__version__}",
            f"Data: {DATASET_NAMES[material.dataset]}; messages: {counts}",
            f"Tokens per message: {material.width} at most, {'not padded' if experiment.no_padding else 'padded'}",
        ]
    )


def describe_model(experiment, classifier):
    n_trained, n_frozen = (
        sum(p.numel() for p in classifier.parameters() if p.requires_grad == trained) for trained in (True, False)
    )
    return (
        f"Model: {experiment.model_size}, weights: {experiment.weights}, trained: {experiment.trainable_layers}; "
        f"{n_trained:,} trainable and {n_frozen:,} frozen parameters"
    )


def summarize(experiment, material, device, accuracies, minutes):
    """The run as a results.Result: its settings in the words of the table's columns."""
    width, dataset = material.width, material.dataset
    number = None
    if dataset == "uci":
        number = row_number(replace(experiment, weights="pretrained") if material.is_pretrained else experiment)
    layers, position = experiment.trainable_layers, experiment.trainable_token_pos
    if layers.startswith("lora"):
        layers += f" (rank {experiment.lora_rank}, alpha {experiment.lora_alpha:g})"
    if experiment.average_embeddings:
        position = "all tokens" if position == "last" and not experiment.no_padding else "all real tokens"
    context = f"{width}, no padding" if experiment.no_padding else f"{width}"
    if experiment.context_length == "longest_training_example":
        context = f"longest train ex. ({context})"
    remarks = {
        "averaged outputs": experiment.average_embeddings,
        "no causal mask": experiment.disable_causal_mask,
        f"batch size {experiment.batch_size}": experiment.batch_size != Experiment.batch_size,
        f"accumulation {experiment.accumulation_steps}": experiment.accumulation_steps > 1,
        f"epochs {experiment.num_epochs}": experiment.num_epochs != Experiment.num_epochs,
        f"learning rate {experiment.learning_rate:g}": experiment.learning_rate != Experiment.learning_rate,
        f"weight decay {experiment.weight_decay:g}": experiment.weight_decay != Experiment.weight_decay,
        f"ignore index {experiment.ignore_index}": experiment.ignore_index != Experiment.ignore_index,
        experiment.precision: experiment.precision != Experiment.precision,
        f"seed {experiment.seed}": experiment.seed != Experiment.seed,
        f"{DATASET_NAMES[dataset]}": dataset != "uci",
    }
    return results.Result(
        row=number,
        model_size=experiment.model_size,
        weights=experiment.weights,
        position=position,
        layers=layers,
        context=context,
        **accuracies,
        minutes=minutes,
        device=describe_device(device),
        remarks=", ".join(remark for remark, holds in remarks.items() if holds),
        published=ROWS[number].published if number else None,
    )


ACCURACY_PARTS = ("correct", "total", "fraction")


def make_record(experiment, material, result, run_id, spent):
    """The run as one line of the file of records."""
    return {
        "run": f"{run_id}-{experiment.seed}",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "row": result.row or "",
        "configuration": configuration(experiment, material.dataset, material.data_sha256),
        **asdict(experiment),
        "weights_sha256": material.weights_sha256 or "",
        "data": material.dataset,
        "data_sha256": material.data_sha256,
        "tokens_per_message": material.width,
        **{f"{split}_{part}": getattr(getattr(result, split), part) for split in SPLITS for part in ACCURACY_PARTS},
        "minutes": round(result.minutes, 4),
        "seconds": round(spent["total"], 2),
        "peak_memory_gb": round(spent["peak_memory"] / 1e9, 3) or "",  # not known on Windows
        "device_name": result.device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tiktoken": tiktoken.__version__,
        "pandas": pd.__version__,
    }


# Settings whose value does not say by itself what it is the value of.
IN_WORDS = {
    "trainable_token_pos": "{} token",
    "weights": "{} weights",
    "dataset": "{} data",
    "lora_rank": "rank {}",
    "lora_alpha": "alpha {:g}",
    "batch_size": "batch size {}",
    "accumulation_steps": "accumulation {}",
    "num_epochs": "{} epochs",
    "learning_rate": "learning rate {:g}",
    "weight_decay": "weight decay {:g}",
    "ignore_index": "ignore index {}",
    "context_length": "context: {}",
}


def in_words(options):
    """Options, a dict, as a reader would name them: `gpt2-xl (1558M), lora, rank 16`."""
    words = []
    for name, value in options.items():
        words.append((name if value is True else IN_WORDS.get(name, "{}").format(value)).replace("_", " "))
    return ", ".join(words) or "last block, last token"


def typed(options):
    """Options, a dict, as they are typed."""
    words = []
    for name, value in options.items():
        value = f"{value:g}" if isinstance(value, float) else f'"{value}"' if " " in str(value) else value
        words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words)


def configuration(experiment, dataset, data_sha256):
    """What differs from row 1, in words, whatever the seed and the machine. Other data of one's own are told apart."""
    options = {
        setting.name: getattr(experiment, setting.name)
        for setting in fields(experiment)
        if setting.name not in NO_PART_OF_A_ROW and getattr(experiment, setting.name) != setting.default
    }
    return in_words(options) + (f", own data {data_sha256[:8]}" if dataset == "own" else "")


def described_rows():
    """{number of the row: (its options as they are typed, the same in words, what was published)}."""
    return {n: (typed(row.options), in_words(row.options), row.published) for n, row in ROWS.items()}


def warn_of_memory(experiment, material, device, warn):
    """Say so before a run that cannot fit: what it needs is known, but for activations."""
    needs, free = memory_needs(experiment, len(material.labels), material.messages, device), free_memory(device)
    if sum(needs.values()) > free:
        items = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needs.items())
        warn(f"this run needs {sum(needs.values()) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: {items}")


def print_report(call):
    """`--report`: the table from a file of records, and its picture."""
    runs, broken = results.read_runs(call.report)
    print(results.report(runs, described_rows()))
    if broken:
        print(f"{call.report}: no whole record on line {', '.join(map(str, broken))}; left out", file=sys.stderr)
    if call.report_plot:
        results.plot_report(call.report_plot, runs, described_rows())


# --- runs that are cut off ---


def identity_of(experiment, material, device):
    """What makes a run the same run, by name: with any other value it would give other numbers."""
    elsewhere = ("weights", "device", "features", "data_dir")  # by their content, or without effect on numbers
    settings = {name: value for name, value in asdict(experiment).items() if name not in elsewhere}
    return settings | {
        "weights": material.weights_sha256 or "random",
        "device": device.type,
        "data": material.data_sha256,
    }


# --- using what was trained ---

CLASSIFIER = "saved classifier"


def frozen_sha256(classifier):
    """SHA-256 of what is not trained, as it was drawn or read."""
    return results.sha256_of_tensors({name: p for name, p in classifier.named_parameters() if not p.requires_grad})


def save_classifier(path, experiment, material, base_sha256, trained):
    """Write the trained parameters by name, and all else that is needed to use them. Raises OSError."""
    description = dict(
        settings=asdict(experiment),
        width=material.width,
        labels=material.labels,
        base_sha256=base_sha256,
        torch=torch.__version__,
    )
    results.write_tensors(path, CLASSIFIER, description, trained)


def load_classifier(path, given):
    """What `save_classifier` wrote, ready for use: (Classifier, its Experiment, labels, torch.device).

    `given` are options beside it. Raises FileError for a file that cannot be used, UsageError for a model size or
    base weights that are not those it was trained on.
    """
    description, trained = results.read_tensors(path, CLASSIFIER)
    settings = description["settings"] | dict(context_length=description["width"])
    if (size := given.get("model_size", settings["model_size"])) != settings["model_size"]:
        raise UsageError(f"--model_size {size}: {path} was trained on {settings['model_size']}")
    needs_base = settings["trainable_layers"] != "all"
    base = given.get("weights", settings["weights"]) if needs_base else "random"
    if base not in ("pretrained", "random") and not Path(base).is_file():
        raise UsageError(f"{path} was trained on {base}, which is not there; name the file with --weights")
    device = resolve_device(given.get("device", "cpu" if settings["device"] == "cpu" else "auto"))
    precision = "fp32" if settings["precision"] == "tf32" and device.type != "cuda" else settings["precision"]
    experiment = Experiment(**settings | dict(weights=base, device=device.type, precision=precision))
    set_precision(precision, device)

    def check_base(sha256):
        if needs_base and sha256 != description["base_sha256"]:
            raise UsageError(f"--weights {base}: {path} was trained on other weights (by their SHA-256)")

    weights = None
    if base == "pretrained":
        check_base(gpt_download.PRETRAINED[size].sha256)
        weights = gpt_download.open_weights(gpt_download.fetch_weights(size, sys.stderr.isatty()))
    elif base != "random":
        check_base(gpt_download.sha256_of(base))
        weights = open_weights_file(experiment)
    classifier = build_classifier(experiment, len(description["labels"]), weights)
    if weights is None:
        check_base(frozen_sha256(classifier))
    parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in parameters.items()} != {name: tensor.shape for name, tensor in trained.items()}:
        raise FileError(f"{path} does not hold the trained parameters that its settings name")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    classifier.to(device)
    prepare_frozen(classifier)
    return classifier.eval(), experiment, description["labels"], device


def predict_texts(classifier, experiment, texts, device):
    """Logits (n, K) of messages, treated as in training."""
    frame = pd.DataFrame(dict(Text=texts, Label=0))
    encoded, _ = encode(gpt_download.load_vocabulary(), {"texts": frame}, experiment)
    messages = encoded["texts"]
    if classifier.n_frozen > 0:
        messages = compute_features(classifier, messages, device, device, bar=tqdm(disable=True))
    return predict(classifier, messages, torch.arange(len(messages)), device)


TEXTS_AT_ONCE = 1000


def classify(call, given):
    """`--classify`: label, probability and message, with tabs between them, for each message."""
    texts = list(call.classify)
    if texts == ["-"]:
        try:
            texts = [line.rstrip("\r\n") for line in io.TextIOWrapper(sys.stdin.buffer, "utf-8", newline="\n")]
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 text ({error.reason})") from None
    if not texts:
        raise UsageError("there is no message on standard input")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UsageError(f"message {number} is empty")
    classifier, experiment, labels, device = load_classifier(call.load_model, given)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        probabilities = predict_texts(classifier, experiment, some, device).softmax(-1)
        for text, probability, best in zip(some, *(part.tolist() for part in probabilities.max(-1))):
            print(f"{labels[best]}\t{probability:.4f}\t{text}")


# --- main ---


def open_weights_file(experiment):
    """The tensors of `--weights FILE` by name, seen to be those of the model before anything else is done."""
    tensors = gpt_download.open_weights(experiment.weights)
    try:
        with torch.device("meta"):
            load_gpt2_weights(GPTModel(experiment.config), tensors)
    except WeightsError as error:
        raise UsageError(f"--weights {experiment.weights} does not fit {experiment.model_size}: {error}") from None
    return tensors


class Screen:
    """What a run prints: rows and warnings always, the rest unless it is to be quiet."""

    def __init__(self, quiet):
        self.quiet = quiet
        self.progress = sys.stderr.isatty() and not quiet

    def show(self, line):
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()  # into a pipe or a log file too: a run that is killed is to leave what it said

    def say(self, line):
        if not self.quiet:
            self.show(line)

    def warn(self, line):
        tqdm.write(f"warning: {line}", file=sys.stderr)


class NotKept(RuntimeError):
    """The run is through, but not all that was to be kept of it could be written."""


def fine_tune(classifier, features, experiment, device, say, progress, state=None, lifeline=None):
    """From the built classifier to its final accuracies: ({split: results.Accuracy}, minutes of training, its state).

    Goes on from where the run was cut off, if the lifeline knows of it.
    """
    torch.manual_seed(experiment.seed)
    state, lifeline = state or TrainingState(classifier, experiment, device), lifeline or results.Lifeline()
    if lifeline.take_up(state):
        say(f"Going on from {lifeline.path}, after {state.n_batches:,} batches; what was printed before:")
        for line in state.history.lines:
            say(line)
    train(classifier, features, experiment, device, say, progress, state, lifeline)
    minutes = state.spent()["training"] / 60

    def tell(line):
        state.history.lines.append(line)
        say(line)

    tell(f"Training completed in {minutes:.2f} minutes.")
    accuracies = {}
    for split, name in results.SPLITS.items():
        loader = make_loader(features[split], experiment.batch_size, shuffle=split == "train")
        accuracies[split] = accuracy(predict_batches(classifier, features[split], loader, device))
        tell(f"{name} accuracy: {accuracies[split].in_full}")
    return accuracies, minutes, state


@dataclass
class Finished:
    """What is kept of a seed that is through; JSON can hold it."""

    record: dict
    accuracies: dict  # of each split, a results.Accuracy as a dict
    minutes: float
    history: dict  # a History as a dict
    base_sha256: str | None  # of the weights that are not trained


def run_seed(experiment, material, weights, features, device, screen, lifeline):
    """One seed from its weights to its accuracies: (Finished, trained parameters by name, features)."""
    begun = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    classifier = build_classifier(experiment, len(material.labels), weights)
    base_sha256 = material.weights_sha256 or frozen_sha256(classifier)
    classifier.to(device)
    prepare_frozen(classifier)
    screen.say(describe_model(experiment, classifier))

    training_begun = time.perf_counter()
    if features is None:
        features = keep_features(classifier, material.messages, experiment, device, screen.say, screen.progress)
    kept = "worked out anew" if features is material.messages and classifier.n_frozen else "kept"
    lifeline.circumstances = dict(device=describe_device(device), PyTorch=torch.__version__, features=kept)
    state = TrainingState(classifier, experiment, device, begun, training_begun)
    accuracies, minutes, state = fine_tune(
        classifier, features, experiment, device, screen.say, screen.progress, state, lifeline
    )
    result = summarize(experiment, material, device, accuracies, minutes)
    finished = Finished(
        record=make_record(experiment, material, result, lifeline.run_id, state.spent()),
        accuracies={split: asdict(accuracies[split]) for split in SPLITS},
        minutes=minutes,
        history=asdict(state.history),
        base_sha256=base_sha256,
    )
    return finished, state.trained, features


def run(experiment, call=Call()):
    """One experiment from its settings to its printed row, with `call.repeats` seeds one after another.

    Returns [(results.Result, History), ...]. Raises NotKept, at the very end, where something could not be written.
    """
    screen = Screen(call.quiet)
    device = resolve_device(experiment.device)
    set_precision(experiment.precision, device)
    weights = None
    if experiment.weights not in ("pretrained", "random"):
        weights = open_weights_file(experiment)
    material = gather(experiment, screen.progress)
    screen.say(describe_data(experiment, device, material))
    identity = identity_of(experiment, material, device)
    lifeline = results.Lifeline(call.checkpoint, call.checkpoint_minutes, identity, screen.warn)
    if call.checkpoint is not None and not call.restart:
        lifeline.load()
        if call.save_model is not None and lifeline.finished and (len(lifeline.finished) > 1 or lifeline.cut_off):
            held = experiment.seed + len(lifeline.finished) - (lifeline.cut_off is None)
            raise UsageError(f"--save_model: {call.checkpoint} holds seed {held} and has let go of the one before")
    warn_of_memory(experiment, material, device, screen.warn)
    if experiment.weights == "pretrained":
        weights = gpt_download.open_weights(gpt_download.fetch_weights(experiment.model_size, screen.progress))

    not_kept, ended = [], []

    def keep(what, path, write, *arguments):
        try:
            return write(path, *arguments)
        except OSError as error:
            not_kept.append(f"{what} could not be written to {path}: {error.strerror or error}")
            screen.warn(not_kept[-1])

    def end(finished, trained):
        """Show the row of a seed that is through, and keep what is to be kept of it."""
        one = replace(experiment, seed=finished.record["seed"])
        accuracies = {split: results.Accuracy(**finished.accuracies[split]) for split in SPLITS}
        result = summarize(one, material, device, accuracies, finished.minutes)
        ended.append((result, History.from_dict(finished.history)))
        screen.say("\n" + results.markdown_header(result))
        screen.show(results.markdown_row(result))
        if call.results_file:
            path = keep("the record", call.results_file, results.append_record, finished.record)
            if path not in (None, Path(call.results_file)):
                screen.warn(f"{call.results_file} has other columns and stays as it is; the record is in {path}")
        if call.save_model is not None:
            keep("the classifier", call.save_model, save_classifier, one, material, finished.base_sha256, trained)

    try:
        with lifeline:
            for entry in lifeline.finished[: call.repeats]:
                screen.say(f"Finished before, says {call.checkpoint}; what was printed:")
                for line in entry["history"]["lines"]:
                    screen.say(line)
                trained = {name.removeprefix("model."): tensor for name, tensor in lifeline.last_trained.items()}
                end(Finished(**entry), trained)
            features = trained = None
            for number in range(len(lifeline.finished), call.repeats):
                if weights is None:  # random ones, which change with the seed, and the features with them
                    features = None
                trained = None  # with it the last seed's classifier goes before there is another
                finished, trained, features = run_seed(
                    replace(experiment, seed=experiment.seed + number),
                    material,
                    weights,
                    features,
                    device,
                    screen,
                    lifeline,
                )
                end(finished, trained)
                lifeline.finish(asdict(finished))
    except KeyboardInterrupt as error:
        if lifeline.is_ours:
            command = "the same command without --restart" if call.restart else "the same command"
            error.args = (f"interrupted; {command} goes on from {call.checkpoint}",)
        raise

    if call.repeats > 1:
        several = [result for result, _ in ended]
        screen.say("\n" + results.markdown_header(several[0]))
        screen.show(results.markdown_mean_row(several))
    if call.plot is not None:
        per_epoch = len(make_loader(material.messages["train"], experiment.batch_size, shuffle=True))
        histories = [history for _, history in ended]
        keep("the picture", call.plot, results.plot_history, histories, per_epoch, experiment.batch_size)
    if not_kept:
        raise NotKept("; ".join(not_kept))
    return ended


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED")
OUT_OF_MEMORY_ADVICE = (
    "Ways on: a smaller --batch_size with more --accumulation_steps (the product is what counts); to train less,\n"
    "--trainable_layers lora or last_block; --trainable_token_pos flexible or a smaller --context_length;\n"
    "--features host or off; --precision bf16; a smaller --model_size"
)


def main(argv=None):
    """Run the command line and return the exit status.

    0; 1: something could not be had or kept; 2: something cannot be used; 130: Ctrl-C; 143: SIGTERM; 129: SIGHUP.
    """
    try:
        experiment, call, given = parse_args(argv)
        if call.report is not None:
            print_report(call)
        elif call.load_model is not None:
            classify(call, given)
        else:
            run(experiment, call)
    except (UsageError, FileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except NotKept as error:
        print(f"error: the run is through, but {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        print(f"error: out of memory\n{OUT_OF_MEMORY_ADVICE}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(error.args[0] if error.args else "interrupted", file=sys.stderr)
        return 128 + (error.number if isinstance(error, results.Terminated) else signal.SIGINT)
    except BrokenPipeError:  # whoever read the output has gone; Python's own last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that is gone: nothing of it is a fault of the program
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # a terminal without an en dash shows a question mark for it
        stream.reconfigure(errors="replace")
    sys.exit(main())
