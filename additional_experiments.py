"""Fine-tune GPT-2 as a spam classifier: one configuration per call, one row of a table of 19.

    python additional_experiments.py --demo            # toy model, no network, half a minute on two cores
    python additional_experiments.py                   # row 1: pretrained 124M, last block, last token
    python additional_experiments.py --row 16          # any other row of the table below

With `--weights random --device cpu` and its other defaults a run gives the numbers of the public original of this
experiment: every printed loss to three decimals, every accuracy to the example (docs/equality.md has the details). It
draws its random numbers in the same order; where that matters, a comment says so.

The file reads in the order of a run: settings, tokens, classifier, training, evaluation, one run, main. The rows are in
`runner/rows.py`, GPT-2 itself in `previous_chapters.py`; what else is in `runner/` is not the experiment.
In the shapes B is messages in a batch, T tokens in a message, D the embedding width, K classes.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from gpt_download import PRETRAINED, Weights, find_weights, load_vocabulary
from previous_chapters import GPT_SIZES, GPTConfig, GPTModel, load_gpt2_weights, select_positions
from runner import options
from runner.console import Console, describe_model, describe_setup, exit_status, prepare_streams
from runner.data import datasets
from runner.data.datasets import DEFAULT_DATA_DIR, SPLITS
from runner.data.features import FrozenFeatures, compute_features
from runner.data.messages import Messages, Stage, cut_and_pad, split_into_passes, tokenize
from runner.files import NonFiniteError, UserError
from runner.machine import processes
from runner.machine.devices import (
    compare_results,
    describe_devices,
    describe_system,
    release_memory,
    resolve_device,
    set_precision,
)
from runner.options import DATA, INPUT, MACHINE, MAX_CONTEXT, MODEL, TRAINING, RunOptions, number, option
from runner.results import records
from runner.results.accuracy import Accuracy, Confusion, describe_test
from runner.results.pictures import plot_histories
from runner.results.records import History, Record
from runner.results.report import print_report, print_row
from runner.saved import classifiers, export
from runner.saved.checkpoints import Checkpoint, TrainingState, run_identity
from runner.saved.classifiers import SavedClassifier, load_parameters

# --- the settings of an experiment ---


@dataclass(frozen=True)
class Experiment:
    """All settings of one run; each field is an option of the command line, with its default.

    Raises UserError for a value that an option does not take, and for values that cannot be combined.
    """

    model_size: str = option(
        "gpt2-small (124M)", MODEL, f"{', '.join(GPT_SIZES)}; xl is enough", type=options.model_size
    )
    weights: str = option("pretrained", MODEL, "pretrained, random, or a GPT-2 .safetensors file", metavar="W")
    trainable_layers: str = option(
        "last_block",
        MODEL,
        "trained besides the head; lora: all linear layers adapted, lora_alternative: merged into their weights",
        choices=("last_block", "last_layer", "last_two_blocks", "all", "lora", "lora_alternative"),
    )
    lora_rank: int = option(8, MODEL, "inner dimension of the LoRA matrices", type=number(int, 1))
    lora_alpha: float = option(8.0, MODEL, "factor of LoRA, not divided by the rank", type=number(float, 1e-12))
    trainable_token_pos: str = option(
        "last", INPUT, "position to classify; flexible: the last real token", choices=("last", "first", "flexible")
    )
    average_embeddings: bool = option(
        False, INPUT, "average over all positions instead; with flexible or --no_padding over real tokens only"
    )
    context_length: str | int = option(
        "longest_training_example",
        INPUT,
        f"tokens of a message: longest_training_example, model_context_length, or 1 to {MAX_CONTEXT}",
        type=options.context_length,
    )
    no_padding: bool = option(False, INPUT, "do not pad; results do not depend on the batch")
    disable_causal_mask: bool = option(False, MODEL, "let every token attend to later ones too")
    ignore_index: int = option(-100, TRAINING, "label that the loss ignores", type=number(int))
    batch_size: int = option(8, TRAINING, "messages in a batch", type=number(int, 1))
    accumulation_steps: int = option(1, TRAINING, "batches that an update averages", type=number(int, 1))
    num_epochs: int = option(5, TRAINING, "passes over the training messages", type=number(int, 1))
    learning_rate: float = option(5e-5, TRAINING, "step size of AdamW", type=number(float, 1e-12))
    weight_decay: float = option(0.1, TRAINING, "decoupled weight decay of AdamW", type=number(float, 0))
    seed: int = option(123, TRAINING, "of weights, head and training order", type=number(int, 0))
    device: str = option("auto", MACHINE, "auto: cuda, else mps, else cpu", choices=("auto", "cpu", "mps", "cuda"))
    precision: str = option(
        "fp32", MACHINE, "of products; the rest stays float32; tf32 is for CUDA", choices=("fp32", "bf16", "tf32")
    )
    features: str = option(
        "auto",
        MACHINE,
        "where the frozen blocks' output, computed once, is held; auto: in memory, else on disk, else recomputed (off)",
        choices=("auto", "memory", "disk", "off"),
    )
    data_dir: str = option(
        DEFAULT_DATA_DIR, DATA, "the collection, or your own train.csv, validation.csv and test.csv", metavar="DIR"
    )
    dataset: str = option("uci", DATA, "uci: --data_dir; sample: 1,500 messages in data/", choices=("uci", "sample"))

    def __post_init__(self):
        options.check_values(self)
        if self.weights == "pretrained" and self.model_size not in PRETRAINED:
            raise UserError(f"{self.model_size} has no pretrained weights; use --weights random or --weights FILE")
        if self.weights not in ("pretrained", "random") and not Path(self.weights).is_file():
            raise UserError(f"--weights {self.weights}: neither pretrained nor random, and no such file")
        if self.lora_rank > (emb_dim := GPT_SIZES[self.model_size]["emb_dim"]):
            raise UserError(f"--lora_rank {self.lora_rank} exceeds the width {emb_dim} of {self.model_size}")
        if self.average_embeddings and self.trainable_token_pos == "first":
            raise UserError("--average_embeddings (all positions) cannot be combined with --trainable_token_pos first")

    @property
    def config(self):
        """The GPTConfig of the model size and the mask."""
        return GPTConfig(**GPT_SIZES[self.model_size], causal=not self.disable_causal_mask)


DEFAULTS = asdict(Experiment())


def parse_args(argv=None):
    """The command line as (Experiment, RunOptions, the options of the experiment that were given).

    The Experiment is None where nothing is to be trained. Raises UserError.
    """
    return options.parse(argv, Experiment)


# --- tokens, and the position that is classified ---

PAD_TOKEN = 50256


def encode(tokenizer, splits, experiment):
    """The splits as token ids: ({split: Messages}, limit in tokens, tokens of the longest message, pads included).

    Only the tokens are kept that the classified position can see. Under the causal mask these are the tokens up to
    it: `first` sees one token, `flexible` no pads.
    """
    encoded = {split: tokenize(tokenizer, list(frame["Text"])) for split, frame in splits.items()}
    limit = experiment.context_length
    if limit == "model_context_length" or (limit == "longest_training_example" and experiment.no_padding):
        limit = MAX_CONTEXT  # without padding nothing needs to be as long as the longest training message
    elif limit == "longest_training_example":
        limit = min(max(map(len, encoded["train"])), MAX_CONTEXT)
    messages = {split: encode_split(encoded[split], splits[split]["Label"], limit, experiment) for split in splits}
    longest = max(max(map(len, token_ids)) for token_ids in encoded.values())
    return messages, limit, min(longest, limit) if experiment.no_padding else limit


def encode_split(token_ids, labels, limit, experiment):
    """Messages from what `tokenize` gives, and labels (n,): cut to `limit`, padded to it, cut to what is visible."""
    n_real = torch.tensor([min(len(message), limit) for message in token_ids])
    n_tokens = n_real if experiment.no_padding else torch.full_like(n_real, limit)  # pads included
    match experiment.trainable_token_pos:
        case "last":
            positions = n_tokens - 1
        case "first":
            positions = torch.zeros_like(n_tokens)
        case "flexible":
            positions = n_real - 1
    n_visible = n_tokens if experiment.disable_causal_mask else positions + 1
    visible = cut_and_pad(token_ids, n_visible, PAD_TOKEN)
    return Messages(Stage.TOKEN_IDS, visible, n_visible, positions, torch.tensor(labels.to_numpy()))


def prepare_data(experiment):
    """The datasets.Dataset of an experiment, with its messages. Errors: those of `datasets.load`."""
    data, splits = datasets.load(experiment.data_dir, experiment.dataset, experiment.ignore_index)
    if experiment.batch_size > (n := len(splits["train"])):
        raise UserError(f"--batch_size {experiment.batch_size}: there are only {n} training messages")
    data.messages, data.limit, data.longest = encode(load_vocabulary(), splits, experiment)
    return data


# --- classifier ---
#
# The idea of this program is to compute only what the loss can see, and that only once:
#   1. visible prefix: tokens that the classified position cannot see are dropped    (encode_split)
#   2. one query: the last block computes the classified position only              (GPTModel.blocks)
#   3. frozen features: what comes before the first trained parameter runs once     (Classifier.frozen_part)
#   4. no keys and values: the last block, on frozen features, forms none           (attend_to_normalized)
# None of it changes a number beyond rounding.


class LinearWithLoRA(nn.Module):
    """A linear layer plus a product of two low-rank matrices (Hu et al. 2021, section 4.1).

    x (..., in) to x W + b + alpha x A B (..., out), with A (in, rank) and B (rank, out), which starts at zero. Unlike
    in the paper, and as in the public original, the factor is alpha, not alpha / rank.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.alpha = linear, alpha
        self.A = nn.Parameter(torch.empty(linear.in_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, linear.out_features))

    def forward(self, x):
        low_rank = x @ self.A
        out = self.linear(x)
        # Added in place: the product is cheap, and a second `out` would cost more to write than to compute.
        out.view(-1, out.shape[-1]).addmm_(low_rank.flatten(0, -2), self.B.to(low_rank.dtype), alpha=self.alpha)
        return out


