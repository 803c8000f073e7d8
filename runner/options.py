"""From dataclass fields to the command line: what a call does, and which options can be combined."""

import argparse
import difflib
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from gpt_download import COLLECTION_NAMES
from previous_chapters import GPT_SIZES, GPTConfig
from runner.data.datasets import SPLITS
from runner.files import UserError, check_writable
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
            if setting.type is bool:
                is_right = isinstance(value, bool)
            else:
                is_right = value is setting.default is None or all(parse(str(item)) == item for item in items)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--{setting.name}: {error}") from None
        if not is_right or choices and value not in choices:
            hint = f"; choose from {', '.join(choices)}" if choices else ""
            raise UserError(f"--{setting.name} does not take {value!r}{hint}")


# --- single values ---
#
# A parser returns the value of a text, or raises argparse.ArgumentTypeError that says what is wrong with it.


def number(kind, minimum=-math.inf, above=-math.inf, maximum=math.inf):
    """A parser of finite numbers of `kind` (int or float) from `minimum` to `maximum`; whole ones fit into an int64."""
    if kind is int:
        minimum, maximum = max(minimum, -(2**63)), min(maximum, 2**63 - 1)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not -math.inf < value < math.inf:  # neither is NaN
            raise argparse.ArgumentTypeError(f'"{text}" is not a {"whole" if kind is int else "finite"} number')
        if value <= above:
            raise argparse.ArgumentTypeError(f"{value} is not greater than {above}")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is more than {maximum}")
        return value

    return parse


def model_size(text):
    """The name of a model size, from itself or a part of it: "gpt2-xl (1558M)", "gpt2-xl" or "xl"."""
    for name in GPT_SIZES:
        word = name.split(" ")[0]
        if text in (name, word, word.removeprefix("gpt2-")):
            return name
    start = text.find("--")
    hint = f'; is a space missing before "{text[start:]}"?' if start > 0 else ""
    raise argparse.ArgumentTypeError(f'"{text}" is none of {", ".join(GPT_SIZES)}{hint}')


MAX_CONTEXT = GPTConfig.context_length


def context_length(text):
    """A number of tokens, or the name of one."""
    names = ("longest_training_example", "model_context_length")
    try:
        return text if text in names else number(int, 1, maximum=MAX_CONTEXT)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; use {', '.join(names)} or 1 to {MAX_CONTEXT}") from None


IMAGE_FORMATS = (".png", ".pdf", ".svg")


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
    results: str = option(
        "results", RESULTS, 'folder to which each finished run writes its record; "" for none', metavar="DIR"
    )
    skip_finished: bool = option(
        False, RESULTS, "print the row of a run whose record is in --results already, and do not train it again"
    )
    note: str = option("", RESULTS, "a remark kept with the record and shown in the report", metavar="TEXT")
    repeats: int = option(
        1,
        RESULTS,
        "number of runs, each with its own seed (--seed, --seed + 1, ...), then mean and standard deviation",
        type=number(int, 1),
    )
    plot: str | None = option(
        None,
        RESULTS,
        "draw losses and accuracies over the epochs (.png, .pdf or .svg)",
        type=file_with(*IMAGE_FORMATS),
        metavar="FILE",
    )
    report: tuple | None = option(
        None,
        RESULTS,
        "train nothing; print the table of all runs in these folders (default: results) and what it shows",
        nargs="*",
        metavar="DIR",
    )
    write: tuple = option(
        (),
        RESULTS,
        "with --report: write it too; a page (.html), text (.md), data (.csv), a table for LaTeX (.tex), or a picture "
        "(.png, .pdf, .svg)",
        nargs="+",
        action="extend",
        type=file_with(".html", ".md", ".csv", ".tex", *IMAGE_FORMATS),
        metavar="FILE",
    )
    baseline: bool = option(False, RESULTS, "instead of GPT-2 train two linear models on words and letters")
    feature_cache: str | None = option(
        None,
        MACHINE,
        "folder for frozen features that later runs use again (default: features in "
        '--data_dir); "" for none; to empty it, delete it',
        metavar="DIR",
    )
    feature_cache_gb: float = option(
        5.0, MACHINE, "what that folder may hold in GB; the least recently used go first", type=number(float, above=0)
    )
    activation_checkpointing: bool = option(
        False, MACHINE, "compute trained blocks again in the backward pass to save memory"
    )
    shard: bool = option(False, MACHINE, "with torchrun: each process holds a part of model and optimizer (FSDP2)")
    checkpoint: str | None = option(
        None,
        INTERRUPTION,
        "save the state of training to FILE after each epoch, at intervals, on Ctrl-C and on SIGTERM; the same command "
        "resumes from it",
        metavar="FILE",
    )
    checkpoint_minutes: float = option(10.0, INTERRUPTION, "minutes between two checkpoints", type=number(float, 0))
    save_model: str | None = option(
        None,
        USE,
        "write the trained parameters to FILE (.safetensors), with the settings that belong to them",
        metavar="FILE",
    )
    export: str | None = option(
        None,
        USE,
        "write the trained classifier to a folder that transformers loads (GPT2ForSequenceClassification)",
        metavar="DIR",
    )
    load_model: str | None = option(
        None,
        USE,
        "train nothing; use a classifier that --save_model wrote (with --weights FILE if that file has moved)",
        metavar="FILE",
    )
    classify: tuple = option(
        (),
        USE,
        "with --load_model: messages to classify; - for one per line of standard input",
        nargs="+",
        action="extend",
        metavar="TEXT",
    )

    def __post_init__(self):
        check_values(self)
        for name, needed in (("write", "report"), ("classify", "load_model")):
            if getattr(self, name) and getattr(self, needed) is None:
                raise UserError(f"--{name} needs --{needed}")
        if self.shard and not processes.is_launched():
            raise UserError("--shard needs several processes: torchrun --nproc_per_node N additional_experiments.py")
        if self.load_model is not None and not self.classify and self.export is None:
            raise UserError("--load_model needs --classify or --export")
        for name in ("save_model", "export"):
            if getattr(self, name) is not None and self.repeats > 1:
                raise UserError(f"--{name} is for one classifier, --repeats trains several")
        if self.skip_finished and (not self.results or self.save_model or self.export):
            raise UserError("--skip_finished needs --results, and cannot be combined with --save_model or --export")


