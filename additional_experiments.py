"""Fine-tune GPT-2 as a spam classifier: one configuration per call, one row of a table of 19.

    python additional_experiments.py --demo            # toy model, no network, about a minute on two cores
    python additional_experiments.py                   # row 1: pretrained 124M, last block, last token
    python additional_experiments.py --row 16          # any other row of the table below

With `--weights random --device cpu` and its other defaults a run gives the numbers of the public original of
this experiment: every printed loss to three decimals, every accuracy to the example (for other options: README, "What
is equal to the original"). It draws its random numbers in the same order; where that matters, a comment says so.

The file reads in the order of a run: the rows, the settings, tokens, classifier, training, evaluation, one run, main.
`previous_chapters.py` holds GPT-2 itself; `runner/` holds what is not the experiment: files, checkpoints, reports.
In the shapes B is messages in a batch, T tokens in a message, D the embedding width, K classes.
"""

import os
import signal
import sys

# Importing PyTorch takes seconds; Ctrl-C is to end them as quietly as the rest. (A shell may have it ignored.)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from gpt_download import PRETRAINED, find_weights, load_vocabulary
from previous_chapters import GPT_SIZES, GPTConfig, GPTModel, load_gpt2_weights, select_positions
from runner import dataset, features, options, records, report, results_file, saved_models, table
from runner.checkpoints import Checkpointer, TrainingState, Usage, run_identity
from runner.console import Console, describe_model, describe_setup, exit_status, prepare_streams
from runner.dataset import DEFAULT_DATA_DIR, SPLITS, Batch, Messages, Stage, split_into_passes
from runner.devices import describe_device, resolve_device, set_precision
from runner.files import NonFiniteError, UsageError
from runner.options import DATA, INPUT, MACHINE, MAX_CONTEXT, MODEL, TRAINING, RunOptions, count, option, positive
from runner.records import Accuracy
from runner.table import Row

# --- the 19 rows ---

MEDIUM, LARGE, XL, NANO = "gpt2-medium (355M)", "gpt2-large (774M)", "gpt2-xl (1558M)", "gpt2-nano (7M)"

# Published accuracies in percent (training, validation, test), minutes on an A100, options that are not the default.
ROWS = {
    1: Row(96.63, 99.33, 95.00, 0.28),
    2: Row(78.46, 80.54, 75.00, 0.28, dict(trainable_token_pos="first")),
    3: Row(78.65, 79.87, 72.00, 0.25, dict(trainable_layers="last_layer")),
    4: Row(98.85, 98.66, 98.33, 0.33, dict(trainable_layers="last_two_blocks")),
    5: Row(99.62, 96.64, 96.67, 0.69, dict(trainable_layers="all")),
    6: Row(87.50, 91.28, 84.67, 0.75, dict(model_size=MEDIUM)),
    7: Row(99.52, 98.66, 96.67, 1.50, dict(model_size=LARGE)),
    8: Row(99.81, 99.81, 98.33, 2.83, dict(model_size=XL)),  # 99.81% of 149 messages is an erratum: no count gives it
    9: Row(100.00, 98.66, 98.67, 8.12, dict(model_size=XL, trainable_layers="all")),
    10: Row(100.00, 96.64, 93.67, 0.69, dict(weights="random", trainable_layers="all")),
    11: Row(100.00, 97.32, 96.67, 0.75, dict(trainable_layers="lora", lora_rank=16, lora_alpha=16.0)),
    12: Row(100.00, 98.66, 98.33, 5.79, dict(trainable_layers="lora", lora_rank=16, lora_alpha=8.0, model_size=XL)),
    13: Row(83.08, 87.92, 78.33, 2.46, dict(context_length="model_context_length")),
    14: Row(100.00, 98.66, 98.00, 1.75, dict(no_padding=True, batch_size=1)),
    15: Row(99.33, 98.66, 98.33, 1.70, dict(no_padding=True, batch_size=1, accumulation_steps=8)),
    16: Row(99.42, 98.66, 98.33, 0.30, dict(trainable_token_pos="flexible")),
    17: Row(99.23, 98.66, 95.33, 0.29, dict(disable_causal_mask=True)),
    18: Row(96.63, 99.33, 95.00, 0.28, dict(ignore_index=50256)),
    19: Row(97.79, 99.33, 96.33, 0.32, dict(average_embeddings=True)),
}

