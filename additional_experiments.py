"""Fine-tune GPT-2 as a spam classifier: one configuration per call, one row of a table of 19.

    python additional_experiments.py --demo            # toy model, no network, half a minute on two cores
    python additional_experiments.py                   # row 1: pretrained 124M, last block, last token
    python additional_experiments.py --row 16          # any other row of the table

With `--weights random --device cpu`, and all other options at their defaults, a run prints the numbers of the public
original of this experiment: each loss to three decimals, each accuracy exactly (docs/equality.md has the details). It
draws its random numbers in the same order; where that matters, a comment says so.

Read `previous_chapters.py` (GPT-2) and `classifier.py` (LoRA, the head, what is trained) first. This file reads in the
order of a run: settings, tokens, training, evaluation, one run, using a trained classifier, main. The rows are in
`runner/rows.py`; the rest of `runner/` is not the experiment.
Shapes: B messages in a batch, T tokens in a message, D embedding width, K classes.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from classifier import build_classifier, place
from gpt_download import PRETRAINED, Weights, load_vocabulary, load_weights
from previous_chapters import GPT_SIZES, GPTConfig
from runner import options
from runner.console import Console, describe_model, describe_setup, end_process, exit_status, prepare_streams
from runner.data import datasets
from runner.data.features import FrozenFeatures, compute_features
from runner.data.messages import TOKENS_PER_PASS, EncodedData, Split, Stage, make_pool, run_passes, tokenize
from runner.data.predictions import write_predictions
from runner.files import NonFiniteError, UserError, refuse_damaged
from runner.machine import processes
from runner.machine.cpu_check import check_device, first_update
from runner.machine.devices import describe_short_memory, resolve_device, set_precision
from runner.options import DATA, INPUT, MACHINE, MAX_CONTEXT, MODEL, TRAINING, RunOptions, bounded, option
from runner.results.accuracy import Confusion, describe_accuracies, describe_mistakes
from runner.results.pictures import plot_histories
from runner.results.records import History, find_record, make_record, run_identity, write_record
from runner.results.report import print_report, print_row
from runner.saved import classifiers
from runner.saved.checkpoints import TrainingState, open_checkpoint
from runner.saved.export import check_class_count, check_experiment, write_export
from runner.wording import changed_options, command_line, quoted

# --- the settings of an experiment ---


@dataclass(frozen=True)
class Experiment:
    """All settings of one run; each field is an option of the command line, with its default.

    Values are normalized as on the command line: `model_size="xl"`, a Path and a NumPy number are accepted. Raises
    UserError for a value that an option does not take, and for values that cannot be combined.
    """

    model_size: str = option("gpt2-small (124M)", MODEL, f"{', '.join(GPT_SIZES)}; or xl", type=options.model_size)
    weights: str = option("pretrained", MODEL, "pretrained, random, or a GPT-2 .safetensors file", metavar="W")
    trainable_layers: str = option(
        "last_block",
        MODEL,
        "what is trained besides the head; lora_alternative: LoRA merged into the weights",
        choices=("last_block", "last_layer", "last_two_blocks", "all", "lora", "lora_alternative"),
    )
    lora_rank: int = option(8, MODEL, "rank of the LoRA matrices", type=bounded(int, 1))
    lora_alpha: float = option(8.0, MODEL, "scale of LoRA, not divided by the rank", type=bounded(float, 1e-12))
    trainable_token_pos: str = option(
        "last", INPUT, "token to classify; flexible: the last real one", choices=("last", "first", "flexible")
    )
    average_embeddings: bool = option(False, INPUT, "mean of all tokens; with flexible or --no_padding, of real ones")
    context_length: str | int = option(
        "longest_training_example",
        INPUT,
        f"tokens per message: longest_training_example, model_context_length, or 1 to {MAX_CONTEXT}",
        type=options.context_length,
    )
    no_padding: bool = option(False, INPUT, "do not pad messages; a result does not depend on the rest of its batch")
    disable_causal_mask: bool = option(False, MODEL, "let every token attend to later tokens too")
    ignore_index: int = option(-100, TRAINING, "label that the loss ignores", type=bounded(int))
    batch_size: int = option(8, TRAINING, "messages in a batch", type=bounded(int, 1))
    accumulation_steps: int = option(1, TRAINING, "batches per update", type=bounded(int, 1))
    num_epochs: int = option(5, TRAINING, "passes over the training messages", type=bounded(int, 1))
    learning_rate: float = option(5e-5, TRAINING, "step size of AdamW", type=bounded(float, 1e-12))
    weight_decay: float = option(0.1, TRAINING, "decoupled weight decay of AdamW", type=bounded(float, 0))
    seed: int = option(123, TRAINING, "seed of weights, head and training order", type=bounded(int, 0))
    device: str = option("auto", MACHINE, "auto: cuda, else mps, else cpu", choices=("auto", "cpu", "mps", "cuda"))
    precision: str = option("fp32", MACHINE, "for matrix products; tf32 needs CUDA", choices=("fp32", "bf16", "tf32"))
    features: str = option(
        "auto", MACHINE, "place of frozen blocks' output; off: recomputed", choices=("auto", "memory", "disk", "off")
    )
    activation_checkpointing: bool = option(False, MACHINE, "recompute blocks in the backward pass, to save memory")
    shard: bool = option(False, MACHINE, "with torchrun: each process holds a shard of model and optimizer (FSDP2)")
    data_dir: str = option(
        datasets.DEFAULT_DATA_DIR,
        DATA,
        "the collection, or your own data: one file, or train.csv, validation.csv, test.csv",
        metavar="PATH",
    )
    text_column: str = option("Text", DATA, "the column of your own files that holds the messages", metavar="NAME")
    label_column: str = option("Label", DATA, "the column that holds their labels", metavar="NAME")
    dataset: str = option("uci", DATA, "uci: --data_dir; sample: 1,200 messages of data/", choices=("uci", "sample"))

    def __post_init__(self):
        options.normalize(self)
        options.check_shard(self.shard)
        if self.weights == "pretrained" and self.model_size not in PRETRAINED:
            raise UserError(f"{self.model_size} has no pretrained weights; use --weights random or --weights FILE")
        if self.weights not in ("pretrained", "random") and not Path(self.weights).is_file():
            raise UserError(f"--weights {self.weights}: neither pretrained nor random, and no such file")
        if self.lora_rank > (emb_dim := GPT_SIZES[self.model_size]["emb_dim"]):
            raise UserError(f"--lora_rank {self.lora_rank} exceeds the width {emb_dim} of {self.model_size}")
        if self.average_embeddings and self.trainable_token_pos == "first":
            raise UserError("--average_embeddings (all positions) cannot be combined with --trainable_token_pos first")
        if not self.trainable_layers.startswith("lora"):  # unused, they must not tell runs apart
            vars(self).update(lora_rank=Experiment.lora_rank, lora_alpha=Experiment.lora_alpha)

    @property
    def config(self):
        """The GPTConfig of the model."""
        sizes, recompute = GPT_SIZES[self.model_size], self.activation_checkpointing
        return GPTConfig(**sizes, causal=not self.disable_causal_mask, activation_checkpointing=recompute)


parse_args = partial(options.parse, Experiment)  # takes argv, by default the program's own


# --- tokens, and the position that is classified ---

PAD_TOKEN = 50256


def encode(tokenizer, splits, experiment):
    """Return the EncodedData of splits {name: DataFrame with columns Label and Text}: messages cut and padded.

    Only the tokens that the classified position can attend to are kept. Under the causal mask these are the tokens up
    to it: a single token with `first`, no padding with `flexible`.
    """
    token_ids = {name: tokenize(tokenizer, frame["Text"]) for name, frame in splits.items()}
    limit = experiment.context_length
    if limit == "model_context_length" or (limit == "longest_training_example" and experiment.no_padding):
        limit = MAX_CONTEXT  # without padding no message has to be as long as the longest training message
    elif limit == "longest_training_example":
        limit = min(max(map(len, token_ids["train"])), MAX_CONTEXT)

    messages = [message[:limit] for of_split in token_ids.values() for message in of_split]
    n_real = torch.tensor(list(map(len, messages)))
    n_tokens = n_real if experiment.no_padding else torch.full_like(n_real, limit)  # padding included
    match experiment.trainable_token_pos:
        case "last":
            positions = n_tokens - 1
        case "first":
            positions = torch.zeros_like(n_tokens)
        case "flexible":
            positions = n_real - 1
    n_visible = n_tokens if experiment.disable_causal_mask else positions + 1

    pool, indices = make_pool(messages, n_visible, positions, PAD_TOKEN)
    parts = indices.split([len(frame) for frame in splits.values()])
    labels = [torch.tensor(frame["Label"].to_numpy()) for frame in splits.values()]
    n_cut = {name: sum(len(message) > limit for message in of_split) for name, of_split in token_ids.items()}
    usual = int(n_real[: len(parts[0])].sort().values[len(parts[0]) * 99 // 100])
    return EncodedData(pool, dict(zip(splits, map(Split, parts, labels))), limit, int(n_tokens.max()), n_cut, usual)


# --- training ---

EVALUATE_EVERY = 50  # batches
EVALUATE_BATCHES = 5
MESSAGES_PER_PASS = 64  # of the trained part over frozen features


def make_loaders(splits, batch_size):
    """Return for each split an iterable of batches of message indices (B,).

    Only the training split is shuffled and drops its last partial batch. Each iter() of a loader draws from PyTorch's
    global random state, even without shuffling; the numbers of a run depend on the sequence of these draws.
    """
    return {
        name: DataLoader(range(len(split)), batch_size, shuffle=name == "train", drop_last=name == "train")
        for name, split in splits.items()
    }


def loss_weights(labels, batch_sizes, ignore_index):
    """Return weights w (n,) such that sum(w * losses) is the mean of the batches' mean losses.

    labels (n,) are those of batches of these sizes, one after the other. An ignored label has weight 0, and a batch
    whose labels are all ignored does not count. If no label counts, all weights are 0, not NaN.
    """
    counts = [(batch != ignore_index).double() for batch in labels.split(batch_sizes)]
    n_batches = sum(int(count.any()) for count in counts)
    return torch.cat([count / count.sum().clamp(min=1) for count in counts]) / max(n_batches, 1)


def accumulate_gradients(classifier, encoded, window, experiment):
    """Add the gradients of the mean loss over an accumulation window, a list of batches of training messages.

    With frozen features little is left to compute, so the window runs in passes of MESSAGES_PER_PASS messages, across
    its batches. Otherwise accumulation serves to save memory, and each batch is a pass. Each rank computes its share
    of every pass; the gradients are summed, because the loss weights sum to one over the window.

    Returns the logits (n, K) and the loss of this rank's share. Raises NonFiniteError.
    """
    split, device, indices = encoded.splits["train"], classifier.device, torch.cat(window)
    weights = loss_weights(split.labels[indices], [len(batch) for batch in window], experiment.ignore_index)
    size = MESSAGES_PER_PASS if classifier.n_frozen_blocks else experiment.batch_size
    outputs, loss = [], torch.zeros((), device=device)
    for own, own_weights in map(processes.rank_share, indices.split(size), weights.split(size)):
        # All copies to the device come before the forward pass is launched: a later one would wait for it.
        batch, labels = encoded.pool.batch(split.indices[own], device), split.labels[own].to(device)
        own_weights = own_weights.to(classifier.dtype).to(device)  # MPS has no float64
        logits = classifier(batch)
        losses = F.cross_entropy(logits, labels, ignore_index=experiment.ignore_index, reduction="none")
        pass_loss = losses @ own_weights
        pass_loss.backward()
        outputs.append(logits.detach())
        loss += pass_loss.detach()
    outputs = torch.cat(outputs)
    # One host-device synchronization per update.
    (is_diverged,) = processes.all_reduce_max(not (outputs.isfinite().all() & loss.isfinite()))
    if is_diverged:
        raise NonFiniteError("a training loss is not finite")
    processes.sum_gradients(classifier.parameters())
    return outputs, loss


def make_optimizer(classifier, experiment):
    """Return AdamW over the trained parameters."""
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=experiment.learning_rate, weight_decay=experiment.weight_decay, fused=True)


def train(classifier, encoded, experiment, state, checkpoint, console):
    """Fine-tune a classifier on the training split of EncodedData, and print the lines of the public original.

    Training starts from `state`. After each update and its evaluation the state can be saved to `checkpoint`, from
    which a later call continues as if nothing had happened. Raises Interrupted, NonFiniteError.
    """
    loaders, history = make_loaders(encoded.splits, experiment.batch_size), state.history

    def evaluate_first_batches(metric):
        """Return a metric of the Predictions on the first batches of the training and of the validation split."""
        names = ("train", "validation")
        return [metric(predict_batches(classifier, encoded, name, loaders[name], EVALUATE_BATCHES)) for name in names]

    def evaluate_losses(steps):
        for step in steps:
            if step % EVALUATE_EVERY == 0:
                losses = evaluate_first_batches(partial(mean_loss, ignore_index=experiment.ignore_index))
                console.info(history.add_losses(epoch, step, *losses))

    per_epoch = len(loaders["train"])
    classifier.train()
    progress = console.progress("training", experiment.num_epochs * per_epoch, "batch", state.batches_done)
    with checkpoint.defer_signals(), progress as bar:
        for epoch in range(len(history.train_accuracies) + 1, experiment.num_epochs + 1):
            done = state.batches_done - (epoch - 1) * per_epoch
            if done == 0:
                state.order = torch.cat(list(loaders["train"]))
            batches = state.order.split(experiment.batch_size)[done:]
            for start in range(0, len(batches), experiment.accumulation_steps):
                window = batches[start : start + experiment.accumulation_steps]  # the last may be shorter
                accumulate_gradients(classifier, encoded, window, experiment)
                last_step = state.batches_done + len(window) - 1
                evaluate_losses(range(state.batches_done, last_step))  # before the update
                state.optimizer.step()
                state.optimizer.zero_grad()
                state.batches_done = last_step + 1
                evaluate_losses([last_step])
                checkpoint.save_if_due(state)
                bar.update(len(window))
            console.info(history.add_accuracies(*evaluate_first_batches(lambda one: confusion(one).accuracy)))
            checkpoint.save_if_due(state, is_end_of_epoch=True)


# --- evaluation ---


def predict(classifier, pool, indices):
    """Return the logits (n, K) of the messages `indices` (n,) of a pool; each distinct message is computed once.

    Raises NonFiniteError.
    """
    distinct, inverse = indices.unique(return_inverse=True)
    order, logits = zip(*run_passes(classifier, pool, distinct, lambda batch: [classifier(batch)]))
    logits = torch.cat([of_pass for (of_pass,) in logits])
    if not logits.isfinite().all():
        raise NonFiniteError("an output of the classifier is not finite")
    return logits[torch.cat(order).argsort()[inverse].to(classifier.device)]


class Predictions(NamedTuple):
    """The outputs for the batches of a loader, one after the other."""

    logits: torch.Tensor  # (n, K), on the CPU
    labels: torch.Tensor  # (n,)
    batch_sizes: list
    indices: torch.Tensor  # (n,) of the messages in their split


def predict_batches(classifier, encoded, name, loader, n_batches=None):
    """Return the Predictions for the first `n_batches` of the loader of a split, by default for all."""
    batches, split = list(islice(loader, n_batches)), encoded.splits[name]
    indices = torch.cat(batches)
    logits = predict(classifier, encoded.pool, split.indices[indices]).cpu()
    return Predictions(logits, split.labels[indices], [len(batch) for batch in batches], indices)


def mean_loss(predictions, ignore_index):
    """Return the mean of the batches' mean cross entropies over the labels that count; NaN if none does."""
    losses = F.cross_entropy(predictions.logits, predictions.labels, ignore_index=ignore_index, reduction="none")
    weights = loss_weights(predictions.labels, predictions.batch_sizes, ignore_index)
    return (losses @ weights.to(losses.dtype)).item() if weights.any() else math.nan


