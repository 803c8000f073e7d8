"""Interrupted runs: the state of training, the file that keeps it, and the signals that end a run."""

import json
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from runner.files import UserError, atomic_write, require_finite, resolve
from runner.machine import processes
from runner.machine.devices import peak_memory, random_states, reset_peak_memory, set_random_states

FORMAT = "checkpoint 3"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# --- the state of training ---


class Usage:
    """Seconds and peak memory of one seed from the creation of this object on, interrupted parts included."""

    def __init__(self, device):
        self.device, self.known_above = device, reset_peak_memory(device)
        self.started = dict(total=time.perf_counter())
        self.before = dict(training=0.0, total=0.0, peak_memory=0)  # before the interruption

    def start_training(self):
        """Training starts now."""
        self.started["training"] = time.perf_counter()

    def so_far(self):
        """Seconds of `training` and in `total`, and `peak_memory` in bytes, 0 where it is not known."""
        now, peak = time.perf_counter(), peak_memory(self.device, self.known_above) or 0
        seconds = {kind: self.before[kind] + now - started for kind, started in self.started.items()}
        return self.before | seconds | dict(peak_memory=max(self.before["peak_memory"], peak))


class TrainingState:
    """All that training changes, and how far it has come: what a run needs to continue as if it had never stopped."""

    def __init__(self, classifier, optimizer, history, usage):
        self.parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        self.optimizer, self.history, self.usage, self.device = optimizer, history, usage, classifier.device
        self.batches_done = 0  # whose updates are made
        self.order = torch.empty(0, dtype=torch.long)  # message indices of the current epoch, batch after batch

    def state_dict(self):
        """What `load_state_dict` restores: nested dicts of tensors, numbers and texts.

        With shards all processes have to call it, and only process 0 gets the tensors.
        """
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return dict(
            batches_done=self.batches_done,
            order=self.order,
            history=self.history.to_dict(),
            usage=self.usage.so_far(),
            random_states=random_states(self.device),
            parameters=self.full_parameters(),
            optimizer={name: {key: processes.full(t) for key, t in kept.items()} for name, kept in moments.items()},
        )

    def full_parameters(self):
        """The trained parameters, {name: tensor}; with shards as in `state_dict`."""
        return {name: processes.full(parameter.detach()) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restore what `state_dict` gave."""
        self.batches_done, self.order, self.usage.before = state["batches_done"], state["order"], state["usage"]
        self.history = type(self.history).from_dict(state["history"])
        for name, parameter in self.parameters.items():
            parameter.copy_(processes.divided_like(state["parameters"][name], parameter))
            for key, tensor in state["optimizer"][name].items():  # none of a parameter that had no gradient
                tensor = processes.divided_like(tensor, parameter)
                # On a device the optimizer's count of updates is there too, because it is a fused one.
                self.optimizer.state[parameter][key] = tensor.to(parameter.device)
        set_random_states(state["random_states"])


class Interrupted(UserError):
    """A signal has ended the run, in a state that can be resumed if there is a checkpoint."""


# --- the file ---


def run_identity(experiment, data, weights, device):
    """What makes a run the same run, by name: with any other value it would give other numbers."""
    settings = asdict(experiment)
    for name in ("features", "data_dir", "weights", "device"):  # without effect, or identified by their content
        del settings[name]
    return settings | dict(weights=weights.sha256 or "random", device=device.type, data=data.sha256)


def write_checkpoint(path, content):
    """Write nested dicts of tensors and plain values. Raises OSError; the file that was there then stays."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch's own, raised on the way out, hides that of the file
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from None


def read_checkpoint(path, identity):
    """What `write_checkpoint` wrote; nothing in it can run code.

    Raises UserError for a file that cannot be read, and one that names the first entry of `identity` that differs.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            is_ours = content["format"] == FORMAT
        except Exception as error:  # of many classes
            if isinstance(error, MemoryError) or "alloc" in str(error):  # the file may be good
                raise
            is_ours = False
    if not is_ours:
        raise UserError(f"{path} is damaged, or no checkpoint of this version; delete it to start over")
    for name, value in identity.items():
        if (theirs := content["identity"].get(name)) != value:
            raise UserError(f"{path} is of a run with {name} {theirs}, not {value}; delete it to start over")
    return content


@contextmanager
def locked(path, console):
    """Hold the lock of a checkpoint. Raises UserError if another run has it; warns where there can be none."""
    path = resolve(path)
    path = path.with_name(f".{path.name}.lock")
    lock = FileLock(path, timeout=0, fallback_to_soft=False)  # a soft one would outlast a killed run
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run uses this checkpoint ({path}); wait for it, or use another file") from None
    except OSError as error:
        console.warning(f"the checkpoint is not locked ({error}); use it in one run at a time")
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes nothing that is open, but there filelock does it
                path.unlink()
        lock.release()


class Checkpoint:
    """The file from which an interrupted run is resumed. Without a path nothing is written.

    It holds the state of the last seed, also when that is finished, and the records of the seeds before. Of several
    processes each reads the file, and process 0 writes it.
    """

    def __init__(self, options, identity=None, console=None):
        self.path, self.minutes = options.checkpoint, options.checkpoint_minutes
        self.identity, self.console = identity, console
        self.records, self.state, self.environment = [], None, {}
        self.signal, self.saved_at, self.has_warned = None, time.monotonic(), False

    @contextmanager
    def opened(self):
        """Read the file, if there is one; within `with`, no other run can use it. Errors: see `read_checkpoint`."""
        with ExitStack() as stack:
            if self.path is not None:
                with processes.main_first():
                    if processes.rank() == 0:
                        stack.enter_context(locked(self.path, self.console))
                    if resolve(self.path).exists():
                        content = read_checkpoint(self.path, self.identity)
                        self.records, self.state = content["records"], content["state"]
                        self.environment = content["environment"]
                self.require_the_same_file()
            yield

    def require_the_same_file(self):
        """Raises UserError where process 0 has read another checkpoint than this one."""
        found = len(self.records), self.state and self.state["batches_done"]
        with processes.agreed():
            if processes.from_main(found) != found:
                raise UserError(f"--checkpoint {self.path}: not all hosts have the same file there")

    def note_environment(self, environment):
        """Note what may change the last digits, by name; warn where a seed is resumed under another one."""
        for name, value in environment.items() if self.state is not None else ():
            if (before := self.environment[name]) != value:
                self.console.warning(
                    f"{self.path} was started with {name} {before} and is resumed with {value}: last digits may differ"
                )
        self.environment = environment

    def restore(self, state):
        """Restore a TrainingState from the file. Returns whether there was one."""
        if self.state is None:
            return False
        state.load_state_dict(self.state)
        self.state = None
        return True

    @contextmanager
    def signals_noted(self):
        """Within it the first signal that would end the run is noted for `save_if_due`; a second one ends it at once.

        A signal that is ignored stays ignored. Only the main thread can handle signals: in others nothing changes.
        """

        def note(number, frame):
            self.signal = number
            handlers.close()

        is_needed = self.path is not None or processes.world_size() > 1
        can_handle = threading.current_thread() is threading.main_thread()
        with ExitStack() as handlers:  # restores those that were there before
            for number in SIGNALS if is_needed and can_handle else ():
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    handlers.callback(signal.signal, number, signal.signal(number, note))
            yield
        self.end_if(self.signal)  # it came while the last state was being saved

    def end_if(self, number):
        """Raises Interrupted if there is a signal of this number."""
        if number:
            can_resume = self.path is not None and Path(self.path).exists()
            advice = f"; the same command resumes from {self.path}" if can_resume else ""
            raise Interrupted(f"interrupted{advice}", status=128 + int(number))

    def save_if_due(self, state, is_end_of_epoch=False):
        """Save the state after an epoch, when the last time is long ago, and when a signal is to end the run.

        All processes do the same, whichever has the signal and whatever their clocks say. Raises Interrupted.
        """
        is_due = is_end_of_epoch or time.monotonic() - self.saved_at >= 60 * self.minutes
        number, is_due = processes.largest(self.signal or 0, is_due)
        if self.path is not None and (number or is_due):
            self.save(state)
        self.end_if(number)

    def save(self, state):
        """Write the file. Where that fails the run warns, once, and goes on.

        Raises NonFiniteError for parameters that are not finite, and leaves the file as it was.
        """
        content = dict(format=FORMAT, identity=self.identity, environment=self.environment, records=self.records)
        content["state"] = state.state_dict()
        require_finite(content["state"]["parameters"], "parameter")
        try:
            if processes.rank() == 0:
                write_checkpoint(self.path, content)
        except OSError as error:
            if not self.has_warned:
                self.console.warning(f"the checkpoint {self.path} could not be written: {error.strerror or error}")
            self.has_warned = True
        self.saved_at = time.monotonic()
        processes.barrier()  # torchrun ends process 0, which may still be writing, when another process has ended

    def add_record(self, record):
        """Keep the record of a finished seed, anything JSON can hold, beside the state of the next one."""
        self.records.append(json.loads(json.dumps(record)))  # plain types only: PyTorch's version is no plain str
