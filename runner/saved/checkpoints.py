"""Interrupted runs: checkpoints on disk, and when they are written."""

import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from runner.data.tensor_files import read_tensors, write_tensors
from runner.files import NonFiniteError, UserError, require_finite
from runner.locks import LockFile, lock_path
from runner.machine import processes
from runner.results.records import Record
from runner.saved.signals import DeferredSignals

KIND, VERSION = "checkpoint", 2

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
    write_tensors(path, KIND, VERSION, {name: value for name, value in flat.items() if name not in tensors}, tensors)


def read_checkpoint(path, identity):
    """What `write_checkpoint` was given. Raises UserError that names the first entry of `identity` that differs."""
    description, tensors = read_tensors(path, KIND, VERSION)
    tree = unflatten(description | tensors)
    for name, value in identity.items():
        if (theirs := tree["identity"].get(name)) != value:
            raise UserError(f"{path} is of a run with {name} {theirs}, not {value}")
    return tree["content"]


def run_identity(experiment, data, weights, device):
    """What makes a run the same run, by name: with any other value it would give other numbers."""
    settings = asdict(experiment)
    for name in ("features", "data_dir", "weights", "device"):  # without effect, or identified by their content
        del settings[name]
    return settings | dict(weights=weights.sha256 or "random", device=device.type, data=data.sha256)


# --- the checkpointer ---