DEMO = dict(model_size=NANO, weights="random", trainable_layers="all", dataset="sample", learning_rate=5e-4)


# --- the settings of an experiment ---


@dataclass(frozen=True)
class Experiment:
    """All settings of one run; each field is an option of the command line, with its default.

    The parser checks single values. Raises UsageError for values that cannot be combined.
    """

    model_size: str = option(
        "gpt2-small (124M)", MODEL, f"{', '.join(GPT_SIZES)}; the first word is enough", type=options.model_size
    )
    weights: str = option("pretrained", MODEL, "pretrained, random, or a GPT-2 .safetensors file", metavar="W")
    trainable_layers: str = option(
        "last_block",
        MODEL,
        "what is trained besides the new head; lora adapts every linear layer, lora_alternative is the same with the "
        "product merged into the weight",
        choices=("last_block", "last_layer", "last_two_blocks", "all", "lora", "lora_alternative"),
    )
    lora_rank: int = option(8, MODEL, "inner dimension of the LoRA matrices", type=count())
    lora_alpha: float = option(8.0, MODEL, "factor of the LoRA product, not divided by the rank", type=positive())
    trainable_token_pos: str = option(
        "last",
        INPUT,
        "the position whose output is classified; flexible: the last token that is not padding",
        choices=("last", "first", "flexible"),
    )
    average_embeddings: bool = option(
        False,
        INPUT,
        "classify the mean of the outputs at all positions instead; with flexible or --no_padding of real tokens only",
    )
    context_length: str | int = option(
        "longest_training_example",
        INPUT,
        "messages are cut to it and padded to it: longest_training_example, model_context_length, or a number from 1 "
        f"to {MAX_CONTEXT}",
        type=options.context_length,
    )
    no_padding: bool = option(False, INPUT, "pad no message: in a batch each gives what it gives alone")
    disable_causal_mask: bool = option(False, MODEL, "let every token attend to every other, also to later ones")
    ignore_index: int = option(-100, TRAINING, "label that adds nothing to the loss", type=options.integer())
    batch_size: int = option(8, TRAINING, "messages in a batch", type=count())
    accumulation_steps: int = option(1, TRAINING, "batches whose gradients are averaged into one update", type=count())
    num_epochs: int = option(5, TRAINING, "passes over the training messages", type=count())
    learning_rate: float = option(5e-5, TRAINING, "step size of AdamW", type=positive())
    weight_decay: float = option(0.1, TRAINING, "decoupled weight decay of AdamW", type=options.non_negative())
    seed: int = option(123, TRAINING, "of random weights, head and order of training", type=count(minimum=0))
    device: str = option(
        "auto", MACHINE, "where to run; auto: cuda, else mps, else cpu", choices=("auto", "cpu", "mps", "cuda")
    )
    precision: str = option(
        "fp32",
        MACHINE,
        "of the matrix products; trained weights, optimizer, loss and final logits stay float32. bf16: bfloat16; tf32: "
        "on CUDA only",
        choices=("fp32", "bf16", "tf32"),
    )
    features: str = option(
        "auto",
        MACHINE,
        "where to keep what the frozen blocks give, which is computed once per message; auto: on the device if it "
        "fits into half of what is free there, else in host memory likewise, else off: recomputed each time",
        choices=("auto", "device", "host", "off"),
    )
    data_dir: str = option(
        DEFAULT_DATA_DIR,
        DATA,
        "folder of the collection and of train.csv, validation.csv and test.csv (columns Label, Text); if the three "
        "exist they are used as they are, so they can be your own",
        metavar="DIR",
    )
    dataset: str = option(
        "uci",
        DATA,
        "uci: the SMS Spam Collection, or your own files in --data_dir; sample: 1,500 of its messages, in data/",
        choices=("uci", "sample"),
    )

    def __post_init__(self):
        if self.weights == "pretrained" and self.model_size not in PRETRAINED:
            raise UsageError(f"{self.model_size} has no pretrained weights; use --weights random or --weights FILE")
        if self.weights not in ("pretrained", "random") and not Path(self.weights).is_file():
            raise UsageError(f"--weights {self.weights}: neither pretrained nor random, and no such file")
        if self.lora_rank > (emb_dim := GPT_SIZES[self.model_size]["emb_dim"]):
            raise UsageError(f"--lora_rank {self.lora_rank} is over the width {emb_dim} of {self.model_size}")
        if self.average_embeddings and self.trainable_token_pos == "first":
            raise UsageError("--average_embeddings (all positions) cannot be combined with --trainable_token_pos first")

    @property
    def config(self):
        return GPTConfig(**GPT_SIZES[self.model_size], causal=not self.disable_causal_mask)