# --- files, before any time is spent ---


def check_files(run_options, inputs):
    """Raises UserError where something cannot be written, or would overwrite something else.

    `inputs` maps paths that are read to what they are.
    """
    if run_options.export is not None:
        check_folder(run_options.export)
    if run_options.results and run_options.report is None:
        folder = resolve_output("results", run_options.results)
        check_writable("results", run_options.results, folder if folder.exists() else folder.parent)
    outputs = [(name, getattr(run_options, name)) for name in ("checkpoint", "save_model", "plot")]
    taken = {as_one_file(resolve_output("weights", path)): what for path, what in inputs.items()}
    for name, path in [*outputs, *(("write", path) for path in run_options.write)]:
        if path is not None:
            target = resolve_output(name, path)
            if target.exists() and not target.is_file():
                raise UserError(f"--{name} {path} is not a regular file")
            check_writable(name, path, target.parent)
            if what := taken.get(as_one_file(target)):
                raise UserError(f"--{name} {path} would overwrite {what}")
            taken[as_one_file(target)] = f"--{name}"


def resolve_output(name, path):
    """The Path to which the value of an option leads. Raises UserError for a link that leads back to itself."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise UserError(f"--{name} {path} is a link that leads back to itself")
    return target


def as_one_file(path):
    """What all names of a file have in common: on macOS and Windows they may differ in case."""
    return str(path).casefold() if sys.platform in ("darwin", "win32") else str(path)


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
        """What a command line says, {name: value}; --batch-size is --batch_size, and a misprint gets the nearest name.

        A word with a space is a text, also where it begins with a dash.
        """
        argv = [re.sub(r"^--[\w-]+(?==|$)", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
        given, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            options = [option for option in self._option_string_actions if option.startswith("--")]
            longer = [option for option in options if option.startswith(name)]
            nearest = (longer or difflib.get_close_matches(name, options, cutoff=0.5))[:1]
            self.error("; the nearest is ".join([f"there is no option {unknown[0]}", *nearest]))
        return vars(given)


def make_parser(experiment_type):
    """The parser of all options: presets, and the fields of `experiment_type` and of RunOptions by their headings."""
    parser = Parser(
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog="rows of the table:\n"
        + "\n".join(f"  {n:2}  {command_line(row.options) or 'the defaults'}" for n, row in ROWS.items()),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
        argument_default=argparse.SUPPRESS,  # so that options given can be told from defaults and presets
        allow_abbrev=False,
    )
    presets = parser.add_argument_group("presets").add_mutually_exclusive_group()
    row_help = f"preset row N, 1 to {len(ROWS)}, of the table; other options override it"
    presets.add_argument("--row", type=number(int, 1, maximum=len(ROWS)), metavar="N", help=row_help)
    presets.add_argument("--demo", action="store_true", help="preset a toy run of half a minute without network")
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
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    run_options = {setting.name: given.pop(setting.name) for setting in fields(RunOptions) if setting.name in given}
    for mode, companions in COMPANIONS.items():
        refused = sorted((given.keys() | run_options.keys()) - {mode, *companions})
        if mode in run_options and refused:
            what = "trains no GPT-2" if mode == "baseline" else "trains nothing"
            raise UserError(f"--{refused[0]} cannot be combined with --{mode}, which {what}")
        if mode in run_options and processes.world_size() > 1:
            raise UserError(f"--{mode} runs in one process: call it without torchrun")
    run_options = RunOptions(**run_options)
    if run_options.report is not None or run_options.load_model is not None:
        check_files(run_options, {run_options.load_model: "the classifier"} if run_options.load_model else {})
        return None, run_options, given
    presets = DEMO if given.pop("demo", False) else {}
    if (row := given.pop("row", None)) is not None:
        presets = ROWS[row].options
    settings = presets | given
    if settings.get("dataset") == "sample" and "data_dir" in given:
        raise UserError("--data_dir is not read with the sample; add --dataset uci, or leave --data_dir out")
    experiment = experiment_type(**settings)
    if run_options.export is not None:
        check_experiment(experiment)
    data = (Path(experiment.data_dir, name) for name in (*(f"{split}.csv" for split in SPLITS), *COLLECTION_NAMES))
    check_files(run_options, dict.fromkeys(data, "the data") | {experiment.weights: "the weights"})
    return experiment, run_options, given
