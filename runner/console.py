"""What a run prints: lines, warnings, progress bars; and its exit status."""

import os
import platform
import signal
import sys

import tiktoken
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from previous_chapters import GPTConfig
from runner.data.datasets import DATASET_NAMES
from runner.files import UserError, is_out_of_memory
from runner.machine import processes
from runner.machine.devices import describe_devices
from runner.saved.checkpoints import Interrupted
from runner.wording import markdown_table

LOG_SECONDS = 30
INTERVALS = ("delay", "mininterval", "maxinterval")  # tqdm's names: before the first line, and between lines


class Lines:
    """Writes each state of a progress bar to standard error as a line, for a log."""

    def write(self, text):
        if state := text.strip():  # tqdm returns to the start of the line, and clears it at the end
            print(state, file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


class Console:
    """Prints rows and warnings always, other lines and progress bars unless `quiet`, and writes outputs.

    Only rank 0 prints and writes.
    """

    def __init__(self, quiet=False):
        self.is_silent = processes.rank() > 0
        self.quiet = quiet or self.is_silent
        self.not_written = []  # a message for each output that could not be written

    def print(self, line):
        """Print a line, in a quiet run too; a progress bar stays below it."""
        if not self.is_silent:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()  # a run that is killed has written its lines, to a pipe or a log file too

    def info(self, line):
        """Print a line unless the run is quiet."""
        if not self.quiet:
            self.print(line)

    def warning(self, line):
        """Print a warning to standard error."""
        if not self.is_silent:
            tqdm.write(f"warning: {line}", file=sys.stderr)

    def table_row(self, cells):
        """Print a row of the table {title: cell}, below its header unless the run is quiet."""
        *header, row = markdown_table(cells, [cells.values()], align=False)
        self.info("\n" + "\n".join(header))
        self.print(row)

    def progress(self, description, total, unit, initial=0):
        """Return a tqdm progress bar on standard error; if that is not a terminal, a line every 30 seconds."""
        settings = {}
        if not sys.stderr.isatty():
            settings = dict(file=Lines(), ascii=True, ncols=80, leave=False, **dict.fromkeys(INTERVALS, LOG_SECONDS))
        return tqdm(desc=description, total=total, unit=unit, initial=initial, disable=self.quiet, **settings)

    def write_output(self, what, path, write, *arguments):
        """Call `write(path, *arguments)` on rank 0, if there is a path.

        A failure is printed as a warning; `close` then raises an error.
        """
        if self.is_silent or not path:
            return
        try:
            written = write(path, *arguments)  # the path of a file in the folder `path`, or None
            self.info(f"Wrote {what} to {written or path}")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            self.not_written.append(f"{what} could not be written to {path}: {reason}")
            self.warning(self.not_written[-1])

    def close(self):
        """End the run: raise UserError if an output could not be written."""
        if self.not_written:
            raise UserError("training finished, but " + "; ".join(self.not_written), status=1)


def describe_data(data):
    """Return a line with the name of a Dataset and the number of messages in each split, and its notes."""
    counts = ", ".join(f"{len(messages):,} {split}" for split, messages in data.splits.items())
    return "\n".join([f"Data: {DATASET_NAMES[data.name]}; messages: {counts}", *data.notes])


def describe_setup(experiment, data, encoded, device):
    """Return lines on the device, the Dataset and the EncodedData of a run."""
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, tiktoken {tiktoken.__version__}"
    tokens = f"Tokens per message: {encoded.longest} at most, {'not padded' if experiment.no_padding else 'padded'}"
    if encoded.limit < GPTConfig.context_length:  # else they are warnings
        tokens = "; ".join([tokens, *encoded.describe_cut()])
    is_wasteful = encoded.pool.lengths.min() == encoded.limit > 2 * encoded.usual  # most is padding
    if experiment.context_length == "longest_training_example" and is_wasteful:
        other = " or --trainable_token_pos flexible" * (not experiment.disable_causal_mask)
        advice = f"--context_length {encoded.usual}{other} is faster"
        tokens += f"\n99% of the training texts have at most {encoded.usual} tokens: {advice}"
    lines = [f"Device: {describe_devices(device)}; {versions}", describe_data(data), tokens]
    if data.name != "own":  # the README describes the repeated messages of the collection
        return "\n".join(lines)
    duplicates = [
        f"{len(found.exact)} of {len(data.splits[split]):,} {split} messages word for word, {len(found.similar)} "
        "ignoring case, digits and punctuation"
        for split, found in data.duplicates.items()
        if found.similar
    ]
    if duplicates:
        lines.append(f"Also among the training messages: {'; '.join(duplicates)}")
    repeated = {split: int(messages["Text"].duplicated().sum()) for split, messages in data.splits.items()}
    if any(repeated.values()):
        counts = ", ".join(
            f"{n:,} of {len(data.splits[split]):,} {split} messages" for split, n in repeated.items() if n
        )
        lines.append(f"Repeated within their split: {counts}")
    return "\n".join(lines)


def describe_model(experiment, classifier):
    """Return a line with the model, its weights and the numbers of its parameters."""
    n_trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    n_frozen = sum(p.numel() for p in classifier.parameters()) - n_trained
    words = f"Model: {experiment.model_size}, weights: {experiment.weights}, trained: {experiment.trainable_layers}"
    return f"{words}; {n_trained:,} trainable and {n_frozen:,} frozen parameters"


MEMORY_ADVICE = """out of memory
Try: a smaller --batch_size with more --accumulation_steps (their product is what counts); to train less,
--trainable_layers lora or last_block; --trainable_token_pos flexible or a smaller --context_length;
--features disk or off; --precision bf16; a smaller --model_size"""
DEVICE_ERRORS = ("CUDA error", "CUDA driver", "CUBLAS_STATUS", "cuDNN error", "NCCL error", "MPS backend")
DEVICE_ADVICE = """the device failed: {error}
Try: the same command again, which resumes where there is a --checkpoint; --device cpu"""


def prepare_streams():
    """Make standard output and error accept any text, and replace closed ones.

    Files and pipes get UTF-8 on every system. A terminal shows a question mark for a character that it lacks.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def end_process(status):
    """Exit with this status, at once if torchrun started the process.

    gloo's threads can abort a process while its interpreter is torn down, and torchrun would report a finished run as
    failed (pytorch pull request 179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if processes.is_launched():
        os._exit(status)
    sys.exit(status)


def exit_status(command):
    """Call `command()` and return the exit status. Errors that a user can act on become one line.

    The status is 0 for success; 1 if a download, an output, memory or training failed; 2 if an option or a file cannot
    be used; 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP. Errors of the program itself are raised.
    """
    try:
        command()
        return 0
    except BrokenPipeError:  # the reader of the output has ended; Python's last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Interrupted) as error:
        status, message = getattr(error, "status", 128 + signal.SIGINT), str(error) or "interrupted"
    except UserError as error:
        status, message = error.status, f"error: {error}"
    except (OSError, SafetensorError) as error:  # a full disk, a folder that is gone
        status, message = 1, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            advice = MEMORY_ADVICE
        elif any(words in str(error) for words in DEVICE_ERRORS):
            advice = DEVICE_ADVICE.format(error=str(error).splitlines()[0])
        else:
            raise
        print(f"error: {advice}", file=sys.stderr)  # on this rank alone
        return 1
    if processes.rank() == 0:  # `raise_on_all_ranks` has raised the same on all
        print(message, file=sys.stderr)
    return status
