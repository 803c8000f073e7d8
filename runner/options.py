"""From dataclass fields to the command line: what a call does, and which options can be combined."""

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

from gpt_download import COLLECTION_NAMES
from previous_chapters import GPT_SIZES, GPTConfig
from runner.data.datasets import SPLITS
from runner.files import UserError
from runner.machine import processes
from runner.rows import DEMO, ROWS
from runner.saved.export import check_experiment, check_folder
from runner.wording import command_line

# --- options as fields ---

# The headings of --help.
MODEL, INPUT, TRAINING, DATA = "model", "input", "training", "data"
MACHINE, RESULTS, INTERRUPTION, USE = "machine", "results", "interrupted runs", "using a trained classifier"


def option(default, group, help, **arguments):
    """A dataclass field that is an option of the command line, a bool a switch; `arguments` are those of argparse."""
    return field(default=default, metadata=dict(group=group, help=help, **arguments))


def check_values(settings):
    """Raises UserError for a field of a dataclass of options with a value that the command line would not give it."""
    for setting in fields(settings):
        value, arguments = getattr(settings, setting.name), setting.metadata
        parse, choices = arguments.get("type", str), arguments.get("choices")
        items = value if "nargs" in arguments and isinstance(value, tuple | list) else [value]
        try:
            is_right = value is setting.default or all(parse(str(item)) == item for item in items)
            is_right = isinstance(value, bool) if setting.type is bool else is_right
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--{setting.name}: {error}") from None
        if not is_right or choices and value not in choices:
            hint = f"; choose from {', '.join(choices)}" if choices else ""
            raise UserError(f"--{setting.name} does not take {value!r}{hint}")


# --- single values ---
#
# A parser returns the value of a text, or raises argparse.ArgumentTypeError that says what is wrong with it.

MAX_CONTEXT = GPTConfig.context_length
IMAGE_FORMATS = (".png", ".pdf", ".svg")


def number(kind, minimum=-(2**63), maximum=2**63 - 1):
    """A parser of whole or finite numbers (`kind` int or float) in a range, by default that of an int64."""

    def parse(text):
        with suppress(ValueError):
            if minimum <= (value := kind(text)) <= maximum:
                return value
        bounds = f"from {minimum} to {maximum}" if maximum < 2**63 - 1 else f"of at least {minimum}"
        raise argparse.ArgumentTypeError(f'"{text}" is not a {"whole" if kind is int else "finite"} number {bounds}')

    return parse


def model_size(text):
    """The name of a model size, from itself or a part of it: "gpt2-xl (1558M)", "gpt2-xl" or "xl"."""
    for name in GPT_SIZES:
        word = name.split(" ")[0]
        if text in (name, word, word.removeprefix("gpt2-")):
            return name
    raise argparse.ArgumentTypeError(f'"{text}" is none of {", ".join(GPT_SIZES)}')


def context_length(text):
    """A number of tokens, or the name of one."""
    if text in (names := ("longest_training_example", "model_context_length")):
        return text
    try:
        return number(int, 1, MAX_CONTEXT)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor {' or '.join(names)}") from None


def file_with(*suffixes):
    """A parser of the path of a file with one of these suffixes."""

    def parse(text):
        if Path(text).suffix not in suffixes:
            raise argparse.ArgumentTypeError(f'"{text}" does not end in {", ".join(suffixes)}')
        return text

    return parse


@dataclass(frozen=True)
class RunOptions:
    """What one call does besides its experiment, or instead of it. No number of a seed depends on it.

    Raises UserError for options that cannot be combined.
    """

    quiet: bool = option(False, RESULTS, "print finished rows only")
    results: str = option("results", RESULTS, 'folder for a record of each finished run; "" for none', metavar="DIR")
    skip_finished: bool = option(False, RESULTS, "do not train a run whose record is in --results, print its row")
    note: str = option("", RESULTS, "a remark kept with the record and shown in the report", metavar="TEXT")
    repeats: int = option(1, RESULTS, "runs, with --seed, --seed + 1, ..., and their mean", type=number(int, 1))
    plot: str | None = option(
        None, RESULTS, "draw losses and accuracies (.png, .pdf, .svg)", type=file_with(*IMAGE_FORMATS), metavar="FILE"
    )
    report: tuple | None = option(
        None,
        RESULTS,
        "train nothing; print the table of all runs in --results or these folders",
        nargs="*",
        metavar="DIR",
    )
    write: tuple = option(
        (),
        RESULTS,
        "the report as a page (.html), text (.md), data (.csv), LaTeX (.tex) or picture (.png, .pdf, .svg)",
        nargs="+",
        action="extend",
        type=file_with(".html", ".md", ".csv", ".tex", *IMAGE_FORMATS),
        metavar="FILE",
    )
    baseline: bool = option(False, RESULTS, "instead of GPT-2 train two linear models on words and letters")
    feature_cache: str | None = option(
        None, MACHINE, 'folder for frozen features (default: features in --data_dir); "" for none', metavar="DIR"
    )
    feature_cache_gb: float = option(5.0, MACHINE, "what it may hold; least recently used go", type=number(float, 0))
    activation_checkpointing: bool = option(False, MACHINE, "compute blocks again in the backward pass, to save memory")
    shard: bool = option(False, MACHINE, "with torchrun: each process holds a part of model and optimizer (FSDP2)")
    checkpoint: str | None = option(
        None,
        INTERRUPTION,
        "save training in FILE after each epoch and on Ctrl-C; the same command resumes it",
        metavar="FILE",
    )
    checkpoint_minutes: float = option(10.0, INTERRUPTION, "between checkpoints within an epoch", type=number(float, 0))
    save_model: str | None = option(None, USE, "write what was trained and its settings (.safetensors)", metavar="FILE")
    export: str | None = option(None, USE, "write the classifier to a folder that transformers loads", metavar="DIR")
    load_model: str | None = option(
        None, USE, "train nothing; use what --save_model wrote (with --weights FILE if that has moved)", metavar="FILE"
    )
    classify: tuple = option(
        (), USE, "messages for --load_model; - for lines of standard input", nargs="+", action="extend", metavar="TEXT"
    )

    def __post_init__(self):
        check_values(self)
        for name, needed in (("write", "report"), ("classify", "load_model")):
            if getattr(self, name) and getattr(self, needed) is None:
                raise UserError(f"--{name} needs --{needed}")
        if self.shard and not processes.is_launched():
            raise UserError("--shard needs several processes: torchrun --nproc_per_node N additional_experiments.py")
        if self.shard and torch.__version__ < "2.8":  # a TorchVersion, which knows that 2.10 is later
            raise UserError(f"--shard needs PyTorch 2.8 or later; this is {torch.__version__}")
        if self.load_model is not None and not self.classify and self.export is None:
            raise UserError("--load_model needs --classify or --export")
        if (self.save_model or self.export) and self.repeats > 1:
            raise UserError("--save_model and --export are for one classifier, --repeats trains several")
        if self.skip_finished and (not self.results or self.save_model or self.export):
            raise UserError("--skip_finished needs --results, and cannot be combined with --save_model or --export")