def parse_args(argv=None):
    """The command line as (Experiment, RunOptions, the options of the experiment that were given).

    The Experiment is None where nothing is to be trained. Raises UsageError.
    """
    title = "Fine-tune GPT-2 as a spam classifier: one configuration, one row of the table."
    return options.parse(argv, title, Experiment, ROWS, DEMO)


# --- tokens, and the position that is classified ---

PAD_TOKEN = 50256


def encode(tokenizer, splits, experiment):
    """The splits as token ids: ({split: Messages}, limit in tokens, tokens of the longest message, pads included).

    Only what the output asked for can see is kept. Under the causal mask these are the tokens up to it: `first`
    sees one token, `flexible` no pads.
    """
    # encode_ordinary: "<|endoftext|>" in a message is text like any other
    encoded = {split: tokenizer.encode_ordinary_batch(list(frame["Text"])) for split, frame in splits.items()}
    limit = experiment.context_length
    if limit == "model_context_length" or (limit == "longest_training_example" and experiment.no_padding):
        limit = MAX_CONTEXT  # without padding nothing needs to be as long as the longest training message
    elif limit == "longest_training_example":
        limit = min(max(len(tokens) for tokens in encoded["train"]), MAX_CONTEXT)
    messages = {split: encode_split(encoded[split], splits[split]["Label"], limit, experiment) for split in splits}
    longest = max(len(tokens) for split in encoded.values() for tokens in split)
    return messages, limit, min(longest, limit) if experiment.no_padding else limit


def encode_split(token_lists, labels, limit, experiment):
    """Messages from their lists of token ids and their labels (n,), cut, padded and cut to what can be seen."""
    visible, positions = [], []
    for tokens in token_lists:
        tokens = tokens[:limit]
        n_real = len(tokens)
        if not experiment.no_padding:
            tokens = tokens + [PAD_TOKEN] * (limit - n_real)
        match experiment.trainable_token_pos:
            case "last":
                position = len(tokens) - 1
            case "first":
                position = 0
            case "flexible":
                position = n_real - 1
        n_visible = len(tokens) if experiment.disable_causal_mask else position + 1
        visible.append(torch.tensor(tokens[:n_visible]))
        positions.append(position)
    lengths = torch.tensor([len(tokens) for tokens in visible])
    return Messages(Stage.TOKEN_IDS, torch.cat(visible), lengths, torch.tensor(positions), torch.tensor(list(labels)))


def prepare_data(experiment, quiet=False):
    """The dataset.Dataset of an experiment. Errors: those of `dataset.load_splits` and `dataset.count_classes`."""
    splits, name = dataset.load_splits(experiment.data_dir, experiment.dataset, quiet)
    n_classes = dataset.count_classes(splits, experiment.ignore_index, experiment.data_dir)
    if experiment.batch_size > (n := len(splits["train"])):
        raise UsageError(f"--batch_size {experiment.batch_size}: there are only {n} training messages")
    messages, limit, longest = encode(load_vocabulary(), splits, experiment)
    labels = [str(label) for label in range(n_classes)] if name == "own" else ["ham", "spam"]
    return dataset.Dataset(messages, limit, longest, name, labels, sha256=dataset.sha256_of_splits(splits))


# --- classifier ---
#
# The idea of this program is to compute only what the loss can see, and that only once:
#   1. visible prefix: tokens that the output asked for cannot see are cut off      (encode)
#   2. one query: in the last block only the position asked for is computed         (GPTModel.blocks)
#   3. frozen features: what comes before the first trained parameter runs once     (compute_features)
#   4. no keys and values: the last block, on frozen features, forms none           (attend_to_normalized)
# None of it changes a number beyond rounding.


