"""From dataclass fields to the command line: the parser, values, and which options can be combined."""

import argparse
import difflib
import os
import re
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from previous_chapters import GPT_SIZES, GPTConfig
from runner.data.datasets import FEATURES, possible_inputs
from runner.files import UserError
from runner.machine import processes
from runner.rows import DEMO, ROWS
from runner.saved.export import check_experiment, check_folder
from runner.wording import command_line, printable

# --- options as fields ---

# The headings of --help.
MODEL, INPUT, TRAINING, DATA = "model", "input", "training", "data"
MACHINE, RESULTS, INTERRUPTION, USE = "machine", "results", "interrupted runs", "using a trained classifier"


def option(default, group, help, **arguments):
    """Return a dataclass field that is a command-line option; `arguments` are those of argparse. A bool is a switch."""
    return field(default=default, metadata=dict(group=group, help=help, **arguments))


def normalize(settings):
    """Replace each field of a frozen dataclass of options by what the command line would make of it.

    So `model_size="xl"`, `lora_alpha=16`, a Path and a NumPy number are accepted. Raises UserError for other values.
    """
    for setting in fields(settings):
        value, arguments = getattr(settings, setting.name), setting.metadata
        if value is setting.default:
            continue
        parse, choices = arguments.get("type", str), arguments.get("choices")
        try:
            if setting.type is bool:
                value = {True: True, False: False}[value]
            elif "nargs" in arguments:
                value = tuple(parse(str(item)) for item in value)
            elif value is None or (value := parse(str(value))) not in (choices or [value]):
                raise KeyError
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--{setting.name}: {error}") from None
        except (KeyError, TypeError):
            hint = f"; choose from {', '.join(choices)}" if choices else ""
            raise UserError(f"--{setting.name} does not take {value!r}{hint}") from None
        object.__setattr__(settings, setting.name, value)


# --- single values ---
#
# Each function is a type for argparse: it returns the value of a text or raises argparse.ArgumentTypeError.

MAX_CONTEXT = GPTConfig.context_length
IMAGE_FORMATS = (".png", ".pdf", ".svg")
ONE_ROW = "one row per command; for several see All rows in README.md"


def bounded(kind, minimum=-(2**63), maximum=2**63 - 1):
    """Return a type for whole or finite numbers (`kind` int or float) in a range, by default that of an int64."""

    def parse(text):
        value = None
        with suppress(ValueError):
            if minimum <= (value := kind(text)) <= maximum:
                return value
        bounds = f"of at least {minimum}"
        if maximum < 2**63 - 1:
            bounds = f"from {minimum} to {maximum}"
        elif value is not None and value > maximum:
            bounds = f"of at most {maximum:.4g}"
        raise argparse.ArgumentTypeError(f'"{text}" is not a {"whole" if kind is int else "finite"} number {bounds}')

    return parse