class LinearWithMergedLoRA(LinearWithLoRA):
    """The same function, with the product added to the weight before x is multiplied."""

    def forward(self, x):
        return F.linear(x, self.linear.weight + self.alpha * (self.A @ self.B).T, self.linear.bias)


def add_lora(module, lora, rank, alpha):
    """Wrap every nn.Linear below `module`, depth first: the order in which the A matrices are drawn."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, lora(child, rank, alpha))
        else:
            add_lora(child, lora, rank, alpha)


@torch.no_grad()
def merge_lora(module):
    """The inverse of `add_lora`, which keeps the function: every LinearWithLoRA becomes one nn.Linear."""
    for name, child in module.named_children():
        if isinstance(child, LinearWithLoRA):
            product = child.alpha * (child.A.double() @ child.B.double())
            child.linear.weight.data = (child.linear.weight.double() + product.T).to(child.linear.weight.dtype)
            setattr(module, name, child.linear)
        else:
            merge_lora(child)


class Classifier(nn.Module):
    """GPT-2 with a head of K classes at one position of a message, or at the mean over all its positions.

    It runs in two parts. What comes before the first trained parameter gives the same for a message each time, so the
    frozen part may run once per message (runner/features.py); the trained part continues from there.

    A Batch holds x, (B, T) token ids or (B, T, D) what became of them so far, which its `stage` says; `positions` (B,),
    the position that is classified, or the last one that is averaged over; `key_mask` (B, 1, 1, T), False for pads.
    """

    def __init__(self, gpt, n_classes, average, bf16=False):
        super().__init__()
        self.gpt, self.average, self.bf16 = gpt, average, bf16
        self.out_head = nn.Linear(gpt.cfg.emb_dim, n_classes)
        self.n_frozen_blocks = 0  # before the first trained parameter; if all, the final norm is frozen too

    @property
    def device(self):
        """The torch.device of its parameters."""
        return self.gpt.final_norm.weight.device

    @property
    def feature_stage(self):
        """The Stage at which the frozen part ends."""
        n_trained_blocks = len(self.gpt.trf_blocks) - self.n_frozen_blocks
        if self.n_frozen_blocks == 0:
            return Stage.TOKEN_IDS
        if n_trained_blocks == 0:
            return Stage.HEAD_INPUT
        if n_trained_blocks == 1 and not self.average:  # one query per message, which needs no keys and values
            return Stage.STANDARDIZED
        return Stage.HIDDEN_STATES

    @property
    def n_full_blocks(self):
        """How many of the frozen blocks run at all positions: all, but for the last of the model with one query."""
        is_one_query = self.n_frozen_blocks == len(self.gpt.trf_blocks) and not self.average
        return self.n_frozen_blocks - is_one_query

    def forward(self, batch, compute=None):
        """A Batch to logits (B, K), or to what `compute` makes of it, one of the methods below.

        All that is computed begins here: this is where shards of the weights are gathered.
        """
        if compute is not None:
            return compute(batch)
        return self.trained_part(self.frozen_part(batch))

    @torch.no_grad()
    def frozen_part(self, batch):
        """A Batch, however far it is, to one at `feature_stage`; one that is there already is returned as it is."""
        stage = self.feature_stage
        if batch.stage is stage and batch.n_blocks == self.n_frozen_blocks:
            return batch
        batch = self.run_blocks(batch, self.n_frozen_blocks)
        match stage:
            case Stage.HIDDEN_STATES:
                return batch
            case Stage.STANDARDIZED:
                residual = select_positions(batch.x, batch.positions)  # (B, 1, D)
                # The standardized input goes into products only, so with bf16 it may be kept in bfloat16.
                x_hat = self.gpt.trf_blocks[-1].standardize(batch.x).to(torch.bfloat16 if self.bf16 else batch.x.dtype)
                return replace(batch, stage=stage, x=x_hat, residual=residual)
            case Stage.HEAD_INPUT:
                positions = torch.zeros_like(batch.positions)
                return replace(batch, stage=stage, x=self.pool(batch.x, batch), positions=positions, key_mask=None)

    def trained_part(self, batch):
        """A Batch at `feature_stage` to logits (B, K), the head in full precision."""
        match batch.stage:
            case Stage.HEAD_INPUT:
                return self.out_head(batch.x.squeeze(1))
            case Stage.STANDARDIZED:
                with self.autocast():
                    x = self.gpt.trf_blocks[-1].forward_normalized(batch.residual, batch.x, batch.key_mask)
            case _:
                x = self.run_blocks(batch, len(self.gpt.trf_blocks)).x
        return self.out_head(self.pool(x, batch).squeeze(1))

    def run_blocks(self, batch, end):
        """A Batch of token ids or hidden states to the hidden states after `end` blocks.

        The model's very last block is asked for one position, unless the mean over all is wanted.
        """
        query_positions = None if self.average else batch.positions
        with self.autocast():
            x = self.gpt.embed(batch.x) if batch.stage is Stage.TOKEN_IDS else batch.x
            x = self.gpt.blocks(x, batch.n_blocks, end, batch.key_mask, query_positions)
        return replace(batch, stage=Stage.HIDDEN_STATES, x=x, n_blocks=end)

    def pool(self, x, batch):
        """What the last block gave, (B, 1, D) or for the mean (B, T, D), to the head's input (B, 1, D)."""
        x = self.gpt.final_norm(x)
        return mean_up_to(x, batch.positions) if self.average else x

    def autocast(self):
        """The context in which products are bfloat16 ones, with bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def is_frozen(module):
    """Whether no parameter of a module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def count_frozen_blocks(gpt):
    """How many blocks come before the first trained parameter."""
    if not is_frozen(gpt.tok_emb) or not is_frozen(gpt.pos_emb):
        return 0
    return len(list(takewhile(is_frozen, gpt.trf_blocks)))


