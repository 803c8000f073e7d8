"""Interrupted runs: the state of training, and its checkpoints on disk."""

import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .devices import peak_memory, random_states, reset_peak_memory, set_random_states
from .files import FileError, NonFiniteError, UsageError, read_tensors, require_finite, write_tensors
from .locks import LockFile
from .options import RunOptions
from .records import History, Record
from .signals import DeferredSignals

KIND, VERSION = "checkpoint", 2

# --- the state of training ---


class Usage:
    """Seconds and memory of a run from the creation of this object on, interrupted parts of the run included."""

    def __init__(self, device):
        self.device, self.known_above = device, reset_peak_memory(device)
        self.started = dict(total=time.perf_counter())
        self.before = dict(training=0.0, total=0.0, peak_memory=0)  # before the interruption

    def start_training(self):
        self.started["training"] = time.perf_counter()

    def so_far(self):
        """Seconds of `training` and in `total`, and `peak_memory` in bytes, 0 where it is not known."""
        now, before = time.perf_counter(), self.before
        seconds = {kind: before[kind] + now - started for kind, started in self.started.items()}
        peak = peak_memory(self.device, self.known_above) or 0
        return seconds | dict(peak_memory=max(before["peak_memory"], peak))


class TrainingState:
    """All that training changes, and how far it has come: what a run needs to continue as if it had never stopped."""

    def __init__(self, classifier, optimizer, usage=None):
        """`usage` counts from the start of the run of this seed, by default from now."""
        self.parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        self.optimizer, self.device = optimizer, classifier.device
        self.history = History()
        self.steps_done = 0  # batches whose updates are made
        self.order = torch.empty(0, dtype=torch.long)  # message indices of the current epoch, batch after batch
        self.usage = usage or Usage(classifier.device)
        self.usage.start_training()

    def snapshot(self):
        """What evaluations change too, as it is now. Constant work, however long the run is."""
        return dict(
            steps_done=self.steps_done,
            usage=self.usage.so_far(),
            history=self.history.lengths,
            order=self.order,
            random_states=random_states(self.device),
        )

    def state_dict(self, snapshot=None):
        """Everything that `load_state_dict` restores: nested dicts of tensors and of what JSON can hold.

        As of now, or of a `snapshot` that was taken since the last update.
        """
        snapshot = snapshot or self.snapshot()
        return snapshot | dict(
            history=self.history.to_dict(snapshot["history"]),
            parameters=self.parameters,
            optimizer={name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()},
        )

    @torch.no_grad()
    def load_state_dict(self, state):
        self.steps_done, self.usage.before, self.order = state["steps_done"], state["usage"], state["order"].clone()
        self.history = History.from_dict(state["history"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
            # Nothing is there of a parameter that had no gradient.
            for moment, tensor in state.get("optimizer", {}).get(name, {}).items():
                self.optimizer.state[parameter][moment] = tensor.to(parameter.device, copy=True)
        set_random_states(state["random_states"])


# --- the file ---


def flatten(tree, prefix=""):
    """{"a": {"b": leaf}} to {"a/b": leaf}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat


def unflatten(flat):
    """The inverse of `flatten`, but for empty dicts."""
    tree = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def write_checkpoint(path, identity, content):
    """Write nested dicts of tensors and of what JSON can hold. Raises OSError; the file that was there then stays."""
    flat = flatten(dict(identity=identity, content=content))
    tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    write_tensors(path, KIND, VERSION, {name: flat[name] for name in flat.keys() - tensors.keys()}, tensors)


def read_checkpoint(path, identity):
    """What `write_checkpoint` was given. Raises FileError that names the first entry of `identity` that differs."""
    description, tensors = read_tensors(path, KIND, VERSION)
    tree = unflatten(description | tensors)
    for name, value in identity.items():
        if (theirs := tree["identity"].get(name)) != value:
            raise FileError(f"{path} is of a run with {name} {theirs}, not {value}")
    return tree["content"]


def run_identity(experiment, data, weights, device):
    """What makes a run the same run, by name: with any other value it would give other numbers."""
    settings = asdict(experiment)
    for name in ("features", "data_dir"):  # without effect on numbers, and identified by its content
        del settings[name]
    return settings | dict(weights=weights.sha256 or "random", device=device.type, data=data.sha256)


# --- the checkpointer ---


@dataclass
class Checkpoint:
    """What the file holds of a run, besides its identity."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    environment: dict = field(default_factory=dict)  # what may change the last digits; resuming under another one warns
    finished: list = field(default_factory=list)  # a Record of each seed
    training: dict | None = None  # the state_dict of the interrupted seed
    trained: dict = field(default_factory=dict)  # the trained parameters of the last finished seed, if none followed

    def to_dict(self):
        return vars(self) | dict(finished=[record.to_dict() for record in self.finished])

    @classmethod
    def from_dict(cls, content):
        return cls(**content | dict(finished=[Record.from_dict(record) for record in content["finished"]]))


class Checkpointer:
    """Writes the state of training so that an interrupted run can be resumed.

    Within `with checkpointer:` the signals that end a run raise KeyboardInterrupt or Terminated, never during an
    update or the writing of the file, and whatever ends the run, the last state that can be resumed is written. No
    other run can use the file meanwhile. Without a path nothing is written or copied, and signals are left alone.
    """

    def __init__(self, run_options=RunOptions(), identity=None, console=None):
        self.path, self.minutes = run_options.checkpoint, run_options.checkpoint_minutes
        self.run_options, self.identity, self.console = run_options, identity, console
        self.checkpoint = Checkpoint()
        self.signals = DeferredSignals()
        self.lock = LockFile(f"{self.path}.lock")
        self.latest = None  # (TrainingState, its snapshot): the last state that can be resumed
        self.written_at, self.is_written, self.last_warning = time.monotonic(), False, None

    def load(self):
        """Read the file, if there is one and it is not to be overwritten.

        Raises FileError for one that is damaged or of another run, UsageError where --save_model asks for a
        classifier that is no longer in it.
        """
        if self.run_options.restart or not Path(self.path).exists():
            return
        try:
            self.checkpoint = Checkpoint.from_dict(read_checkpoint(self.path, self.identity))
        except FileError as error:
            raise FileError(f"{error}; --restart overwrites it") from None
        self.is_written = True
        trained = self.checkpoint.trained
        self.checkpoint.trained = {name: tensor.clone() for name, tensor in trained.items()}  # out of the memory map
        seeds = [record.seed for record in self.checkpoint.finished]
        current = seeds[-1:] if self.checkpoint.training is None else [seeds[-1] + 1] if seeds else []
        if self.run_options.save_model is not None and self.identity["seed"] in seeds and current != seeds[:1]:
            raise UsageError(
                f"--save_model: {self.path} holds the classifier of seed {current[0]}, not of seed {seeds[0]}"
            )

    def take_lock(self):
        """Raises UsageError if another run has the lock."""
        try:
            holder = self.lock.acquire()
        except OSError:
            return  # nothing can be written here: the run warns of that when it writes its first checkpoint
        if holder is not None:
            raise UsageError(f"--checkpoint {self.path} is used by {holder}; wait for it, or use another file")
        if not self.lock.is_effective:
            self.console.warning(
                f"{self.path} is not locked: its file system has no locks; use it in one run at a time"
            )

    def resume(self, state):
        """Restore a TrainingState from the checkpoint of the interrupted seed; whether there was one."""
        if self.checkpoint.training is None:
            return False
        state.load_state_dict(self.checkpoint.training)
        self.checkpoint.training = None
        self.remember(state)
        return True

    def set_environment(self, environment):
        """Note what may change the last digits, by name; warn where an interrupted seed ran under another one."""
        for name, value in environment.items() if self.checkpoint.training is not None else ():
            if (before := self.checkpoint.environment[name]) != value:
                self.console.warning(
                    f"{self.path} was started with {name} {before} and is resumed with {value}: last digits may differ"
                )
        self.checkpoint.environment = environment

    # while training

    @contextmanager
    def update(self, state):
        """Parameters change within it; after it, training can be resumed from `state`."""
        with self.signals.deferred():
            self.latest = None  # an error during the update leaves nothing to resume from but the file
            yield
            self.remember(state)

    def remember(self, state):
        if self.path is not None:
            self.latest = state, state.snapshot()

    def save_if_due(self, state):
        """Write the state if the last checkpoint is older than the interval; call it after an update."""
        if time.monotonic() - self.written_at >= 60 * self.minutes:
            self.save(state)

    def save(self, state):
        """Write the state as it is now."""
        self.remember(state)
        if self.path is not None:
            with self.signals.deferred():
                self.write_training()

    def finish(self, record, parameters):
        """Keep the Record of a seed and its trained parameters, {name: tensor}, in place of its state of training."""
        self.latest = None
        self.checkpoint.finished.append(record)
        if self.path is not None:
            with self.signals.deferred():
                self.write(trained=parameters)

    def write_training(self):
        """Write the last state that can be resumed. Raises NonFiniteError for one that has no future."""
        state, snapshot = self.latest
        require_finite(state.parameters, "parameter")
        self.write(training=state.state_dict(snapshot))

    def write(self, **parameters):
        """Write the file. If that fails, the run warns, once for each reason, and continues."""
        try:
            content = self.checkpoint.to_dict() | dict(training=None, trained={}) | parameters
            write_checkpoint(self.path, self.identity, content)
            self.is_written = True
        except OSError as error:
            warning = f"the checkpoint {self.path} could not be written: {error.strerror or error}"
            if warning != self.last_warning:
                self.console.warning(warning)
            self.last_warning = warning
        self.written_at = time.monotonic()

    def __enter__(self):
        if self.path is not None:
            self.take_lock()
            try:
                self.load()
            except Exception:
                self.lock.release()
                raise
            self.signals.install()
        return self

    def __exit__(self, kind, error, traceback):
        self.signals.is_deferring = True
        if error is not None and self.latest is not None:
            with suppress(NonFiniteError):
                self.write_training()
        self.signals.uninstall()
        self.lock.release()
        if isinstance(error, KeyboardInterrupt) and self.is_written:
            command = "the same command without --restart" if self.run_options.restart else "the same command"
            error.args = (f"interrupted; {command} resumes from {self.path}",)
