"""From dataclass fields to the command line: what a call does, and which options can be combined."""

import argparse
import difflib
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from gpt_download import COLLECTION_NAMES
from runner.data.datasets import SPLITS
from runner.files import UserError, resolve
from runner.machine import processes
from runner.parsers import image, number, report_file
from runner.saved.export import check_experiment, check_folder

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


@dataclass(frozen=True)
class RunOptions:
    """What one call does besides its experiment, or instead of it. No number of a seed depends on it.

    Raises UserError for options that cannot be combined, and for files in folders that do not exist.
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
        None, RESULTS, "draw losses and accuracies over the epochs (.png, .pdf or .svg)", type=image, metavar="FILE"
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
        type=report_file,
        metavar="FILE",
    )
    baseline: bool = option(False, RESULTS, "instead of GPT-2 train two linear models on words and letters")
    feature_cache: str | None = option(
        None,
        MACHINE,
        "folder that keeps hidden states after frozen blocks for later runs (default: features in "
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
        metavar="TEXT",
    )

    def __post_init__(self):
        check_values(self)
        for name, needed in (
            ("write", "report"),
            ("classify", "load_model"),
        ):
            if getattr(self, name) and getattr(self, needed) is None:
                raise UserError(f"--{name} needs --{needed}")
        if self.shard and not processes.is_launched():
            raise UserError(
                "--shard needs several processes: torchrun --nproc_per_node N additional_experiments.py ..."
            )
        if self.load_model is not None and not self.classify and self.export is None:
            raise UserError("--load_model needs --classify or --export")
        for name in ("save_model", "export"):
            if getattr(self, name) is not None and self.repeats > 1:
                raise UserError(f"--{name} is for one classifier, --repeats trains several")
        if self.skip_finished and (not self.results or self.save_model or self.export):
            raise UserError("--skip_finished needs --results, and cannot be combined with --save_model or --export")
        self.check_paths()

    def check_paths(self):
        """Each file that is to be written or read has a name of its own, in a folder that exists."""
        if self.export is not None:
            check_folder(self.export)
        if self.feature_cache and os.path.exists(self.feature_cache) and not os.path.isdir(self.feature_cache):
            raise UserError(f"--feature_cache {self.feature_cache} is not a folder")
        if self.results and self.report is None:
            check_results(self.results)
        names = {}
        outputs = [(name, getattr(self, name)) for name in ("plot", "checkpoint", "save_model", "load_model")]
        for name, path in (*outputs, *(("write", path) for path in self.write)):
            if path is None:
                continue
            if self.export is not None and resolve(self.export) in resolve(path).parents:
                raise UserError(f"--{name} {path} is in the folder of --export, which holds nothing else")
            if path == "":
                raise UserError(f"--{name} is given without the name of a file")
            if not Path(path).parent.is_dir():
                raise UserError(f"--{name} {path}: there is no folder {Path(path).parent}")
            if Path(path).is_dir():
                raise UserError(f"--{name} {path} is a folder")
            if is_special(path):
                raise UserError(f"--{name} {path} is not a regular file")
            if (other := names.setdefault(resolve(path), name)) != name:
                raise UserError(f"--{other} and --{name} name the same file, {path}")


def check_results(folder):
    """Raises UserError for a folder of results that cannot be written to, or cannot be made."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f'--results {folder} is not a folder; for none: --results ""')
    if not path.exists() and not path.parent.is_dir():
        raise UserError(f"--results {folder}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK) or (path.is_symlink() and not path.exists()):
        raise UserError(f"--results {folder}: nothing can be written there")


def is_special(path):
    """Whether a path is a device, a pipe or the like, or a name of the system for one of this process's streams."""
    absolute = os.path.abspath(path)
    is_stream = absolute.startswith(("/dev/", "/proc/")) and not absolute.startswith("/dev/shm/")
    return is_stream or (Path(path).exists() and not Path(path).is_file())


# --- the command line ---

# The options that can be combined with one that trains nothing.
COMPANIONS = {
    "report": ("write", "results"),
    "baseline": ("data_dir", "dataset", "ignore_index", "results", "note", "quiet"),
    "load_model": ("classify", "export", "weights", "device"),
}


EXAMPLES = """examples:
  python additional_experiments.py --demo       # a toy model, without network
  python additional_experiments.py --row 16     # row 16 of the table, see below
  python additional_experiments.py --model_size xl --trainable_layers lora"""


def as_options(settings):
    """Settings as the command line takes them, names of model sizes in short."""
    words = []
    for name, value in settings.items():
        value = value.split(" (")[0].removeprefix("gpt2-") if name == "model_size" else value
        words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words) or "the defaults"


