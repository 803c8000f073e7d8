"""Interrupted runs: the state of training, the file that keeps it, and the signals that end a run."""

import json
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from runner.files import UserError, atomic_write, require_finite
from runner.machine import processes
from runner.machine.devices import peak_memory, random_states, set_random_states

FORMAT = 5
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class TrainingState:
    """All that training changes, and how far it has come: what a run needs to continue as if it had never stopped.

    It is made when training begins; `started` is when its seed did, by `time.perf_counter`, by default now.
    """

    def __init__(self, classifier, optimizer, history, started=None):
        self.parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        self.optimizer, self.history, self.device = optimizer, history, classifier.device
        self.batches_done = 0  # whose updates are made
        self.order = torch.empty(0, dtype=torch.long)  # message indices of the current epoch, batch after batch
        now = time.perf_counter()
        self.started, self.earlier_peak = dict(training=now, total=started or now), 0

    def usage(self):
        """Seconds of `training` and in `total`, and the `peak_memory` of the process; interrupted parts included."""
        seconds = {kind: time.perf_counter() - start for kind, start in self.started.items()}
        return seconds | dict(peak_memory=max(peak_memory(self.device), self.earlier_peak))

    def full_parameters(self):
        """The trained parameters, {name: tensor}; with shards as in `state_dict`."""
        return {name: processes.full(parameter.detach()) for name, parameter in self.parameters.items()}

    def state_dict(self):
        """What `load_state_dict` restores: nested dicts of tensors, numbers and texts.

        With shards all processes have to call it, and only process 0 gets the tensors.
        """
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return dict(
            batches_done=self.batches_done,
            order=self.order,
            history=asdict(self.history),
            usage=self.usage(),
            random_states=random_states(self.device),
            parameters=self.full_parameters(),
            optimizer={name: {key: processes.full(t) for key, t in kept.items()} for name, kept in moments.items()},
        )

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restore what `state_dict` gave."""
        self.batches_done, self.order = state["batches_done"], state["order"]
        self.history = type(self.history)(**state["history"])
        self.started = {kind: start - state["usage"][kind] for kind, start in self.started.items()}
        self.earlier_peak = state["usage"]["peak_memory"]
        for name, parameter in self.parameters.items():
            parameter.copy_(processes.divided_like(state["parameters"][name], parameter))
            for key, tensor in state["optimizer"][name].items():  # none of a parameter that had no gradient
                tensor = processes.divided_like(tensor, parameter)
                # On a device the optimizer's count of updates is there too, because it is a fused one.
                self.optimizer.state[parameter][key] = tensor.to(parameter.device)
        set_random_states(state["random_states"])


class Interrupted(UserError):
    """A signal has ended the run, in a state that can be resumed if there is a checkpoint."""


def run_identity(experiment, data, weights, device):
    """What makes a run the same run, by name: with any other value it would give other numbers."""
    settings = asdict(experiment)
    del settings["features"], settings["data_dir"]  # without effect, and identified by their content
    return settings | dict(weights=weights.sha256 or "random", device=device.type, data=data.sha256)


class Checkpoint:
    """The file from which an interrupted run is resumed. Without a path nothing is written.

    It holds the state of the last seed, also when that is finished, and the records of the seeds before. Of several
    processes each reads the file, and process 0 writes it.
    """

    def __init__(self, options, identity=None, console=None):
        self.path, self.minutes, self.console = options.checkpoint, options.checkpoint_minutes, console
        self.identity = dict(identity or {}, format=FORMAT)
        self.records, self.state, self.environment = [], None, {}
        self.signal, self.saved_at = 0, time.monotonic()

    @contextmanager
    def opened(self):
        """Read the file, if there is one; within `with`, no other run can use it. Raises UserError: see `read`."""
        if self.path is None:
            yield
            return
        path = Path(self.path).resolve()
        # A soft lock would outlast a killed run.
        lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0, fallback_to_soft=False)
        try:
            with processes.main_first():
                try:
                    if processes.rank() == 0:
                        lock.acquire()
                except Timeout:
                    raise UserError(f"another run uses the checkpoint {path}; wait, or use another file") from None
                except OSError as error:
                    self.console.warning(f"the checkpoint is not locked ({error}); use it in one run at a time")
                self.read()
            with processes.agreed():
                found = len(self.records), self.state and self.state["batches_done"]
                if processes.from_main(found) != found:
                    raise UserError(f"--checkpoint {self.path}: not all hosts have the same file there")
            yield
        finally:
            lock.release()

    def read(self):
        """Read the file, if there is one; nothing in it can run code. Raises UserError if it is not of this run."""
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            identity = content["identity"]
        except FileNotFoundError:
            return
        except Exception as error:  # of many classes
            raise UserError(f"{self.path} is no checkpoint ({type(error).__name__}); delete it to start over") from None
        for name, value in self.identity.items():
            if (theirs := identity.get(name)) != value:
                raise UserError(f"{self.path} is of a run with {name} {theirs}, not {value}; delete it to start over")
        self.records, self.state, self.environment = content["records"], content["state"], content["environment"]

    def add_record(self, record):
        """Note the Record of a finished seed, as plain types, of which nothing can run; a state is of the next seed."""
        self.records.append(json.loads(json.dumps(record.to_dict())))
        self.state = None

    def note_environment(self, environment):
        """Note what may change the last digits, {name: value}; warn where a seed is resumed with other values."""
        if self.state is not None and environment != self.environment:
            before, now = (", ".join(noted.values()) for noted in (self.environment, environment))
            self.console.warning(f"{self.path} is resumed with {now}; before: {before}; last digits may differ")
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
            handlers.close()  # restores those that were there before

        is_needed = self.path is not None or processes.world_size() > 1
        with ExitStack() as handlers:
            if is_needed and threading.current_thread() is threading.main_thread():
                for number in SIGNALS:
                    if signal.getsignal(number) is not signal.SIG_IGN:
                        handlers.callback(signal.signal, number, signal.signal(number, note))
            yield
        self.end_if(*processes.largest(self.signal))  # it came while the last state was being saved

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
        number, is_due = processes.largest(self.signal, is_due)
        if self.path is not None and (number or is_due):
            self.save(state)
        self.end_if(number)

    def save(self, state):
        """Write the file; where that fails, the run warns and goes on.

        Raises NonFiniteError for parameters that are not finite, and leaves the file as it was.
        """
        content = dict(identity=self.identity, environment=self.environment, records=self.records)
        content["state"] = state.state_dict()
        with processes.agreed():  # with shards only process 0 has them
            require_finite(content["state"]["parameters"], "parameter")
        try:
            if processes.rank() == 0:
                with atomic_write(self.path) as temporary, open(temporary, "wb") as file:
                    torch.save(content, file)
        except (OSError, RuntimeError) as error:  # PyTorch's own hides that of the file, for example of a full disk
            reason = error.__context__ if isinstance(error, RuntimeError) else error
            self.console.warning(f"the checkpoint {self.path} could not be written: {reason or error}")
        self.saved_at = time.monotonic()
        processes.barrier()  # torchrun ends process 0, which may still be writing, when another process has ended