def confusion(predictions):
    """Return the Confusion: which labelled messages were misclassified, and as what."""
    probabilities = predictions.logits.double().softmax(-1)  # in float32 those near one would be equal
    confidences, predicted = probabilities.max(-1)
    columns = (predictions.indices, predictions.labels, predicted, confidences)
    return Confusion.from_predictions(*(column.tolist() for column in columns), n_classes=probabilities.shape[1])


# --- one run ---

COMPARE_FLOPS = 10**12  # for the comparison with the CPU: at most ten seconds, unless a single message takes longer


class Setup(NamedTuple):
    """What the seeds of a run share."""

    dataset: datasets.Dataset
    encoded: EncodedData
    weights: Weights
    device: torch.device
    features: FrozenFeatures


def run(experiment, run_options=RunOptions()):
    """Run an experiment from its settings to its printed row, one seed after the other. Return a list of Records.

    A seed whose record is in `run_options.results` is not trained again if `skip_finished` says so, or if the
    checkpoint is of a later seed. Raises UserError.
    """
    console = Console(run_options.quiet)
    setup, records = prepare(experiment, run_options, console), []
    seeds = range(experiment.seed, experiment.seed + run_options.repeats)
    identity = run_identity(experiment, setup.dataset, setup.weights)
    path, minutes = run_options.checkpoint, run_options.checkpoint_minutes
    with open_checkpoint(path, minutes, identity, seeds, setup.weights, console) as checkpoint:
        for seed in seeds:
            if len(seeds) > 1:
                console.info(f"\nRun {len(records) + 1} of {len(seeds)}, seed {seed}")
            of_seed, record = replace(experiment, seed=seed), None
            if run_options.skip_finished or checkpoint.is_past(seed):
                data, weights = setup.dataset, setup.weights
                record = processes.call_on_rank0(find_record, run_options.results, of_seed, data, weights)
            if record is not None:
                console.info(f"Finished before: {Path(run_options.results, record.run_id)}.json")
            elif checkpoint.is_past(seed):
                problem = f"{path} is of a later seed, and there is no record of seed {seed} in {run_options.results}"
                raise UserError(f"{problem}; delete the checkpoint to start over")
            else:
                record = run_seed(of_seed, setup, checkpoint, run_options, console)
            records.append(record)
    print_row(records, console)
    n_train = len(setup.encoded.splits["train"])
    console.write_output("the picture", run_options.plot, plot_histories, records, n_train)
    if run_options.results:
        console.info(f"All runs so far: python additional_experiments.py --report {quoted(run_options.results)}")
    console.close()
    return records


