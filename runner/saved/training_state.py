"""The state of training, from which an interrupted run continues, and what the run has used so far."""

import time

import torch

from runner.machine import processes
from runner.machine.devices import peak_memory, random_states, reset_peak_memory, set_random_states
from runner.results.records import History


class Usage:
    """Seconds and memory of a run from the creation of this object on, interrupted parts of the run included."""

    def __init__(self, device):
        self.device, self.known_above = device, reset_peak_memory(device)
        self.started = dict(total=time.perf_counter())
        self.before = dict(training=0.0, total=0.0, peak_memory=0)  # before the interruption

    def start_training(self):
        """Training starts now."""
        self.started["training"] = time.perf_counter()

    def so_far(self):
        """Seconds of `training` and in `total`, and `peak_memory` in bytes, 0 where it is not known."""
        now, before = time.perf_counter(), self.before
        seconds = {kind: before[kind] + now - started for kind, started in self.started.items()}
        peak = peak_memory(self.device, self.known_above) or 0
        return seconds | dict(peak_memory=max(before["peak_memory"], peak))


class TrainingState:
    """All that training changes, and how far it has come: what a run needs to continue as if it had never stopped."""

    def __init__(self, classifier, optimizer, usage):
        self.parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        self.optimizer, self.device = optimizer, classifier.device
        self.history = History()
        self.batches_done = 0  # whose updates are made
        self.order = torch.empty(0, dtype=torch.long)  # message indices of the current epoch, batch after batch
        self.usage = usage

    def snapshot(self):
        """A cheap copy of what evaluations change: its cost does not grow with the length of the run."""
        return dict(
            batches_done=self.batches_done,
            usage=self.usage.so_far(),
            history=self.history.lengths,
            order=self.order,
            random_states=random_states(self.device),
        )

    def state_dict(self):
        """Everything that `load_state_dict` restores: nested dicts of tensors and of what JSON can hold."""
        return self.state_dict_at(self.snapshot())

    def state_dict_at(self, snapshot):
        """The `state_dict` as of a `snapshot` that was taken since the last update.

        With shards, all processes have to call it, and only process 0 gets the tensors.
        """
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return snapshot | dict(
            history=self.history.to_dict(snapshot["history"]),
            parameters=self.full_parameters(),
            optimizer={name: {key: processes.full(t) for key, t in kept.items()} for name, kept in moments.items()},
        )

    @property
    def has_shards(self):
        """Whether the parameters are shards."""
        return any(map(processes.is_divided, self.parameters.values()))

    def full_parameters(self):
        """The trained parameters, {name: tensor}; with shards as in `state_dict_at`."""
        return {name: processes.full(parameter) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restore what `state_dict` gave; tensors are copied."""
        self.batches_done, self.usage.before, self.order = state["batches_done"], state["usage"], state["order"].clone()
        self.history = History.from_dict(state["history"])
        for name, parameter in self.parameters.items():
            parameter.copy_(processes.divided_like(state["parameters"][name], parameter))
            # Nothing is there of a parameter that had no gradient.
            for key, tensor in state.get("optimizer", {}).get(name, {}).items():
                tensor = processes.divided_like(tensor, parameter)
                self.optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)
        set_random_states(state["random_states"])