class LinearWithLoRA(nn.Module):
    """A linear layer plus a product of two thin matrices (Hu et al. 2021, section 4.1).

    x W + b + alpha x A B, with A (in, rank) and B (rank, out), which starts at zero. Unlike in the paper, and as in
    the public original, the factor is alpha, not alpha / rank.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.alpha = linear, alpha
        self.A = nn.Parameter(torch.empty(linear.in_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, linear.out_features))

    def forward(self, x):
        thin = x @ self.A
        out = self.linear(x)
        # Added in place: the product is thin, so that a second `out` would cost more to write than to compute.
        out.view(-1, out.shape[-1]).addmm_(thin.flatten(0, -2), self.B.to(thin.dtype), alpha=self.alpha)
        return out


class LinearWithMergedLoRA(LinearWithLoRA):
    """The same function, with the product added to the weight before the weight meets x."""

    def forward(self, x):
        return F.linear(x, self.linear.weight + self.alpha * (self.A @ self.B).T, self.linear.bias)


def add_lora(module, lora, rank, alpha):
    """Wrap every nn.Linear below `module`, depth first: the order in which the A matrices are drawn."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, lora(child, rank, alpha))
        else:
            add_lora(child, lora, rank, alpha)


class Classifier(nn.Module):
    """GPT-2 with a head of K classes at one position of a message, or at the mean over all its positions.

    It runs in two parts. What comes before the first trained parameter gives the same for a message each time, so
    `compute_features` may run the frozen part once per message; the trained part continues from there.
    """

    def __init__(self, gpt, n_classes, average, bf16=False):
        super().__init__()
        self.gpt, self.average, self.bf16 = gpt, average, bf16
        self.out_head = nn.Linear(gpt.cfg.emb_dim, n_classes)
        self.n_frozen_blocks = 0  # before the first trained parameter; if all, the final norm is frozen too

    @property
    def device(self):
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

    def forward(self, batch):
        """A Batch to logits (B, K)."""
        return self.trained_part(self.frozen_part(batch))

    @torch.no_grad()
    def frozen_part(self, batch):
        """A Batch of token ids to one at `feature_stage`; a Batch that is there already is returned as it is."""
        stage = self.feature_stage
        if batch.stage is stage:
            return batch
        with self.autocast():
            x = self.gpt.embed(batch.x)  # (B, T, D)
            x = self.gpt.blocks(x, 0, self.n_frozen_blocks, batch.key_mask, self.query_positions(batch))
        match stage:
            case Stage.HIDDEN_STATES:
                return replace(batch, stage=stage, x=x)
            case Stage.STANDARDIZED:
                residual = select_positions(x, batch.positions)  # (B, 1, D)
                # The standardized input goes into products only, so with bf16 it may be kept in bfloat16.
                x_hat = self.gpt.trf_blocks[-1].standardize(x).to(torch.bfloat16 if self.bf16 else x.dtype)
                return replace(batch, stage=stage, x=x_hat, residual=residual)
            case Stage.HEAD_INPUT:
                return Batch(stage, self.pool(x, batch), torch.zeros_like(batch.positions), key_mask=None)

    def trained_part(self, batch):
        """A Batch at `feature_stage` to logits (B, K), the head in full precision."""
        x = batch.x
        if batch.stage is not Stage.HEAD_INPUT:
            with self.autocast():
                if batch.stage is Stage.STANDARDIZED:
                    x = self.gpt.trf_blocks[-1].forward_normalized(batch.residual, x, batch.key_mask)
                else:
                    x = self.gpt.embed(x) if batch.stage is Stage.TOKEN_IDS else x
                    end = len(self.gpt.trf_blocks)
                    x = self.gpt.blocks(x, self.n_frozen_blocks, end, batch.key_mask, self.query_positions(batch))
            x = self.pool(x, batch)
        return self.out_head(x.squeeze(1))

    def query_positions(self, batch):
        """The one position (B,) whose output the last block is asked for; None: all, for their mean."""
        return None if self.average else batch.positions

    def pool(self, x, batch):
        """What the last block gave, (B, 1, D) or for the mean (B, T, D), to the head's input (B, 1, D)."""
        x = self.gpt.final_norm(x)
        return mean_up_to(x, batch.positions) if self.average else x

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def count_frozen_blocks(gpt):
    """How many blocks come before the first trained parameter."""

    def is_frozen(module):
        return not any(parameter.requires_grad for parameter in module.parameters())

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
    order and each after seeding anew: the model, then the head and the LoRA matrices.
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
    if weights is not None:
        for parameter in classifier.parameters():
            if parameter.requires_grad:  # out of the file's memory map, and laid out as the optimizer likes it
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return classifier