def prepare(experiment, run_options, console):
    """Find or fetch what an experiment needs, check it, and return the Setup. Raises UserError."""
    with processes.rank0_first():
        options.check_outputs(run_options, experiment)
        device, why_not = resolve_device(experiment.device)
        set_precision(experiment.precision, device)
        dataset = datasets.load(experiment)
        if experiment.batch_size > (n := len(dataset.splits["train"])):
            raise UserError(f"--batch_size {experiment.batch_size}: there are only {n} training messages")
        further = dataset.warnings_about_first(EVALUATE_BATCHES * experiment.batch_size)
        encoded = encode(load_vocabulary(), dataset.splits, experiment)
    too_new = f"PyTorch {torch.__version__} is newer than the versions that were tried" * (torch.__version__ >= "2.14")
    if encoded.limit == MAX_CONTEXT:  # with a smaller limit the cut may be intended; only the setup mentions it
        further += encoded.describe_cut()
    for warning in filter(None, [why_not, too_new, *dataset.warnings, *further]):
        console.warning(warning)
    console.info(describe_setup(experiment, dataset, encoded, device))
    with processes.rank0_first():
        weights = load_weights(experiment.weights, experiment.model_size, console.quiet)

    n_classes = len(dataset.class_names)
    check_class_count(run_options.export, n_classes, experiment.config.emb_dim)
    compute_on = partial(run_in_miniature, experiment, n_classes, weights, encoded)
    is_optional = experiment.device == "auto" and experiment.precision != "tf32"  # which the CPU does not have
    device = check_device(device, is_optional, experiment.precision, compute_on, console)

    with torch.device("meta"):
        on_meta = build_classifier(experiment, n_classes)
        place(on_meta, torch.device("meta"))
    folder = run_options.feature_folder(experiment.data_dir)
    features = FrozenFeatures(experiment.features, folder, run_options.feature_cache_gb * 1e9, weights, console)
    if warning := describe_short_memory(on_meta, device, experiment.shard):
        console.warning(warning)
    return Setup(dataset, encoded, weights, device, features)


