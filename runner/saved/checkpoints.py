"""Interrupted runs: the state of training, the checkpoint file that keeps it, and the signals that end a run."""

import signal
import sys
import threading
import time
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from runner.files import (
    UserError,
    atomic_write,
    is_out_of_memory,
    refuse_damaged,
    remove_leftovers,
    require_finite,
)
from runner.machine import processes
from runner.machine.devices import describe_devices, peak_memory, random_generators

FORMAT = 6
SECONDS_BETWEEN_SIGNALS = 2  # systems that end a job send SIGTERM to all its processes, and torchrun sends it again
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class TrainingState:
    """All that training changes, and how far one seed has come: what is needed to continue as if it had not stopped.

    It is made when training begins. `is_kept` says whether frozen features are kept or recomputed, `started` is when
    the seed started, by `time.perf_counter`. `environment` is what may change the last digits of the numbers.
    """

    def __init__(self, classifier, optimizer, history, seed, is_kept, started):
        self.parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        self.optimizer, self.history, self.device = optimizer, history, classifier.device
        features = "kept" if is_kept else "recomputed"
        self.environment = dict(device=describe_devices(self.device), PyTorch=str(torch.__version__), features=features)
        self.seed = seed
        self.batches_done = 0  # batches whose update is made
        self.order = torch.empty(0, dtype=torch.long)  # message indices of the current epoch, batch after batch
        self.started, self.earlier_peak = dict(training=time.perf_counter(), total=started), 0

    def usage(self):
        """Return the seconds of `training` and in `total`, and the `peak_memory`; interrupted parts count too."""
        seconds = {name: time.perf_counter() - start for name, start in self.started.items()}
        return seconds | dict(peak_memory=max(peak_memory(self.device), self.earlier_peak))

    def full_parameters(self):
        """Return the trained parameters {name: tensor}: with shards, in full on rank 0 and empty on the others."""
        return {name: processes.gather_full(parameter.detach()) for name, parameter in self.parameters.items()}

    def state_dict(self):
        """Return nested dicts of tensors, numbers and texts, from which `load_state_dict` restores the state.

        With sharded parameters this is a collective, and only rank 0 gets the tensors.
        """
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return dict(
            seed=self.seed,
            environment=self.environment,
            batches_done=self.batches_done,
            order=self.order,
            history=asdict(self.history),
            usage=self.usage(),
            random_states={kind: one.get_rng_state() for kind, one in random_generators(self.device).items()},
            parameters=self.full_parameters(),
            optimizer={n: {key: processes.gather_full(t) for key, t in kept.items()} for n, kept in moments.items()},
        )

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restore what `state_dict` returned, possibly on another type of device.

        Raises ValueError, KeyError, TypeError, AttributeError or RuntimeError for anything else.
        """
        self.batches_done, self.order = state["batches_done"], state["order"].clone()
        self.history = type(self.history)(**state["history"])
        self.started = {name: start - state["usage"][name] for name, start in self.started.items()}
        self.earlier_peak = state["usage"]["peak_memory"]
        for name, parameter in self.parameters.items():
            if state["parameters"][name].shape != parameter.shape:  # copy_ would broadcast it
                raise ValueError(f"parameter {name} has another shape")
            parameter.copy_(processes.shard_like(state["parameters"][name], parameter))
            for key, tensor in state["optimizer"][name].items():  # empty for a parameter that had no gradient
                tensor = processes.shard_like(tensor, parameter)
                # The fused optimizer keeps its count of updates on the device too. A copy, as the file is mapped.
                self.optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)
        for kind, generator in random_generators(self.device).items():
            if kind in state["random_states"]:  # not if it was saved on another type of device
                generator.set_rng_state(state["random_states"][kind].clone())


class Interrupted(UserError):
    """A signal ended the run; it can be resumed if it has a checkpoint."""


class Checkpoint:
    """The file from which an interrupted run is resumed: the state of one seed, also when that is finished.

    `saved` is the state dict that the file held when it was opened, until it is restored. Without a path nothing is
    written. Each save is refused if the file of the `weights` has changed. Every rank reads the file, rank 0 writes it.
    """

    def __init__(self, path, minutes, identity, saved, weights, console):
        self.path, self.minutes, self.identity, self.saved, self.console = path, minutes, identity, saved, console
        self.weights, self.problem, self.has_written = weights, "", False
        self.signal, self.signal_at, self.saved_at = 0, 0.0, time.monotonic()

    def is_past(self, seed):
        """Return whether the file holds the state of a later seed."""
        return self.saved is not None and self.saved["seed"] > seed

    def restore(self, state):
        """Restore a TrainingState if the file holds one of its seed, and say so; warn if its environment differs."""
        saved, self.saved = self.saved, None  # frees its memory, also if it is of an earlier seed
        if saved is None or saved["seed"] != state.seed:
            return
        if state.environment != saved["environment"]:
            before, now = (", ".join(found.values()) for found in (saved["environment"], state.environment))
            self.console.warning(f"{self.path} is resumed with {now}; before: {before}; last digits may differ")
        with refuse_damaged(self.path, "; delete it to start over"):
            state.load_state_dict(saved)
        before = f"Resuming from {self.path} after {state.batches_done:,} batches; printed before:"
        self.console.info("\n".join([before, *state.history.lines]))

    @contextmanager
    def defer_signals(self):
        """Within it the first signal that would end the run waits for `save_if_due`.

        A second one ends the run at once, unless it comes within SECONDS_BETWEEN_SIGNALS and nobody has pressed Ctrl-C
        twice. Ignored signals stay ignored. Python handles signals in the main thread only: in others nothing changes.
        """

        def handle(number, frame):
            is_ctrl_c = number == signal.SIGINT and not processes.is_launched()  # torchrun sends on its own too
            if self.signal == 0:
                self.signal, self.signal_at = number, time.monotonic()
            elif is_ctrl_c or time.monotonic() - self.signal_at > SECONDS_BETWEEN_SIGNALS:
                handlers.close()  # restores the handlers that were there before
                signal.raise_signal(number)

        is_needed = self.path is not None or processes.world_size() > 1
        with ExitStack() as handlers:
            if is_needed and threading.current_thread() is threading.main_thread():
                for number in SIGNALS:
                    if signal.getsignal(number) is not signal.SIG_IGN:
                        handlers.callback(signal.signal, number, signal.signal(number, handle))
            yield
        self.raise_if_interrupted(*processes.all_reduce_max(self.signal))  # it came during the last save

    def raise_if_interrupted(self, number):
        """Raise Interrupted if the number of a signal is not 0."""
        if number:
            can_resume = self.path is not None and Path(self.path).exists()
            advice = f"; the same command resumes from {self.path}" if can_resume else ""
            raise Interrupted(f"interrupted{advice}", status=128 + int(number))

    def save_if_due(self, state, is_end_of_epoch=False):
        """Save the state after an epoch, when the last save is `minutes` ago, and when a signal is to end the run.

        All ranks do the same, whichever got the signal and whatever their clocks say. Raises Interrupted.
        """
        is_due = is_end_of_epoch or time.monotonic() - self.saved_at >= 60 * self.minutes
        number, is_due = processes.all_reduce_max(self.signal, is_due)
        if self.path is not None and (number or is_due):
            self.save(state)
        self.raise_if_interrupted(number)

    def save(self, state):
        """Write the file. A failed write is a warning, and the run continues.

        Raises NonFiniteError for parameters that are not finite, and UserError if the weights file was changed. The
        checkpoint then keeps its earlier state.
        """
        with processes.raise_on_all_ranks():
            self.weights.require_unchanged()
        content = dict(identity=self.identity, state=state.state_dict())
        with processes.raise_on_all_ranks():  # with shards, only rank 0 holds them
            require_finite(content["state"]["parameters"], "parameter")
        try:
            if processes.rank() == 0:
                with atomic_write(self.path) as temporary, open(temporary, "wb") as file:
                    torch.save(content, file)
                self.has_written = True
        except (OSError, RuntimeError) as error:
            # PyTorch hides the error of a full disk in its own.
            reason = error.__context__ if isinstance(error, RuntimeError) else error
            self.problem = f"the checkpoint {self.path} could not be written: {reason or error}"
            self.console.warning(self.problem)
        self.saved_at = time.monotonic()
        processes.barrier()  # when one rank has ended, torchrun ends rank 0, which may still be writing


@contextmanager
def open_checkpoint(path, minutes, identity, seeds, weights, console):
    """Yield the Checkpoint at `path`, locked against other runs until the end of the block.

    Without a path there is no file. `identity` is what makes a run the same run, see `run_identity`; the state may be
    that of any of `seeds`. Raises UserError for the file of another run, for a file that is no checkpoint or in use,
    and if hosts see different files.
    """
    identity = dict(format=FORMAT) | identity  # compared first: another format has other settings
    if path is None:
        yield Checkpoint(path, minutes, identity, None, weights, console)
        return
    full_path = Path(path).resolve()
    # A soft lock would outlast a killed run.
    lock = FileLock(full_path.with_name(f".{full_path.name}.lock"), timeout=0, fallback_to_soft=False)
    with processes.rank0_first():
        try:
            if processes.rank() == 0:
                lock.acquire()
        except Timeout:
            raise UserError(f"another run uses the checkpoint {full_path}; wait, or use another file") from None
        except OSError as error:
            console.warning(f"the checkpoint is not locked ({error}); use it in one run at a time")
    try:
        with processes.raise_on_all_ranks():
            if processes.rank() == 0 and lock.is_locked:
                remove_leftovers(path)
            saved = read_checkpoint(path, identity, seeds)
            progress = saved and (saved["seed"], saved["batches_done"])
            checkpoint = Checkpoint(path, minutes, identity, saved, weights, console)
            del saved  # so that its memory is free once it is restored
        with processes.raise_on_all_ranks():
            if processes.from_rank0(progress) != progress:
                raise UserError(f"--checkpoint {path}: not all hosts have the same file there")
        try:
            yield checkpoint
        except KeyboardInterrupt:
            checkpoint.raise_if_interrupted(signal.SIGINT)
        if checkpoint.problem and not checkpoint.has_written:
            console.not_written.append(checkpoint.problem)
    finally:
        lock.release()


def read_checkpoint(path, identity, seeds):
    """Return the state dict in a checkpoint, or None if there is no file. Nothing in the file can run code.

    Raises UserError for a file that is damaged or no checkpoint, or not of this run and one of these seeds.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch does not verify the checksums that it writes
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        # Mapped, the ranks of a host share its memory. Windows replaces no file that is mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=sys.platform != "win32")
        state = dict(content["state"])
        found = content["identity"] | dict(seed=state.get("seed"))
    except FileNotFoundError:
        return None
    except Exception as error:  # of many types
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise UserError(f"the checkpoint {path} cannot be read: {error or 'out of memory'}", status=1) from None
        problem = f"{path} is damaged, or not a checkpoint ({type(error).__name__})"
        raise UserError(f"{problem}; name another file, or delete this one to start over") from None
    expected = identity | dict(seed=found["seed"] if found["seed"] in seeds else seeds[0])
    for name, value in expected.items():
        if (theirs := found.get(name)) != value:
            raise UserError(f"{path} is of a run with {name} {theirs}, not {value}; delete it to start over")
    return state