def optimize_frozen_blocks(classifier):
    """Give the frozen layers the form in which they are fastest; call it when the classifier is on its device.

    Trained parameters stay as they are, and so does the function that the classifier computes (with bf16: but for
    its products). Returns the classifier.
    """
    for module in classifier.gpt.trf_blocks.modules():
        # A merged LoRA product is added to the weight before bfloat16 would swallow it, so that weight stays as it is.
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
    """Lists of `size` batches, the last one of what is left."""
    batches = iter(batches)
    while window := list(islice(batches, size)):
        yield window


def loss_weights(labels, batch_sizes, ignore_index):
    """What the cross entropy of each message weighs in the mean over batches of the batches' means.

    labels (n,) of batches of these sizes, one after the other; to (n,). An ignored label weighs nothing, a batch
    of which all are ignored is not counted, and if that is every batch all weights are zero: never NaN.
    """
    counts = [(batch != ignore_index).double() for batch in labels.cpu().split(batch_sizes)]
    n_batches = sum(int(count.any()) for count in counts)
    return torch.cat([count / count.sum().clamp(min=1) for count in counts]) / max(n_batches, 1)


def accumulate_gradients(classifier, messages, window, experiment):
    """Add to the gradients those of the mean loss over the batches of an accumulation window.

    Over frozen features little is left to run, and the window runs in passes of MESSAGES_PER_PASS, wherever its
    batches end. Elsewhere accumulation is there to save memory, and each batch is a pass.
    """
    indices = torch.cat(window)
    weights = loss_weights(messages.labels[indices], [len(batch) for batch in window], experiment.ignore_index)
    size = MESSAGES_PER_PASS if classifier.n_frozen_blocks else experiment.batch_size
    is_finite = []
    for pass_indices, pass_weights in zip(indices.split(size), weights.split(size)):
        logits = classifier(messages.batch(pass_indices, classifier.device))
        labels = messages.labels[pass_indices].to(classifier.device)
        losses = F.cross_entropy(logits, labels, ignore_index=experiment.ignore_index, reduction="none")
        (losses @ pass_weights.to(losses)).backward()
        is_finite.append(logits.isfinite().all() & losses.isfinite().all())
    if not torch.stack(is_finite).all():  # once per update: on an accelerator each question waits for the answer
        raise NonFiniteError("a training loss is not finite")


def make_training_state(classifier, experiment, usage=None):
    """The TrainingState at the first step. `usage` counts from the start of the run, by default from now."""
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=experiment.learning_rate, weight_decay=experiment.weight_decay, fused=True
    )
    return TrainingState(classifier, optimizer, usage)