def mean_up_to(x, positions):
    """The mean of each message's vectors up to and including its position: x (B, T, D), positions (B,) to (B, 1, D).

    The head is linear, so it may be applied to this mean instead of to each vector.
    """
    is_averaged = torch.arange(x.shape[1], device=x.device) <= positions[:, None]  # (B, T)
    weights = is_averaged / is_averaged.sum(1, keepdim=True).to(x.dtype)
    return weights[:, None] @ x


def build_classifier(experiment, n_classes, weights=None):
    """The classifier of an experiment, on the CPU, with what is not trained frozen.

    `weights` maps the names of a GPT-2 checkpoint to tensors; None draws random ones. The draws are, in this
    order, re-seeding before each: the model, then the head and the LoRA matrices.
    """
    torch.manual_seed(experiment.seed)
    with nullcontext() if weights is None else torch.device("meta"):  # names and shapes only, nothing drawn or stored
        gpt = GPTModel(experiment.config)
    if weights is not None:
        load_gpt2_weights(gpt, weights)
    gpt.requires_grad_(False)

    torch.manual_seed(experiment.seed)
    classifier = Classifier(gpt, n_classes, experiment.average_embeddings, bf16=experiment.precision == "bf16")
    match experiment.trainable_layers:
        case "last_layer":
            trained = []
        case "last_block":
            trained = [gpt.trf_blocks[-1], gpt.final_norm]
        case "last_two_blocks":
            trained = [gpt.trf_blocks[-2:], gpt.final_norm]
        case "all":
            trained = [gpt]
        case "lora" | "lora_alternative" as kind:
            trained = []
            lora = LinearWithLoRA if kind == "lora" else LinearWithMergedLoRA
            add_lora(classifier, lora, experiment.lora_rank, experiment.lora_alpha)
    for module in trained:
        module.requires_grad_(True)
    classifier.n_frozen_blocks = count_frozen_blocks(gpt)
    return classifier