# --- files, before any time is spent ---


def check_files(run_options, inputs):
    """Raises UserError where an output cannot be written, or would overwrite another one or what is read, `inputs`."""
    if run_options.export is not None:
        check_folder(run_options.export)
    outputs = [(name, getattr(run_options, name)) for name in ("checkpoint", "save_model", "plot", "export")]
    outputs += [("write", path) for path in run_options.write]
    if run_options.results and run_options.report is None:
        outputs.append(("results", run_options.results))
    taken = {os.path.realpath(path).casefold(): what for path, what in inputs.items()}
    for name, path in outputs:
        if path is not None:
            target, is_folder = Path(os.path.realpath(path)), name in ("export", "results")
            try:
                with tempfile.TemporaryFile(dir=target if is_folder and target.exists() else target.parent) as file:
                    file.write(bytes(4096))  # the disk is not full
            except OSError as error:
                raise UserError(f"--{name} {path} cannot be written: {error.strerror or error}") from None
            is_right = target.is_dir() if is_folder else target.is_file()
            if target.is_symlink() or target.exists() and not is_right:  # a link that leads back to itself stays one
                raise UserError(f"--{name} {path} is not a {'folder' if is_folder else 'regular file'}")
            file_name = str(target).casefold()  # as on macOS and Windows
            if what := taken.get(file_name):
                raise UserError(f"--{name} {path} would overwrite {what}")
            taken[file_name] = f"--{name}"


# --- the command line ---

# The options that can be combined with one that trains nothing.
COMPANIONS = {
    "report": ("write", "results"),
    "baseline": ("data_dir", "dataset", "ignore_index", "results", "note", "quiet"),
    "load_model": ("classify", "export", "weights", "device"),
}

DESCRIPTION = """Fine-tune GPT-2 as a spam classifier: one configuration, one row of the table.

examples:
  python additional_experiments.py --demo       # a toy model, without network
  python additional_experiments.py --row 16     # row 16 of the table, see below
  python additional_experiments.py --model_size xl --trainable_layers lora"""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are a UserError: one line."""

    def error(self, message):  # argparse's own prints the whole usage before the one line that matters
        raise UserError(f"{message} (--help lists the options)")

    def parse(self, argv):
        """What a command line says, {name: value}; --batch-size is --batch_size, a misprint gets the nearest name."""
        argv = [re.sub(r"^--[\w-]+(?==|$)", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
        given, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            options = [option for option in self._option_string_actions if option.startswith("--")]
            longer = [option for option in options if option.startswith(name)]
            nearest = (longer or difflib.get_close_matches(name, options, cutoff=0.5))[:1]
            self.error("; the nearest is ".join([f"there is no option {unknown[0]}", *nearest]))
        return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


def make_parser(experiment_type):
    """The parser of all options: presets, and the fields of `experiment_type` and of RunOptions by their headings."""
    rows = (f"  {n:2}  {command_line(row.options) or 'the defaults'}" for n, row in ROWS.items())
    parser = Parser(
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog="\n".join(["rows of the table:", *rows]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
        argument_default=argparse.SUPPRESS,  # so that options given can be told from defaults and presets
        allow_abbrev=False,
    )
    presets = parser.add_argument_group("presets").add_mutually_exclusive_group()
    row = presets.add_argument("--row", type=number(int, 1, len(ROWS)), metavar="N")
    row.help = f"row N, 1 to {len(ROWS)}, of the table; other options override it"
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


def parse(argv, experiment_type):
    """A command line as (Experiment, RunOptions, the options of the experiment that were given).

    The Experiment is None where nothing is to be trained. Raises UserError.
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
        check_files(run_options, dict.fromkeys(filter(None, [run_options.load_model]), "the classifier"))
        return None, run_options, given
    presets = DEMO if given.pop("demo", False) else ROWS[given.pop("row", 1)].options
    settings = presets | given
    if settings.get("dataset") == "sample" and "data_dir" in given:
        raise UserError("--data_dir is not read with the sample; add --dataset uci, or leave --data_dir out")
    experiment = experiment_type(**settings)
    if run_options.export is not None:
        check_experiment(experiment)
    data = (Path(experiment.data_dir, name) for name in (*(f"{split}.csv" for split in SPLITS), *COLLECTION_NAMES))
    check_files(run_options, dict.fromkeys(data, "the data") | {experiment.weights: "the weights"})
    return experiment, run_options, given