def train(classifier, messages, experiment, state, checkpointer, console):
    """Fine-tune `classifier` on messages["train"], from `state` on; prints the lines of the public original.

    `messages` maps each split to its Messages. Parameters change only within `checkpointer.update`, and what
    `checkpointer` saves is a state from which `train` can continue.
    """
    loaders, history = make_loaders(messages, experiment.batch_size), state.history
    evaluator = Evaluator(classifier, messages, loaders, experiment.ignore_index, history, console)
    steps_per_epoch = len(loaders["train"])
    n_steps = experiment.num_epochs * steps_per_epoch
    classifier.train()
    with console.progress("training", n_steps, "batch", initial=state.steps_done) as bar:
        for epoch in range(len(history.train_accuracies) + 1, experiment.num_epochs + 1):
            steps_of_epoch = state.steps_done - (epoch - 1) * steps_per_epoch
            if steps_of_epoch == 0:  # else training was interrupted in this epoch, whose order is in the state
                state.order = torch.cat(list(loaders["train"]))
            batches = state.order.split(experiment.batch_size)[steps_of_epoch:]
            for window in windows(batches, experiment.accumulation_steps):
                next_update = state.steps_done + len(window)
                # After the update before this one, and between the batches of the window, which change nothing yet.
                evaluator.evaluate_losses(epoch, range(state.steps_done - 1, next_update - 1))
                accumulate_gradients(classifier, messages["train"], window, experiment)
                with checkpointer.update(state):
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                    state.steps_done = next_update
                checkpointer.save_if_due(state)
                bar.update(len(window))
            evaluator.evaluate_losses(epoch, [state.steps_done - 1])
            evaluator.evaluate_accuracies()
            checkpointer.save(state)


# --- evaluation ---


class Evaluator:
    """Losses and accuracies during training, on the first batches of the training and the validation messages."""

    def __init__(self, classifier, messages, loaders, ignore_index, history, console):
        self.classifier, self.messages, self.loaders = classifier, messages, loaders
        self.ignore_index, self.history, self.console = ignore_index, history, console

    def predict(self, split):
        return predict_batches(self.classifier, self.messages[split], self.loaders[split], EVALUATE_BATCHES)

    def evaluate_losses(self, epoch, steps):
        """Add to the history the losses at those of `steps` at which an evaluation is due and not done yet."""
        for step in steps:
            if step % EVALUATE_EVERY == 0 and step not in self.history.steps[-1:]:
                train_loss = mean_loss(self.predict("train"), self.ignore_index)
                val_loss = mean_loss(self.predict("validation"), self.ignore_index)
                self.console.info(self.history.add_losses(epoch, step, train_loss, val_loss))

    def evaluate_accuracies(self):
        """Add to the history the accuracies after an epoch."""
        train, validation = accuracy(self.predict("train")), accuracy(self.predict("validation"))
        self.console.info(self.history.add_accuracies(train, validation))


def predict(classifier, messages, indices):
    """Logits (n, K) of the messages `indices` (n,). Messages of like length run together. Raises NonFiniteError."""
    was_training = classifier.training
    classifier.eval()
    logits, order = [], []
    with torch.no_grad():
        for chosen in split_into_passes(messages.lengths[indices], classifier.device):
            logits.append(classifier(messages.batch(indices[chosen], classifier.device)))
            order.append(chosen)
    classifier.train(was_training)
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise NonFiniteError("an output of the classifier is not finite")
    return logits[torch.cat(order).argsort().to(classifier.device)]


@dataclass
class Predictions:
    """What one pass over a loader gave: logits (n, K) and labels (n,), batch after batch of these sizes."""

    logits: torch.Tensor
    labels: torch.Tensor
    batch_sizes: list


def predict_batches(classifier, messages, loader, n_batches=None):
    """The Predictions of the first `n_batches` of a loader, by default of all of them."""
    batches = list(islice(loader, n_batches))
    indices = torch.cat(batches)
    logits = predict(classifier, messages, indices)
    return Predictions(logits, messages.labels[indices].to(logits.device), [len(batch) for batch in batches])


def mean_loss(predictions, ignore_index):
    """The mean of the batches' mean cross entropies, each over the labels that count."""
    losses = F.cross_entropy(predictions.logits, predictions.labels, ignore_index=ignore_index, reduction="none")
    return (losses @ loss_weights(predictions.labels, predictions.batch_sizes, ignore_index).to(losses)).item()


def accuracy(predictions):
    """How many of the labelled messages were classified as labelled: an Accuracy."""
    is_correct = predictions.logits.argmax(-1) == predictions.labels
    return Accuracy(correct=int(is_correct.sum()), total=int((predictions.labels >= 0).sum()))


# --- one run ---