def copy_trained_parameters(classifier):
    """Copy what is trained out of the file's memory map. Returns the classifier."""
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return classifier


def optimize_frozen_blocks(classifier):
    """Fuse frozen layers, and with bf16 cast them, for speed; call it when the classifier is on its device.

    Trained parameters stay as they are, and so does the function that the classifier computes, but for the rounding
    of products with bf16. Returns the classifier.
    """
    for module in classifier.gpt.trf_blocks.modules():
        # A merged LoRA product would be lost in the rounding of a bfloat16 weight, so that weight stays as it is.
        if classifier.bf16 and type(module) is LinearWithLoRA:
            module.linear.to(torch.bfloat16)
    for block in classifier.gpt.trf_blocks[: classifier.n_frozen_blocks]:
        for module in block.modules():
            if classifier.bf16 and isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        block.att.fuse()
    return classifier


# --- training ---

EVALUATE_EVERY = 50  # batches
EVALUATE_BATCHES = 5
MESSAGES_PER_PASS = 64  # of the trained part over frozen features


def make_loaders(messages, batch_size):
    """The one place that makes batches: for each split an iterable of message indices (B,).

    Only that of the training messages shuffles, and drops the last partial batch. Each iter() over one of them draws
    from PyTorch's global random state, also without shuffling; the sequence of these draws is part of a run's numbers.
    """
    return {
        split: DataLoader(range(len(messages[split])), batch_size, shuffle=split == "train", drop_last=split == "train")
        for split in SPLITS
    }


def windows(batches, size):
    """Lists of `size` batches; the last may be shorter."""
    batches = iter(batches)
    while window := list(islice(batches, size)):
        yield window