@dataclass
class Checkpoint:
    """What the file holds of a run, besides its identity."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    environment: dict = field(default_factory=dict)  # what may change the last digits; resuming under another one warns
    finished: list = field(default_factory=list)  # a Record of each seed
    training_state: dict | None = None  # the state_dict of the interrupted seed
    parameters: dict = field(default_factory=dict)  # those trained by the last finished seed, if none followed it

    def to_dict(self):
        """What `from_dict` takes: nested dicts of tensors and of what JSON can hold."""
        return vars(self) | dict(finished=[record.to_dict() for record in self.finished])

    @classmethod
    def from_dict(cls, content):
        """What `to_dict` gave, also after it was written and read."""
        return cls(**content | dict(finished=[Record.from_dict(record) for record in content["finished"]]))


class Checkpointer:
    """Writes the state of training so that an interrupted run can be resumed.

    Within `with checkpointer:` the signals that end a run raise KeyboardInterrupt or Terminated, never during an
    update or the writing of the file. Whatever ends the run, the last state that can be resumed is written, but not
    where training diverges, as it would do again. No other run can use the file meanwhile. Without a path nothing is
    written or copied, and signals are left alone.

    Of several processes each reads the file, and process 0 writes it. They agree with each update whether one of them
    has a signal that ends the run, and how old the last checkpoint is; until then signals wait.
    """

    def __init__(self, run_options, identity=None, console=None):
        self.path, self.minutes = run_options.checkpoint, run_options.checkpoint_minutes
        self.run_options, self.identity, self.console = run_options, identity, console
        self.checkpoint = Checkpoint()
        self.signals = DeferredSignals()
        self.lock = LockFile(lock_path(self.path or ""))
        self.latest = None  # (TrainingState, its snapshot): the last state that can be resumed
        self.written_at, self.is_written, self.last_warning = time.monotonic(), False, None
        self.age, self.is_stopped_by_all = 0.0, False  # seconds since the last checkpoint, as of the last update

    def load(self):
        """Read the file, if there is one and it is not to be overwritten.

        Raises UserError for one that is damaged or of another run, UserError where --save_model or --export asks for
        a classifier that is no longer in it.
        """
        if self.run_options.restart or not Path(self.path).exists():
            return
        try:
            self.checkpoint = Checkpoint.from_dict(read_checkpoint(self.path, self.identity))
        except UserError as error:
            raise UserError(f"{error}; --restart overwrites it") from None
        self.is_written = True
        for name, tensor in self.checkpoint.parameters.items():  # out of the memory map of a file that will be replaced
            self.checkpoint.parameters[name] = tensor.clone()
        n_finished = len(self.checkpoint.finished)
        is_replaced = n_finished > 1 or (n_finished == 1 and self.checkpoint.training_state is not None)
        for name in ("save_model", "export"):
            if getattr(self.run_options, name) is not None and is_replaced:
                seed = self.identity["seed"]
                raise UserError(f"--{name}: {self.path} no longer holds the classifier of seed {seed}, but a later one")

    def take_lock(self):
        """Raises UserError if another run has the lock."""
        problem = None
        try:
            if holder := self.lock.acquire():
                raise UserError(f"--checkpoint {self.path} is used by {holder}; wait for it, or use another file")
            if not self.lock.is_effective:
                problem = "its file system has no locks"
        except OSError as error:
            problem = f"{self.lock.path}: {error.strerror or error}"
        if problem:
            self.console.warning(f"{self.path} is not locked ({problem}); use it in one run at a time")

    def resume(self, state):
        """Restore a TrainingState from the checkpoint of the interrupted seed; whether there was one."""
        if self.checkpoint.training_state is None:
            return False
        state.load_state_dict(self.checkpoint.training_state)
        self.checkpoint.training_state = None
        self.remember(state)
        return True

    def set_environment(self, environment):
        """Note what may change the last digits, by name; warn where an interrupted seed ran under another one."""
        for name, value in environment.items() if self.checkpoint.training_state is not None else ():
            if (before := self.checkpoint.environment[name]) != value:
                self.console.warning(
                    f"{self.path} was started with {name} {before} and is resumed with {value}: last digits may differ"
                )
        self.checkpoint.environment = environment

    # while training

    @contextmanager
    def update(self, state):
        """Parameters change within it; after it, training can be resumed from `state`."""
        with self.signals.deferred(stay=processes.world_size() > 1):
            self.latest = None  # an error during the update leaves nothing to resume from but the file
            yield
            self.remember(state)
            age = time.monotonic() - self.written_at
            signal_number, self.age = processes.largest(self.signals.pending or 0, age)
        if processes.world_size() > 1 and signal_number:
            self.is_stopped_by_all, self.signals.pending = True, int(signal_number)
            self.signals.end_run()

    def remember(self, state):
        """Training can be resumed from `state` as it is now."""
        if self.path is not None:
            self.latest = state, state.snapshot()

    def save_if_due(self, state):
        """Training can be resumed from `state` as it is now; write it if the last checkpoint is old enough."""
        if self.age >= 60 * self.minutes:
            self.save(state)
        else:
            self.remember(state)

    def save(self, state):
        """Write the state as it is now."""
        self.remember(state)
        with self.signals.deferred():
            if self.path is not None:
                self.write_training()

    def finish(self, record, parameters):
        """Keep the Record of a seed and its trained parameters, {name: tensor}, in place of its state of training."""
        with self.signals.deferred():
            self.latest = None
            self.checkpoint.finished.append(record)
            if self.path is not None:
                self.write(parameters=parameters)

    def write_training(self):
        """Write the last state that can be resumed. Raises NonFiniteError for parameters that are not finite."""
        state, snapshot = self.latest
        training_state = state.state_dict_at(snapshot)
        require_finite(training_state["parameters"], "parameter")
        self.write(training_state=training_state)

    def write(self, **parts):
        """Write the file, with these entries of Checkpoint. Where that fails, the run warns, once, and continues."""
        try:
            content = self.checkpoint.to_dict() | dict(training_state=None, parameters={}) | parts
            if processes.rank() == 0:
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
            with processes.main_first():
                if processes.rank() == 0:
                    self.take_lock()
                try:
                    self.load()
                except Exception:
                    self.lock.release()
                    raise
            self.require_the_same_file()
        if self.path is not None or processes.world_size() > 1:
            self.signals.install()
        return self

    def require_the_same_file(self):
        """Raises UserError where process 0 has read another checkpoint than this one."""
        found = (self.checkpoint.training_state or {}).get("batches_done"), len(self.checkpoint.finished)
        if processes.from_main(found) != found:
            raise UserError(
                f"--checkpoint {self.path}: this host has another file there, or none, than that of process 0"
            )

    def __exit__(self, kind, error, traceback):
        self.signals.is_deferring = True
        try:
            # To gather shards takes all processes: where they do not end together, the last checkpoint stays.
            can_write = self.latest is not None and (self.is_stopped_by_all or not self.latest[0].has_shards)
            if error is not None and can_write and not isinstance(error, NonFiniteError):
                with suppress(NonFiniteError):
                    self.write_training()
            if self.is_stopped_by_all:
                processes.barrier()  # torchrun ends process 0 when another one has ended
        finally:
            self.signals.uninstall()
            self.lock.release()
        if error is None and self.signals.pending is not None:
            self.signals.end_run()
        if isinstance(error, KeyboardInterrupt) and self.is_written and Path(self.path).exists():
            command = "the same command without --restart" if self.run_options.restart else "the same command"
            error.args = (f"interrupted; {command} resumes from {self.path}",)