def fine_tune(classifier, messages, experiment, state, checkpointer, console):
    """Train and evaluate one seed: ({split: Accuracy}, minutes of training). Resumes it if it was interrupted."""
    torch.manual_seed(experiment.seed)
    if checkpointer.resume(state):
        console.info(f"Resuming from {checkpointer.path} after {state.steps_done:,} batches; printed before:")
        console.info("\n".join(state.history.lines))
    try:
        train(classifier, messages, experiment, state, checkpointer, console)
    except NonFiniteError as error:
        raise NonFiniteError(f"training stopped at step {state.steps_done:06d}: {error}") from None
    minutes = state.usage.so_far()["training"] / 60
    console.info(state.history.add_line(f"Training completed in {minutes:.2f} minutes."))
    accuracies = {}
    for split, loader in make_loaders(messages, experiment.batch_size).items():
        accuracies[split] = accuracy(predict_batches(classifier, messages[split], loader))
        console.info(state.history.add_line(f"{SPLITS[split]} accuracy: {accuracies[split].in_full}"))
    return accuracies, minutes


def run_seed(experiment, data, weights, inputs, device, checkpointer, console):
    """One seed from its weights to its accuracies: (Record, trained parameters by name, inputs).

    `inputs` are the Messages of each split with their frozen features, as an earlier seed with the same weights
    returned them; None: still to be computed.
    """
    usage = Usage(device)
    classifier = optimize_frozen_blocks(build_classifier(experiment, len(data.labels), weights.tensors).to(device))
    console.info(describe_model(experiment, classifier))
    state = make_training_state(classifier, experiment, usage)
    if inputs is None:
        inputs = features.precompute(classifier, data.messages, experiment.features, console)
    is_kept = inputs["train"].stage is classifier.feature_stage
    checkpointer.set_environment(
        dict(device=describe_device(device), PyTorch=torch.__version__, features="kept" if is_kept else "recomputed")
    )
    accuracies, minutes = fine_tune(classifier, inputs, experiment, state, checkpointer, console)
    record = records.make_record(
        run=f"{checkpointer.checkpoint.run_id}-{experiment.seed}",
        row=table.row_number(experiment, data, weights, ROWS),
        configuration=table.describe_configuration(experiment, data),
        experiment=experiment,
        data=data,
        weights=weights,
        device=device,
        accuracies=accuracies,
        minutes=minutes,
        state=state,
    )
    return record, state.parameters, inputs


def run(experiment, run_options=RunOptions()):
    """One experiment from its settings to its printed row, `run_options.repeats` seeds one after another.

    Returns [Record, ...]. Raises UsageError, FileError, FetchError, and at the very end OutputError.
    """
    console = Console(run_options.quiet)
    device = resolve_device(experiment.device)
    set_precision(experiment.precision, device)
    weights = find_weights(experiment.weights, experiment.model_size)
    data = prepare_data(experiment, console.quiet)
    console.info(describe_setup(experiment, data, device))
    with Checkpointer(run_options, run_identity(experiment, data, weights, device), console) as checkpointer:
        with torch.device("meta"):
            sizes = optimize_frozen_blocks(build_classifier(experiment, len(data.labels)))
        features.warn_if_memory_is_short(sizes, data.messages, experiment.features, device, console)
        weights.open(console.quiet)
        finished = run_seeds(experiment, run_options, data, weights, device, checkpointer, console)
    if run_options.repeats > 1:
        console.table_row(table.mean_row_cells(finished, ROWS, Experiment))
    if run_options.plot is not None:
        steps_per_epoch = len(make_loaders(data.messages, experiment.batch_size)["train"])
        histories = [record.history for record in finished]
        console.write_output(
            "the picture", run_options.plot, report.plot_histories, histories, steps_per_epoch, experiment.batch_size
        )
    console.close()
    return finished


def run_seeds(experiment, run_options, data, weights, device, checkpointer, console):
    """Each seed of a run, those that the checkpoint holds without training: [Record, ...]."""
    finished = checkpointer.checkpoint.finished[: run_options.repeats]
    for record in finished:
        console.info(f"Finished before, according to {run_options.checkpoint}; it printed:")
        console.info("\n".join(record.history.lines))
        publish(record, experiment, run_options, data, weights, checkpointer.checkpoint.trained, console)
    inputs = None
    for seed in range(experiment.seed + len(finished), experiment.seed + run_options.repeats):
        if weights.is_random:  # they change with the seed, and the features with them
            inputs = None
        with_seed = replace(experiment, seed=seed)
        record, parameters, inputs = run_seed(with_seed, data, weights, inputs, device, checkpointer, console)
        publish(record, with_seed, run_options, data, weights, parameters, console)
        checkpointer.finish(record, parameters)
        finished.append(record)
        del parameters  # and with them the classifier, before there is another
    return finished