def loss_weights(labels, batch_sizes, ignore_index):
    """The weight of each message's cross entropy in the mean of the batches' means.

    labels (n,) of batches of these sizes, one after the other; to (n,). An ignored label weighs nothing, a batch
    of which all are ignored is not counted, and if that is every batch all weights are zero: never NaN.
    """
    counts = [(batch != ignore_index).double() for batch in labels.cpu().split(batch_sizes)]
    n_batches = sum(int(count.any()) for count in counts)
    return torch.cat([count / count.sum().clamp(min=1) for count in counts]) / max(n_batches, 1)


def accumulate_gradients(classifier, messages, window, experiment):
    """Add to the gradients those of the mean loss over the batches of an accumulation window.

    Over frozen features little is left to run, and the window runs in passes of MESSAGES_PER_PASS, wherever its
    batches end. Elsewhere accumulation is there to save memory, and each batch is a pass. Of several processes each
    takes its share of every pass, and the gradients are summed: the weights sum to one over the window.

    Returns the logits (n, K) of the messages and the loss, of this process's share. Raises NonFiniteError.
    """
    indices = torch.cat(window)
    weights = loss_weights(messages.labels[indices], [len(batch) for batch in window], experiment.ignore_index)
    size = MESSAGES_PER_PASS if classifier.n_frozen_blocks else experiment.batch_size
    outputs, loss = [], torch.zeros((), device=classifier.device)
    for pass_indices, pass_weights in map(processes.own_share, indices.split(size), weights.split(size)):
        logits = classifier(messages.batch(pass_indices, classifier.device))
        labels = messages.labels[pass_indices].to(classifier.device)
        losses = F.cross_entropy(logits, labels, ignore_index=experiment.ignore_index, reduction="none")
        pass_loss = losses @ pass_weights.to(losses.dtype).to(losses.device)  # no accelerator sees a float64
        pass_loss.backward()
        outputs.append(logits.detach())
        loss += pass_loss.detach()
    outputs = torch.cat(outputs)
    # Once per update: on an accelerator each question waits for the answer.
    (is_diverged,) = processes.largest(not (outputs.isfinite().all() & loss.isfinite()))
    if is_diverged:
        raise NonFiniteError("a training loss is not finite")
    processes.sum_gradients(classifier.parameters())
    return outputs, loss


def make_training_state(classifier, experiment, started=None):
    """The TrainingState before the first step; `started` is when the run did, by default now."""
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=experiment.learning_rate, weight_decay=experiment.weight_decay, fused=True
    )
    return TrainingState(classifier, optimizer, History(), started)


def train(classifier, messages, experiment, state, checkpoint, console):
    """Fine-tune `classifier` on messages["train"], from `state` on; prints the lines of the public original.

    `messages` maps each split to its Messages. After each update and its evaluation the state may be saved to
    `checkpoint`, from which training continues as if it had not stopped. Raises Interrupted.
    """
    loaders, history = make_loaders(messages, experiment.batch_size), state.history

    def of_first_messages(measure):
        """What `measure` makes of the Predictions of the first training and the first validation messages."""
        splits = ("train", "validation")
        return [measure(predict_batches(classifier, messages[s], loaders[s], EVALUATE_BATCHES)) for s in splits]

    def evaluate_losses(steps):
        for step in steps:
            if step % EVALUATE_EVERY == 0:
                losses = of_first_messages(lambda predictions: mean_loss(predictions, experiment.ignore_index))
                console.info(history.add_losses(epoch, step, *losses))

    per_epoch = len(loaders["train"])
    classifier.train()
    progress = console.progress("training", experiment.num_epochs * per_epoch, "batch", state.batches_done)
    with checkpoint.signals_noted(), progress as bar:
        for epoch in range(len(history.train_accuracies) + 1, experiment.num_epochs + 1):
            done = state.batches_done - (epoch - 1) * per_epoch
            if done == 0:
                state.order = torch.cat(list(loaders["train"]))
            batches = state.order.split(experiment.batch_size)[done:]
            for window in windows(batches, experiment.accumulation_steps):
                accumulate_gradients(classifier, messages["train"], window, experiment)
                last_step = state.batches_done + len(window) - 1
                evaluate_losses(range(state.batches_done, last_step))  # before the update
                state.optimizer.step()
                state.optimizer.zero_grad()
                state.batches_done = last_step + 1
                evaluate_losses([last_step])
                checkpoint.save_if_due(state)
                bar.update(len(window))
            console.info(history.add_accuracies(*of_first_messages(accuracy)))
            checkpoint.save_if_due(state, is_end_of_epoch=True)


# --- evaluation ---


def predict(classifier, messages, indices):
    """Logits (n, K) of the messages `indices` (n,). Messages of similar length run together. Raises NonFiniteError."""
    was_training = classifier.training
    classifier.eval()
    passes = split_into_passes(messages.lengths[indices], classifier.device)
    with torch.no_grad():
        results = processes.in_turns(passes, lambda own: [classifier(messages.batch(indices[own], classifier.device))])
        order, logits = zip(*((chosen, logits) for chosen, (logits,) in results))
    classifier.train(was_training)
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise NonFiniteError("an output of the classifier is not finite")
    return logits[torch.cat(order).argsort().to(classifier.device)]