def row_number(text):
    """Return the number of a row."""
    try:
        return bounded(int, 1, len(ROWS))(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; {ONE_ROW}" if re.search("[, ]", text) else str(error)) from None


def model_size(text):
    """Return the name of a model size from "gpt2-xl (1558M)", "gpt2-xl" or "xl"."""
    for name in GPT_SIZES:
        word = name.split(" ")[0]
        if text in (name, word, word.removeprefix("gpt2-")):
            return name
    raise argparse.ArgumentTypeError(f'"{text}" is none of {", ".join(GPT_SIZES)}')


def context_length(text):
    """Return a number of tokens, or the name of one."""
    if text in (names := ("longest_training_example", "model_context_length")):
        return text
    try:
        return bounded(int, 1, MAX_CONTEXT)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor {' or '.join(names)}") from None


def file_with(*suffixes):
    """Return a type for the path of a file with one of these suffixes."""

    def parse(text):
        if Path(text).suffix not in suffixes:
            raise argparse.ArgumentTypeError(f'"{text}" does not end in {", ".join(suffixes)}')
        return text

    return parse


@dataclass(frozen=True)
class RunOptions:
    """What a call does besides its experiment, or instead of it; the results of a seed do not depend on it.

    Raises UserError for values that an option does not take, and for options that cannot be combined.
    """

    quiet: bool = option(False, RESULTS, "print only finished rows and warnings")
    results: str = option("results", RESULTS, 'folder for a record of each finished run; "" for none', metavar="DIR")
    skip_finished: bool = option(False, RESULTS, "do not repeat a run whose record is in --results; print its row")
    note: str = option("", RESULTS, "a remark kept with the record and shown in the report", metavar="TEXT")
    repeats: int = option(
        1, RESULTS, "number of runs, with --seed, --seed + 1, ...; prints their mean", type=bounded(int, 1)
    )
    plot: str | None = option(
        None, RESULTS, "draw losses and accuracies (.png, .pdf, .svg)", type=file_with(*IMAGE_FORMATS), metavar="FILE"
    )
    predictions: str | None = option(
        None,
        RESULTS,
        "write label, prediction and probabilities of each validation and test message (.csv)",
        type=file_with(".csv"),
        metavar="FILE",
    )
    report: tuple | None = option(
        None,
        RESULTS,
        "train nothing; print a report of all runs in --results or these folders",
        nargs="*",
        metavar="DIR",
    )
    write: tuple = option(
        (),
        RESULTS,
        "write the report as a page (.html), text (.md), data (.csv), LaTeX (.tex) or picture (.png, .pdf, .svg)",
        nargs="+",
        action="extend",
        type=file_with(".html", ".md", ".csv", ".tex", *IMAGE_FORMATS),
        metavar="FILE",
    )
    baseline: bool = option(False, RESULTS, "train two linear models on words and letters instead of GPT-2")
    feature_cache: str | None = option(
        None, MACHINE, 'folder for frozen features (default: features in --data_dir); "" for none', metavar="DIR"
    )
    feature_cache_gb: float = option(
        5.0, MACHINE, "its maximum size; the least recently used files are removed", type=bounded(float, 0)
    )
    checkpoint: str | None = option(
        None,
        INTERRUPTION,
        "file for the state of training, from which the same command resumes; also written on Ctrl-C and SIGTERM, and "
        "kept after the run",
        metavar="FILE",
    )
    checkpoint_minutes: float = option(
        10.0, INTERRUPTION, "minutes between checkpoints in an epoch", type=bounded(float, 0)
    )
    save_model: str | None = option(
        None,
        USE,
        "write the trained parameters and settings (.safetensors)",
        type=file_with(".safetensors"),
        metavar="FILE",
    )
    export: str | None = option(None, USE, "write the classifier to a folder that transformers loads", metavar="DIR")
    load_model: str | None = option(
        None,
        USE,
        "train nothing; use a file that --save_model wrote (--weights FILE if its weights have moved)",
        metavar="FILE",
    )
    classify: tuple = option(
        (),
        USE,
        "classify these messages with --load_model; - reads lines of standard input; or a .csv or .tsv file",
        nargs="+",
        action="extend",
        metavar="TEXT",
    )

    def __post_init__(self):
        normalize(self)
        for name, needed in (("write", "report"), ("classify", "load_model")):
            if getattr(self, name) and getattr(self, needed) is None:
                raise UserError(f"--{name} needs --{needed}")
        if self.load_model is not None and not self.classify and self.export is None:
            raise UserError("--load_model needs --classify or --export")
        outputs = "--save_model, --export and --predictions"  # of one trained classifier
        has_outputs = self.save_model or self.export or self.predictions
        if has_outputs and self.repeats > 1:
            raise UserError(f"{outputs} are for one classifier; --repeats trains several")
        if self.skip_finished and has_outputs:
            raise UserError(f"--skip_finished cannot be combined with {outputs}")
        if self.skip_finished and not self.results:
            raise UserError("--skip_finished needs --results")
        if self.checkpoint and self.repeats > 1 and not self.results:
            raise UserError("--checkpoint with --repeats needs --results, whose records show which seeds are finished")

    def feature_folder(self, data_dir):
        """Return the folder in which frozen features are kept, or None."""
        folder = Path(data_dir).parent if os.path.isfile(data_dir) else Path(data_dir)
        return folder / FEATURES if self.feature_cache is None else self.feature_cache or None


def check_shard(shard):
    """Raise UserError if --shard cannot work here."""
    if shard and not processes.is_launched():
        raise UserError("--shard needs several processes: torchrun --nproc_per_node N additional_experiments.py")
    if shard and torch.__version__ < "2.8":  # a TorchVersion, which knows that 2.10 is later
        raise UserError(f"--shard needs PyTorch 2.8 or later; this is {torch.__version__}")


# --- files, before any time is spent ---


def check_outputs(run_options, experiment=None):
    """Raise UserError if an output cannot be written, or would overwrite another output or an input.

    The inputs are those of the experiment or, without one, the classifier of --load_model.
    """
    inputs = {run_options.load_model: "the classifier"}
    if experiment is not None:
        inputs = dict.fromkeys(possible_inputs(experiment.data_dir), "the data")
        inputs |= {experiment.weights: "the weights"}
        if experiment.features == "disk" and run_options.feature_folder(experiment.data_dir) is None:
            raise UserError('--features disk needs a --feature_cache; "" is none')
    taken = {os.path.realpath(path).casefold(): what for path, what in inputs.items() if path is not None}
    if run_options.export is not None:
        check_folder(run_options.export)
        if experiment is not None:
            check_experiment(experiment)
    names = ("checkpoint", "save_model", "plot", "predictions", "export")
    outputs = [(name, getattr(run_options, name)) for name in names]
    outputs += [("write", path) for path in run_options.write]
    if run_options.results and experiment is not None:
        outputs.append(("results", run_options.results))
    for name, path in outputs:
        if path is not None:
            target, is_folder = Path(os.path.realpath(path)), name in ("export", "results")
            try:
                with tempfile.TemporaryFile(dir=target if is_folder and target.exists() else target.parent) as file:
                    file.write(bytes(4096))  # fails on a full disk
            except OSError as error:
                raise UserError(f"--{name} {path} cannot be written: {error.strerror or error}") from None
            is_right = target.is_dir() if is_folder else target.is_file()
            if os.path.lexists(target) and not is_right:  # `exists` is False for a link to itself
                raise UserError(f"--{name} {path} is not a {'folder' if is_folder else 'regular file'}")
            key = str(target).casefold()  # as on macOS and Windows
            if what := taken.get(key):
                raise UserError(f"--{name} {path} would overwrite {what}")
            taken[key] = f"--{name}"


# --- the command line ---

# Options that train no GPT-2, and the options that can be combined with them.
COMPANIONS = {
    "report": ("write", "results"),
    "baseline": ("data_dir", "dataset", "text_column", "label_column", "ignore_index", "results", "note", "quiet"),
    "load_model": ("classify", "export", "weights", "device", "text_column", "label_column", "quiet"),
}

# Names that other programs have for options, or that users may expect.
OTHER_NAMES = dict(lr="learning_rate", wd="weight_decay", bs="batch_size", output_dir="results")
OTHER_NAMES |= dict(text="classify or --text_column")

DESCRIPTION = """Fine-tune GPT-2 as a spam classifier: one configuration, one row of the table.

examples:
  python additional_experiments.py --demo       # a toy model, without network
  python additional_experiments.py --row 16     # row 16 of the table, see below
  python additional_experiments.py --model_size xl --trainable_layers lora"""


STATUSES = """exit status: 0 success; 1 a download, an output, memory or training failed;
2 an option or a file cannot be used; 128 + the signal when interrupted"""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors of one line."""

    def error(self, message):  # argparse prints the whole usage before the line that matters
        raise UserError(f"{message} (--help lists the options)")

    def parse(self, argv):
        """Return the given options {name: value}. Dashes count as underscores; an error names the nearest option."""
        for word in argv:
            if any("\ud800" <= c <= "\udfff" for c in word):
                self.error(f"an argument is not Unicode text: {printable(word)}")
        argv = [re.sub(r"^--[\w-]+(?==|$)", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
        given, unknown = self.parse_known_args(argv)
        if unknown and not unknown[0].startswith("-"):
            self.error(f"unexpected argument {printable(unknown[0])}" + f"; {ONE_ROW}" * ("row" in vars(given)))
        if unknown:
            name = unknown[0].split("=")[0].strip("-")
            options = [option.strip("-") for option in self._option_string_actions]
            longer = [option for option in options if option.startswith(name)]
            known = [OTHER_NAMES[name]] if name in OTHER_NAMES else longer
            nearest = (known or difflib.get_close_matches(name, options, cutoff=2 / 3))[:1]
            self.error("; the nearest is --".join([f"there is no option {unknown[0]}", *nearest]))
        return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


def make_parser(experiment_type):
    """Return the parser of the presets and of the fields of `experiment_type` and RunOptions, under their headings."""
    rows = (f"  {n:2}  {command_line(row.options) or 'the defaults'}" for n, row in ROWS.items())
    parser = Parser(
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog="\n".join([STATUSES, "", "rows of the table:", *rows]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
        argument_default=argparse.SUPPRESS,  # distinguishes given options from defaults and presets
        allow_abbrev=False,
    )
    presets = parser.add_argument_group("presets").add_mutually_exclusive_group()
    row = presets.add_argument("--row", type=row_number, metavar="N")
    row.help = f"row N of the table, 1 to {len(ROWS)}; other options override it"
    presets.add_argument("--demo", action="store_true", help="a toy run of half a minute without network")
    groups = {}
    for setting in (*fields(experiment_type), *fields(RunOptions)):
        arguments = dict(setting.metadata)
        heading = arguments.pop("group")
        if setting.type is bool:
            arguments["action"] = "store_true"
        else:
            arguments.setdefault("metavar", "N" if setting.type in (int, float) else "X")
        if setting.default not in (False, None, (), ""):
            choices = f"{', '.join(arguments['choices'])}; " if "choices" in arguments else ""
            arguments["help"] += f" ({choices}default: {setting.default})"
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(f"--{setting.name}", **arguments)
    return parser


def parse(experiment_type, argv=None):
    """Return (Experiment or None, RunOptions, options of the experiment that were given {name: value}).

    The Experiment is None if nothing is to be trained. Raises UserError.
    """
    given = make_parser(experiment_type).parse(sys.argv[1:] if argv is None else argv)
    for mode in COMPANIONS.keys() & given.keys():
        if refused := sorted(given.keys() - {mode, *COMPANIONS[mode]}):
            what = "trains no GPT-2" if mode == "baseline" else "trains nothing"
            raise UserError(f"--{refused[0]} cannot be combined with --{mode}, which {what}")
        if processes.world_size() > 1:
            raise UserError(f"--{mode} runs in one process: call it without torchrun")
    run_options = RunOptions(**{name: given.pop(name) for name in vars(RunOptions()) if name in given})
    if run_options.report is not None or run_options.load_model is not None:
        return None, run_options, given
    presets = DEMO if given.pop("demo", False) else ROWS[given.pop("row", 1)].options
    settings = presets | given
    if settings.get("dataset") == "sample" and "data_dir" in given:
        raise UserError("--data_dir is not read with the sample; add --dataset uci, or leave --data_dir out")
    return experiment_type(**settings), run_options, given