def publish(record, experiment, run_options, data, weights, parameters, console):
    """Print the row of a finished seed, append its record, and save its classifier, if that is asked for."""
    console.table_row(table.row_cells(record, ROWS, Experiment))
    if path := run_options.results_file:
        if written := console.write_output("the record", path, results_file.append_record, record):
            destination, is_locked = written
            if destination != Path(path):
                console.warning(f"{path} has other columns and was left as it is; the record is in {destination}")
            if not is_locked:
                console.warning(
                    f"{destination} could not be locked: runs that end at the same time may mix their lines"
                )
    if path := run_options.save_model:
        # Weights that were drawn are identified by drawing them again.
        base_sha256 = weights.sha256 or saved_models.frozen_sha256(build_classifier(experiment, len(data.labels)))
        save = saved_models.save_classifier
        console.write_output("the classifier", path, save, experiment, data, base_sha256, parameters)


# --- using a trained classifier ---


def load_classifier(path, given):
    """What `--save_model` wrote, ready for use: (Classifier, its Experiment, names of the K classes).

    `given` are options that take the place of its own. Raises FileError for a file that cannot be used, UsageError
    for a model size or weights other than those it was trained on.
    """
    saved = saved_models.read_classifier(path)
    settings = saved.settings_with(given)
    device = resolve_device(settings["device"])
    if settings["precision"] == "tf32" and device.type != "cuda":
        settings["precision"] = "fp32"
    experiment = Experiment(**settings)
    set_precision(experiment.precision, device)
    weights = find_weights(experiment.weights, experiment.model_size)
    if not weights.is_random:
        saved.check_base(experiment.weights, weights.sha256)
        weights.open()
    classifier = build_classifier(experiment, len(saved.labels), weights.tensors)
    if weights.is_random:
        saved.check_base(experiment.weights, saved_models.frozen_sha256(classifier))
    saved.restore(classifier)
    return optimize_frozen_blocks(classifier.to(device)).eval(), experiment, saved.labels


def predict_texts(classifier, experiment, texts):
    """Logits (n, K) of messages, which are cut, padded and classified as in training."""
    frame = pd.DataFrame(dict(Text=texts, Label=0))
    messages = encode(load_vocabulary(), {"texts": frame}, experiment)[0]["texts"]
    if classifier.n_frozen_blocks > 0:
        messages = features.compute_features(classifier, messages, classifier.device)
    return predict(classifier, messages, torch.arange(len(messages)))


TEXTS_PER_PASS = 1000


def classify(run_options, given):
    """`--classify`: print label, probability and message, separated by tabs, for each message."""
    texts = saved_models.read_texts(run_options.classify)
    classifier, experiment, labels = load_classifier(run_options.load_model, given)
    for start in range(0, len(texts), TEXTS_PER_PASS):
        chunk = texts[start : start + TEXTS_PER_PASS]
        answers = dict.fromkeys(chunk, ("", ""))  # of an empty line
        if full := [text for text in chunk if text.strip()]:
            probabilities = predict_texts(classifier, experiment, full).softmax(-1)
            for text, probability, best in zip(full, *(part.tolist() for part in probabilities.max(-1))):
                answers[text] = labels[best], f"{probability:.4f}"
        for text in chunk:
            print(*answers[text], saved_models.escape(text), sep="\t")


# --- main ---


def main(argv=None):
    """Run the command line and return the exit status, see `exit_status`."""
    return exit_status(lambda: execute(*parse_args(argv)))


def execute(experiment, run_options, given):
    """What the command line asks for; the arguments are what `parse_args` returns."""
    if run_options.report is not None:
        report.print_report(run_options.report, run_options.report_plot, ROWS)
    elif run_options.load_model is not None:
        classify(run_options, given)
    else:
        run(experiment, run_options)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams()
    sys.exit(main())