class Predictions(NamedTuple):
    """What one pass over a loader gave, batch after batch of these sizes."""

    logits: torch.Tensor  # (n, K)
    labels: torch.Tensor  # (n,)
    batch_sizes: list
    indices: torch.Tensor  # (n,) of the messages


def predict_batches(classifier, messages, loader, n_batches=None):
    """The Predictions of the first `n_batches` of a loader, by default of all of them."""
    batches = list(islice(loader, n_batches))
    indices = torch.cat(batches)
    logits = predict(classifier, messages, indices)
    return Predictions(logits, messages.labels[indices].to(logits.device), [len(batch) for batch in batches], indices)


def mean_loss(predictions, ignore_index):
    """The mean of the batches' mean cross entropies, each over the labels that count; NaN where none does."""
    losses = F.cross_entropy(predictions.logits, predictions.labels, ignore_index=ignore_index, reduction="none")
    weights = loss_weights(predictions.labels, predictions.batch_sizes, ignore_index)
    return (losses @ weights.to(losses.dtype).to(losses.device)).item() if weights.any() else math.nan


def accuracy(predictions):
    """How many of the labelled messages were classified as labelled: an Accuracy."""
    is_correct = predictions.logits.argmax(-1) == predictions.labels
    return Accuracy(correct=int(is_correct.sum()), total=int((predictions.labels >= 0).sum()))


def confusion(predictions):
    """Which of the labelled messages were not classified as labelled, and as what: a Confusion."""
    # In float32, probabilities near one are all the same. On the CPU: MPS has no float64.
    logits = predictions.logits.cpu().double()
    predicted = logits.argmax(-1)
    confidences = logits.softmax(-1).gather(-1, predicted[:, None]).squeeze(-1)
    columns = (predictions.indices, predictions.labels, predicted, confidences)
    return Confusion.from_predictions(*(column.tolist() for column in columns), n_classes=logits.shape[1])


# --- the device compared with the CPU ---

COMPARE_FLOPS = 10**12  # that the CPU is asked for: at most ten seconds, but for a single message of a large model