def run_in_miniature(experiment, n_classes, weights, encoded, device):
    """Return what a run in miniature computes on `device`, {name: tensor on the CPU}; the CPU computes in float32.

    These are the frozen features of the first messages (on an accelerator in a pass of full size), the first update at
    the run's own shapes, and predictions after it. For a large model the update is cut to as many messages as
    COMPARE_FLOPS allows; with sharded parameters only the logits are computed.
    """
    is_cpu, split, pool = device.type == "cpu", encoded.splits["train"], encoded.pool
    experiment = replace(experiment, precision="fp32" if is_cpu else experiment.precision, learning_rate=1e-3)
    classifier = build_classifier(experiment, n_classes, weights.tensors)
    place(classifier, device, experiment.shard and not is_cpu)

    torch.manual_seed(experiment.seed)
    batches = islice(make_loaders(encoded.splits, experiment.batch_size)["train"], experiment.accumulation_steps)
    flops = 6 * sum(p.numel() for p in classifier.parameters()) * encoded.longest  # per message, forward and backward
    indices = torch.cat(list(batches))[: max(COMPARE_FLOPS // flops, 1)]
    messages, inverse = split.indices[indices].unique(return_inverse=True)
    if experiment.shard:
        return {"the logits": predict(classifier, pool, messages).cpu()}

    others = torch.arange(len(pool))[~torch.isin(torch.arange(len(pool)), messages)]
    room = 0 if is_cpu else TOKENS_PER_PASS[device.type] - pool.lengths[messages].sum()
    pool = pool.select(torch.cat([messages, others[pool.lengths[others].cumsum(0) <= room]]))
    pool = compute_features(classifier, pool, device) if classifier.n_frozen_blocks else pool
    few = replace(encoded, pool=pool, splits={"train": Split(inverse, split.labels[indices])})
    window, optimizer = torch.arange(len(indices)).split(experiment.batch_size), make_optimizer(classifier, experiment)
    results = {"the features": pool.batch(torch.arange(len(messages)), device).x.float()}
    step = partial(accumulate_gradients, classifier.train(), few, window, experiment)
    results |= first_update(classifier, step, optimizer)
    results["the logits after the update"] = predict(classifier, pool, inverse)
    return {name: tensor.cpu() for name, tensor in results.items()}


def run_seed(experiment, setup, checkpoint, run_options, console):
    """Train one seed, resuming if the checkpoint holds it, evaluate it and write its outputs. Return its Record."""
    started = time.perf_counter()
    classifier = build_classifier(experiment, len(setup.dataset.class_names), setup.weights.tensors)
    place(classifier, setup.device, experiment.shard)
    console.info(describe_model(experiment, classifier))
    features = setup.features.load_or_compute(classifier, setup.encoded.pool, experiment.seed)
    encoded = replace(setup.encoded, pool=features)

    optimizer, is_kept = make_optimizer(classifier, experiment), features.stage is not Stage.TOKEN_IDS
    state = TrainingState(classifier, optimizer, History(), experiment.seed, is_kept, started)
    torch.manual_seed(experiment.seed)
    checkpoint.restore(state)
    try:
        train(classifier, encoded, experiment, state, checkpoint, console)
        minutes = state.usage()["training"] / 60
        console.info(f"Training completed in {minutes:.2f} minutes.")
        loaders = make_loaders(encoded.splits, experiment.batch_size)
        predictions = {name: predict_batches(classifier, encoded, name, loader) for name, loader in loaders.items()}
    except NonFiniteError as error:
        advice = "Try: a smaller --learning_rate; --precision fp32"
        raise NonFiniteError(f"training diverged, at step {state.batches_done:06d}: {error}\n{advice}") from None

    confusions = {name: confusion(of_split) for name, of_split in predictions.items()}
    with processes.raise_on_all_ranks():
        setup.weights.require_unchanged()
    further = dict(minutes=minutes, feature_seconds=setup.features.seconds, note=run_options.note)
    further |= dict(tokens_per_message=setup.encoded.longest)
    record = make_record(experiment, setup.dataset, setup.weights, confusions, state, **further)
    # Before anything is printed: a closed pipe or a full disk behind it loses no record.
    console.write_output("the record", run_options.results, write_record, record)
    console.info("\n".join([*describe_accuracies(record), *describe_mistakes(record)]))
    probabilities = {name: predictions[name].logits.softmax(-1) for name in ("validation", "test")}
    console.write_output("the predictions", run_options.predictions, write_predictions, setup.dataset, probabilities)
    if run_options.save_model or run_options.export:
        parameters = state.full_parameters()
        if processes.rank() == 0:
            write_classifier(experiment, setup, parameters, record, run_options, console)
    return record


def write_classifier(experiment, setup, parameters, record, run_options, console):
    """Write a trained classifier, and its export, from its trained parameters {name: tensor}."""
    # It is built again: in the trained one, frozen weights may be in bfloat16, or sharded.
    classifier = build_classifier(experiment, len(setup.dataset.class_names), setup.weights.tensors)
    base_sha256 = classifiers.sha256_of_base(setup.weights, classifier)
    results = [f"Training completed in {record.minutes:.2f} minutes.", *describe_accuracies(record)]
    command = command_line(changed_options(experiment))
    settings, limit, data = asdict(experiment), setup.encoded.limit, setup.dataset
    saved = classifiers.SavedClassifier(settings, limit, data.class_names, base_sha256, command, data.name, results)
    console.write_output("the classifier", run_options.save_model, classifiers.save_classifier, saved, parameters)
    if run_options.export:
        classifiers.load_parameters(classifier, parameters)
        console.write_output("the export", run_options.export, write_export, classifier, saved)


# --- using a trained classifier ---


class TrainedClassifier:
    """A classifier that --save_model wrote, ready to use. `given` may replace weights, device and columns.

    Raises UserError for a file that cannot be used, and for weights other than those that it was trained on.
    """

    def __init__(self, path, **given):
        self.path, self.given = path, given
        classifier, self.experiment, saved = build_saved_classifier(path, given)
        self.class_names = saved.class_names
        device, _ = resolve_device(self.experiment.device)
        set_precision(self.experiment.precision, device)
        self.classifier, self.is_compared = place(classifier, device), device.type == "cpu"

    def predict(self, texts):
        """Return (labels, probabilities (n, K)) for a list of n texts: names of classes, and a tensor on the CPU.

        Texts are cut, padded and classified as in training. On an accelerator, the first ones are classified on the CPU
        too. Raises UserError for a blank text, and if the device does not compute what the CPU computes.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)  # a Series of pandas has no truth value
        if blank := [index for index, text in enumerate(texts) if not text.strip()]:
            raise UserError(f"text {blank[0]} is blank")
        if not texts:
            return [], torch.empty(0, len(self.class_names))
        frame = pd.DataFrame(dict(Text=texts, Label=0))
        encoded = encode(load_vocabulary(), {"texts": frame}, self.experiment)
        indices = encoded.splits["texts"].indices
        for line in encoded.describe_cut():
            print(f"warning: {line}", file=sys.stderr)
        if not self.is_compared:
            self.compare_with_cpu(encoded.pool, indices[:8])
        probabilities = predict(self.classifier, encoded.pool, indices).cpu().softmax(-1)
        return [self.class_names[index] for index in probabilities.argmax(-1)], probabilities

    def compare_with_cpu(self, pool, indices):
        """Continue on the CPU, or raise UserError, if the device computes other logits for these messages."""
        on_cpu, *_ = build_saved_classifier(self.path, self.given | dict(device="cpu", precision="fp32"))
        on = {self.classifier.device.type: self.classifier, "cpu": place(on_cpu, torch.device("cpu"))}

        def logits_on(device):
            return {"the logits": predict(on[device.type], pool, indices).cpu()}

        is_auto, precision = self.experiment.device == "auto", self.experiment.precision
        device = check_device(self.classifier.device, is_auto, precision, logits_on, Console(quiet=True))
        self.classifier, self.is_compared = on[device.type], True


load_classifier = TrainedClassifier


def build_saved_classifier(path, given):
    """Return (Classifier on the CPU, Experiment with which it is used, SavedClassifier) from a file of --save_model.

    `given` settings {name: value} replace its own. Raises UserError, see `TrainedClassifier`.
    """
    saved, parameters = classifiers.read_classifier(path)
    with refuse_damaged(path):  # other settings, names or shapes
        experiment = Experiment(**saved.settings_with(given))
        weights = load_weights(experiment.weights, experiment.model_size)
        classifier = build_classifier(experiment, len(saved.class_names), weights.tensors)
        saved.check_base(weights, classifier)
        classifiers.load_parameters(classifier, parameters)
    return classifier, experiment, saved


def use_classifier(run_options, given):
    """Carry out --load_model: write the export, and classify messages as they arrive."""
    if run_options.export is not None:
        classifier, experiment, saved = build_saved_classifier(run_options.load_model, given)
        check_experiment(experiment)
        write_export(run_options.export, classifier, saved)
        if not run_options.quiet:  # standard output is for answers only
            print(f"Wrote the export to {run_options.export}", file=sys.stderr)
    if run_options.classify:
        classifiers.classify(run_options.classify, lambda: load_classifier(run_options.load_model, **given))


# --- main ---


def main(argv=None):
    """Run the command line and return the exit status, see `exit_status`."""
    return exit_status(lambda: execute(argv))


def execute(argv):
    """Do what the command line asks for."""
    with processes.process_group():
        with processes.raise_on_all_ranks():
            experiment, run_options, given = parse_args(argv)
        if experiment is None or run_options.baseline:  # `prepare` does it for `run`
            options.check_outputs(run_options, experiment)
        if run_options.report is not None:
            print_report(run_options)
        elif run_options.baseline:
            from runner.results.baseline import run_baselines  # slow to import

            run_baselines(experiment, run_options)
        elif run_options.load_model is not None:
            use_classifier(run_options, given)
        else:
            run(experiment, run_options)


if __name__ == "__main__":
    prepare_streams()
    end_process(main())