def with_underscores(argv):
    """A command line in which the names of options have underscores: --batch-size is --batch_size."""
    return [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are a UserError: one line."""

    def error(self, message):  # argparse's own prints the whole usage before the one line that matters
        raise UserError(f"{message} (--help lists the options)")

    def parse(self, argv):
        """What the options on a command line say, {name: value}. An unknown one is answered with the nearest."""
        given, unknown = self.parse_known_args(with_underscores(argv))
        if unknown and (name := unknown[0].split("=")[0].strip("-")) != unknown[0]:
            options = [option[2:] for option in self._option_string_actions if option.startswith("--")]
            longer = [option for option in options if option.startswith(name)]
            nearest = (longer or difflib.get_close_matches(name, options, cutoff=0.5))[:1]
            self.error("; the nearest is --".join([f"there is no option {unknown[0]}", *nearest]))
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return vars(given)


def make_parser(description, experiment_type, rows):
    """The parser of all options: presets, and the fields of `experiment_type` and of RunOptions by their headings."""
    parser = Parser(
        usage="%(prog)s [options]",
        description=f"{description}\n\n{EXAMPLES}",
        epilog="rows of the table:\n" + "\n".join(f"  {n:2}  {as_options(row.options)}" for n, row in rows.items()),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
        argument_default=argparse.SUPPRESS,  # so that options given can be told from defaults and presets
        allow_abbrev=False,
    )
    presets = parser.add_argument_group("presets").add_mutually_exclusive_group()
    presets.add_argument(
        "--row",
        type=number(int, 1, maximum=len(rows)),
        metavar="N",
        help=f"preset row N, 1 to {len(rows)}, of the table; other options override it",
    )
    presets.add_argument(
        "--demo",
        action="store_true",
        help="preset a toy run of half a minute without network",
    )
    groups = {}
    for setting in (*fields(experiment_type), *fields(RunOptions)):
        arguments = dict(setting.metadata)
        heading = arguments.pop("group")
        if setting.type is bool:
            arguments["action"] = "store_true"
        if setting.default not in (False, None, (), ""):
            choices = f"{', '.join(arguments['choices'])}; " if "choices" in arguments else ""
            arguments["help"] += f" ({choices}default: {setting.default})"
        if "action" not in arguments:
            arguments.setdefault("metavar", "N" if setting.type in (int, float) else "X")
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(f"--{setting.name}", **arguments)
    return parser


def split_texts(argv, experiment_type):
    """A command line without the messages of --classify, and these as {"classify": (text, ...)}, if there are any.

    A message may begin with a dash, which argparse takes for an option: the messages end where an option of this
    program begins, and after `--` there is none.
    """
    argv = list(argv)
    if "--classify" not in argv:
        return argv, {}
    if argv[: (argv.index("--") if "--" in argv else None)].count("--classify") > 1:
        raise UserError("--classify is given twice")
    start = argv.index("--classify") + 1
    names = {"--row", "--demo", "--help"}
    names |= {f"--{setting.name}" for setting in (*fields(experiment_type), *fields(RunOptions))}
    end = start
    words = [word.split("=")[0] for word in with_underscores(argv)]
    while end < len(argv) and words[end] not in {*names, "--"}:
        end += 1
    texts, rest = argv[start:end], argv[end:]
    if rest[:1] == ["--"]:
        texts, rest = texts + rest[1:], []
    if not texts:
        raise UserError("--classify needs a message, or - for standard input")
    return argv[: start - 1] + rest, {"classify": tuple(texts)}


def parse(argv, description, experiment_type, rows, demo):
    """A command line as (Experiment, RunOptions, the options of the experiment that were given).

    `rows` maps numbers to Rows and `demo` options to values: the presets. The Experiment is None where nothing is to
    be trained. Raises UserError.
    """
    argv, texts = split_texts(sys.argv[1:] if argv is None else argv, experiment_type)
    given = make_parser(description, experiment_type, rows).parse(argv) | texts
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
        return None, run_options, given
    presets = demo if given.pop("demo", False) else {}
    if (row := given.pop("row", None)) is not None:
        presets = rows[row].options
    settings = presets | given
    if settings.get("dataset") == "sample" and "data_dir" in given:
        raise UserError("--data_dir is not read with the sample; add --dataset uci, or leave --data_dir out")
    experiment = experiment_type(**settings)
    check_outputs(experiment, run_options)
    return experiment, run_options, given


def check_outputs(experiment, run_options):
    """Raises UserError if an output would overwrite an input."""
    if run_options.export is not None:
        check_experiment(experiment)
    inputs = {resolve(experiment.weights): "the weights"}
    for file in (*(f"{split}.csv" for split in SPLITS), *COLLECTION_NAMES):
        inputs[resolve(Path(experiment.data_dir, file))] = "the data"
    for name in ("checkpoint", "save_model", "plot"):
        path = getattr(run_options, name)
        if path and (input := inputs.get(resolve(path))):
            raise UserError(f"--{name} {path} would overwrite {input}")