def check_device(experiment, shard, data, weights, device, console):
    """The device to run on: `device`, unless it does not compute what the CPU does and `--device` is auto.

    The first update of this very run, at its own shapes and in its own precision, is computed on both; of a large model
    as many of its messages as COMPARE_FLOPS allow. Raises UserError where another `--device` is wrong.
    """
    if device.type == "cpu":
        return device
    classifier = build_classifier(replace(experiment, precision="fp32"), len(data.class_names), weights.tensors)
    copy_trained_parameters(classifier)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        loader = make_loaders(data.messages, experiment.batch_size)["train"]
        indices = torch.cat(list(islice(loader, experiment.accumulation_steps)))
    flops = 6 * sum(p.numel() for p in classifier.parameters()) * data.longest  # of a message, forward and backward
    window = indices[: max(COMPARE_FLOPS // flops, 1)].split(experiment.batch_size)
    expected = window_results(classifier, data, window, experiment, shard)
    classifier.bf16 = experiment.precision == "bf16"
    place(classifier, device, shard)
    problem, deviation = compare_results(
        lambda: window_results(classifier, data, window, experiment, shard), expected, experiment.precision
    )
    problem = processes.from_any(problem)
    on_messages = f"on the first {sum(map(len, window))} training messages"
    if problem is None:
        console.info(f"Compared with the CPU {on_messages}: agrees, largest deviation {deviation}")
        return device
    problem = f"{describe_system(device)} does not compute what the CPU does {on_messages}: {problem}"
    if experiment.device != "auto":
        raise UserError(f"{problem}\nTry: --device cpu", status=1)
    console.warning(f"{problem}; the run goes on on the CPU")
    return torch.device("cpu")


def window_results(classifier, data, window, experiment, shard):
    """What training computes for a window, {name: tensor}: logits, loss, gradients. Of shards the logits only."""
    messages = data.messages["train"]
    if shard:
        return {"the logits": predict(classifier, messages, torch.cat(window)).cpu()}
    logits, loss = accumulate_gradients(classifier.train(), messages, window, experiment)
    results = {"the logits": logits, "the loss": loss}
    results |= {f"the gradient of {name}": p.grad for name, p in classifier.named_parameters() if p.grad is not None}
    classifier.zero_grad()
    return {name: tensor.cpu() for name, tensor in results.items()}


# --- one run ---


@dataclass(frozen=True)
class Run:
    """What all seeds of a run have in common."""

    experiment: Experiment
    options: RunOptions
    console: Console
    device: torch.device
    weights: Weights
    data: datasets.Dataset
    features: FrozenFeatures
    checkpoint: Checkpoint


def prepare(experiment, options):
    """The Run of an experiment: device, data and weights, found or fetched, and checked. Raises UserError."""
    console = Console(options.quiet)
    with processes.main_first():
        device, why_not = resolve_device(experiment.device)
        set_precision(experiment.precision, device)
        weights = find_weights(experiment.weights, experiment.model_size)
        features = FrozenFeatures(experiment, options, weights, console)
        data = prepare_data(experiment)
    for warning in filter(None, [why_not, *data.warnings]):
        console.warning(warning)
    for line in [describe_setup(experiment, data, device), *datasets.describe_repeats(data)]:
        console.info(line)
    with processes.main_first():
        weights.open(console.quiet)
    device = check_device(experiment, options.shard, data, weights, device, console)
    release_memory(device)  # of the comparison
    with torch.device("meta"):
        sizes = optimize_frozen_blocks(build_classifier(experiment, len(data.class_names)))
    features.warn_if_memory_is_short(sizes, data.messages, device)
    checkpoint = Checkpoint(options, run_identity(experiment, data, weights, device), console)
    return Run(experiment, options, console, device, weights, data, features, checkpoint)


def run(experiment, options=RunOptions()):
    """One experiment from its settings to its printed row, `options.repeats` seeds one after another.

    A seed that the checkpoint holds as finished is not trained again. Returns [Record, ...]. Raises UserError.
    """
    run = prepare(experiment, options)
    console, checkpoint = run.console, run.checkpoint
    with checkpoint.opened():
        finished = [Record.from_dict(record) for record in checkpoint.records[: options.repeats]]
        if finished and (options.save_model or options.export):
            raise UserError(f"{checkpoint.path} holds the classifier of a later seed than {experiment.seed}")
        for record in finished:
            console.info(
                "\n".join([f"Finished before, according to {checkpoint.path}; it printed:", *record.history.lines])
            )
            write_outputs(run, record)
        for number in range(len(finished), options.repeats):
            of_seed = replace(experiment, seed=experiment.seed + number)
            if options.repeats > 1:
                console.info(f"\nRun {number + 1} of {options.repeats}, seed {of_seed.seed}")
            record = (options.skip_finished and find_record(run, of_seed)) or run_seed(run, of_seed)
            finished.append(record)
            checkpoint.add_record(record)
    print_row(finished, console)
    if options.plot:
        console.write_output("the picture", options.plot, plot_histories, finished, len(run.data.messages["train"]))
    if options.results:
        console.info(f"All runs so far: python additional_experiments.py --report {options.results}")
    console.close()
    return finished


def find_record(run, experiment):
    """The Record of this very run, if it is in the folder of results; else None."""
    path = Path(run.options.results, f"{records.identify(experiment, run.data, run.weights, run.device)['run']}.json")
    if not processes.in_main(path.exists):
        return None
    run.console.info(f"Finished before: {path}")
    return processes.in_main(records.read_record, path)


def run_seed(run, experiment):
    """One seed of a Run, from its weights to all that is asked for: its Record."""
    console, data, started = run.console, run.data, time.perf_counter()
    classifier = build_classifier(experiment, len(data.class_names), run.weights.tensors)
    classifier.gpt.activation_checkpointing = run.options.activation_checkpointing
    place(classifier, run.device, run.options.shard)
    console.info(describe_model(experiment, classifier))
    inputs = run.features.of(classifier, data.messages, experiment.seed)
    kept = "recomputed" if inputs["train"].stage is Stage.TOKEN_IDS else "kept"
    environment = dict(device=describe_devices(run.device), PyTorch=str(torch.__version__), features=kept)
    run.checkpoint.note_environment(environment)

    state = make_training_state(classifier, experiment, started)
    confusions, minutes = fine_tune(classifier, inputs, experiment, state, run.checkpoint, console)
    for line in describe_test(confusions["test"], data):
        console.info(state.history.add_line(line))
    noted = dict(minutes=minutes, feature_seconds=run.features.seconds, note=run.options.note)
    record = records.make_record(experiment, data, run.weights, confusions, state, **noted)
    is_wanted = run.options.save_model or run.options.export
    write_outputs(run, record, state.full_parameters() if is_wanted else None)
    return record


def fine_tune(classifier, messages, experiment, state, checkpoint, console):
    """Train one seed, from where the checkpoint has it, and evaluate it: ({split: Confusion}, minutes of training)."""
    torch.manual_seed(experiment.seed)
    if checkpoint.restore(state):
        before = f"Resuming from {checkpoint.path} after {state.batches_done:,} batches; printed before:"
        console.info("\n".join([before, *state.history.lines]))
    confusions = {}
    try:
        train(classifier, messages, experiment, state, checkpoint, console)
        minutes = state.usage()["training"] / 60
        console.info(state.history.add_line(f"Training completed in {minutes:.2f} minutes."))
        for split, loader in make_loaders(messages, experiment.batch_size).items():
            confusions[split] = confusion(predict_batches(classifier, messages[split], loader))
            console.info(state.history.add_line(f"{SPLITS[split]} accuracy: {confusions[split].accuracy.in_full}"))
    except NonFiniteError as error:
        advice = "Try: a smaller --learning_rate; --precision fp32"
        raise NonFiniteError(f"training diverged, at step {state.batches_done:06d}: {error}\n{advice}") from None
    return confusions, minutes


def write_outputs(run, record, parameters=None):
    """Write what is asked for of a finished seed: its Record; of its trained parameters, {name: tensor}, a classifier.

    All processes have the parameters' names, process 0 alone the parameters.
    """
    options, data, write = run.options, run.data, run.console.write_output
    if options.results:
        write("the record", options.results, records.write_record, record)
    if parameters is None or processes.rank() > 0:
        return
    # Built anew: in the classifier that was trained, frozen weights may be bfloat16, or shards.
    experiment = replace(run.experiment, seed=record.seed)
    classifier = build_classifier(experiment, len(data.class_names), run.weights.tensors)
    base_sha256 = run.weights.sha256 or classifiers.frozen_sha256(classifier)
    saved = SavedClassifier(asdict(experiment), data.limit, data.class_names, base_sha256, record.to_dict())
    if options.save_model:
        write("the classifier", options.save_model, classifiers.save_classifier, saved, parameters)
    if options.export:
        load_parameters(copy_trained_parameters(classifier), parameters)
        write("the export", options.export, export_classifier, classifier, saved)


def place(classifier, device, shard):
    """Move a classifier from the CPU to its device, or this process's shard of it. Returns the classifier."""
    if shard:
        processes.shard(classifier, device)
        return classifier
    return optimize_frozen_blocks(copy_trained_parameters(classifier).to(device))


# --- using a trained classifier ---


def load_classifier(path, given):
    """What `--save_model` wrote: (Classifier on the CPU, the Experiment with which it is used, its SavedClassifier).

    `given` are options that override its own. Raises UserError for a file that cannot be used, and for a model size or
    weights other than those it was trained on.
    """
    saved, parameters = classifiers.read_classifier(path)
    experiment = Experiment(**saved.settings_with(given))
    weights = find_weights(experiment.weights, experiment.model_size)
    weights.open()
    classifier = build_classifier(experiment, len(saved.class_names), weights.tensors)
    saved.check_base(experiment.weights, weights.sha256 or classifiers.frozen_sha256(classifier))
    load_parameters(copy_trained_parameters(classifier), parameters)
    return classifier, experiment, saved


def export_classifier(path, classifier, saved):
    """Write a Classifier that is on the CPU as transformers reads it; LoRA becomes part of its weights."""
    merge_lora(classifier)
    export.write_export(path, classifier, saved, DEFAULTS)


def ready_to_use(classifier, experiment):
    """A Classifier on the CPU, ready for `predict_texts` on the device and in the precision of its Experiment."""
    device, _ = resolve_device(experiment.device)
    set_precision(experiment.precision, device)
    return optimize_frozen_blocks(classifier.to(device)).eval()


def predict_texts(classifier, experiment, texts):
    """Logits (n, K) of messages, which are cut, padded and classified as in training."""
    frame = pd.DataFrame(dict(Text=texts, Label=0))
    messages = encode(load_vocabulary(), {"texts": frame}, experiment)[0]["texts"]
    if classifier.n_frozen_blocks > 0:
        messages = compute_features(classifier, messages, classifier.frozen_part, classifier.device)
    return predict(classifier, messages, torch.arange(len(messages)))


def use(run_options, given):
    """`--load_model`: write the export, and answer messages as they come, if these are asked for."""
    if run_options.export is not None:
        classifier, experiment, saved = load_classifier(run_options.load_model, given)
        export.check_experiment(experiment)
        export_classifier(run_options.export, classifier, saved)
        print(f"Wrote the export to {run_options.export}", file=sys.stderr)  # answers alone are in standard output
    if run_options.classify:
        chunks = classifiers.chunks_of_texts(run_options.classify)
        classifier, experiment, saved = load_classifier(run_options.load_model, given)
        classifier = ready_to_use(classifier, experiment)
        for texts in chunks:
            filled = [text for text in texts if text.strip()]  # an empty line gets an empty answer
            logits = predict_texts(classifier, experiment, filled) if filled else torch.empty(0, len(saved.class_names))
            classifiers.print_answers(texts, logits.softmax(-1), saved.class_names)


# --- main ---


def main(argv=None):
    """Run the command line and return the exit status, see `exit_status`."""
    return exit_status(lambda: execute(argv))


def execute(argv):
    """What the command line asks for."""
    with processes.process_group():
        with processes.agreed():
            experiment, options, given = parse_args(argv)
        if options.report is not None:
            print_report(options)
        elif options.baseline:
            from runner.results.baseline import run_baselines  # slow to import

            run_baselines(experiment, options)
        elif options.load_model is not None:
            use(options, given)
        else:
            run(experiment, options)


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main())
