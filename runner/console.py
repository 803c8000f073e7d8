"""What a run prints, and what becomes of its errors: lines, warnings, progress bars, exit status."""

import os
import platform
import signal
import sys

import tiktoken
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from runner.data.datasets import DATASET_NAMES
from runner.files import UserError
from runner.machine import processes
from runner.machine.devices import describe_devices
from runner.saved.checkpoints import Interrupted
from runner.wording import markdown_table


class Console:
    """Prints results and warnings always, everything else unless `quiet`. Progress bars need a terminal.

    Of several processes only process 0 prints, and only it writes outputs.
    """

    def __init__(self, quiet=False):
        self.is_silent = processes.rank() > 0
        self.quiet = quiet or self.is_silent
        self.not_written = []  # a message for each output of the run that could not be written

    def print(self, line):
        """Print a line, also in a quiet run, and also while there is a progress bar."""
        if not self.is_silent:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()  # a run that is killed has printed all its lines, also into a pipe or a log file

    def info(self, line):
        """Print a line unless the run is quiet."""
        if not self.quiet:
            self.print(line)

    def warning(self, line):
        """Print a warning to standard error."""
        if not self.is_silent:
            tqdm.write(f"warning: {line}", file=sys.stderr)

    def table_row(self, cells):
        """Print a row of the table, {title: cell}, its header before it unless quiet."""
        *header, row = markdown_table(cells, [cells.values()], align=False)
        self.info("\n" + "\n".join(header))
        self.print(row)

    def progress(self, description, total, unit, initial=0):
        """A tqdm progress bar."""
        disable = True if self.quiet else None  # None: where standard error is no terminal
        return tqdm(desc=description, total=total, unit=unit, initial=initial, disable=disable)

    def write_output(self, what, path, write, *arguments):
        """`write(path, *arguments)`. A failure costs a warning now and, at the end, the exit status: see `close`."""
        if self.is_silent:
            return
        try:
            written = write(path, *arguments)  # a file in the folder `path`, or None
            self.info(f"Wrote {what} to {written or path}")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            self.not_written.append(f"{what} could not be written to {path}: {reason}")
            self.warning(self.not_written[-1])

    def close(self):
        """Call at the end of a run. Raises UserError where an output could not be written."""
        if self.not_written:
            raise UserError("training finished, but " + "; ".join(self.not_written), status=1)


def describe_data(name, splits):
    """What the data are, and how many messages each split has: one line."""
    counts = ", ".join(f"{len(messages):,} {split}" for split, messages in splits.items())
    return f"Data: {DATASET_NAMES[name]}; messages: {counts}"


def describe_setup(experiment, data, device):
    """Device, data and tokens of a run: three lines, known before its weights are there."""
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, tiktoken {tiktoken.__version__}"
    tokens = f"Tokens per message: {data.longest} at most, {'not padded' if experiment.no_padding else 'padded'}"
    return f"Device: {describe_devices(device)}; {versions}\n{describe_data(data.name, data.messages)}\n{tokens}"


def describe_model(experiment, classifier):
    """Model, weights and numbers of parameters: one line."""
    n_trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    n_frozen = sum(p.numel() for p in classifier.parameters()) - n_trained
    words = f"Model: {experiment.model_size}, weights: {experiment.weights}, trained: {experiment.trainable_layers}"
    return f"{words}; {n_trained:,} trainable and {n_frozen:,} frozen parameters"


# What PyTorch's errors say that are no faults of the program, and what to tell the user.
FAILURES = {
    ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED"): (
        "out of memory\n"
        "Try: a smaller --batch_size with more --accumulation_steps (their product is what counts); to train less,\n"
        "--trainable_layers lora or last_block; --trainable_token_pos flexible or a smaller --context_length;\n"
        "--features disk or off; --precision bf16; a smaller --model_size"
    ),
    ("CUDA error", "CUDA driver", "CUBLAS_STATUS", "cuDNN error", "NCCL error", "MPS backend"): (
        "the device failed: {error}\n"
        "Try: the same command again, which resumes where there is a --checkpoint; --device cpu"
    ),
}


def prepare_streams():
    """Make standard output and error take any text, and replace them where they were closed.

    Into a file or a pipe they write UTF-8 on every system. A terminal without an en dash shows a question mark for it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def exit_status(command):
    """Call `command()` and return the exit status; a user error becomes one line.

    0; 1: something could not be downloaded or written, memory is out, or a number is not finite; 2: an option or a file
    cannot be used; 130: Ctrl-C; 143: SIGTERM; 129: SIGHUP. Errors of the program itself are raised.
    """
    try:
        command()
        return 0
    except BrokenPipeError:  # the reader of the output has gone; Python's own last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Interrupted) as error:
        status, message = getattr(error, "status", 128 + signal.SIGINT), str(error) or "interrupted"
    except UserError as error:
        status, message = error.status, f"error: {error}"
    except (OSError, SafetensorError) as error:  # a full disk, a folder that is gone
        status, message = 1, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        text = "out of memory" if isinstance(error, MemoryError) else str(error)
        advice = [advice for words, advice in FAILURES.items() if any(word in text for word in words)]
        if not advice:
            raise
        print("error:", advice[0].format(error=text.splitlines()[0]), file=sys.stderr)  # others may not have it
        return 1
    if processes.rank() == 0:  # all have raised the same: see `processes.agreed`
        print(message, file=sys.stderr)
    return status
