"""GPT-2 as a classifier: LoRA, a classification head, what is trained and what is frozen.

Read this after `previous_chapters.py`, which is GPT-2 itself, and before `additional_experiments.py`, which trains the
classifier. Shapes: B messages in a batch, T tokens in a message, D embedding width, K classes.

The program computes only what the loss can see, and computes only once what training cannot change:
  1. visible prefix: tokens that the classified position cannot attend to are dropped   (additional_experiments.encode)
  2. one query: the last block computes the classified position only                    (GPTModel.blocks)
  3. frozen features: what comes before the first trained parameter runs once           (Classifier.frozen_part)
  4. no keys and values: the last block, on frozen features, computes neither           (attend_to_normalized)
The results differ from those of the plain computation by rounding only.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import nn

from previous_chapters import GPTModel, load_gpt2_weights, select_positions
from runner.data.messages import Stage
from runner.machine import processes

# --- LoRA ---


class LinearWithLoRA(nn.Module):
    """A linear layer plus a low-rank product (Hu et al. 2021, section 4.1): x W + b + alpha x A B.

    A is (in, rank), and B (rank, out) starts at zero. The factor is alpha, as in the public original of this
    experiment; in the paper it is alpha / rank.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.alpha = linear, alpha
        self.A = nn.Parameter(torch.empty(linear.in_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, linear.out_features))

    def forward(self, x):
        """Return (..., out) for x (..., in)."""
        low_rank = x @ self.A
        out = self.linear(x)
        # In place: writing a second tensor of the size of `out` would take longer than computing the product.
        out.view(-1, out.shape[-1]).addmm_(low_rank.flatten(0, -2), self.B.to(low_rank.dtype), alpha=self.alpha)
        return out


class LinearWithMergedLoRA(LinearWithLoRA):
    """The same function, with the low-rank product added to the weight before the matmul."""

    def forward(self, x):
        return F.linear(x, self.linear.weight + self.alpha * (self.A @ self.B).T, self.linear.bias)


def add_lora(module, lora_type, rank, alpha):
    """Wrap every nn.Linear below `module`, depth first: the order in which the A matrices are drawn."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, lora_type(child, rank, alpha))
        else:
            add_lora(child, lora_type, rank, alpha)


# --- the classifier ---


class Classifier(nn.Module):
    """GPT-2 with a head that classifies one position of a message, or the mean over its positions.

    It runs in two parts. The frozen part ends before the first parameter that requires a gradient, so that its output,
    the frozen features of a message, can be computed once (runner/data/features.py). The trained part continues from
    there. Both take and return a `Batch`, whose `stage` says what its `x` holds.
    """

    def __init__(self, gpt, out_head, average_embeddings=False, bf16=False):
        super().__init__()
        self.gpt, self.out_head = gpt, out_head
        self.average_embeddings, self.bf16 = average_embeddings, bf16
        self.n_frozen_blocks = count_frozen_blocks(gpt)

    @property
    def device(self):
        """The torch.device of the parameters."""
        return self.gpt.final_norm.weight.device

    @property
    def dtype(self):
        """The torch.dtype of the logits."""
        return self.gpt.final_norm.weight.dtype

    @property
    def feature_stage(self):
        """The Stage at which the frozen part ends."""
        n_trained_blocks = len(self.gpt.trf_blocks) - self.n_frozen_blocks
        if self.n_frozen_blocks == 0:
            return Stage.TOKEN_IDS
        if n_trained_blocks == 0:
            return Stage.HEAD_INPUT
        if n_trained_blocks == 1 and not self.average_embeddings:  # one query per message needs no keys and values
            return Stage.STANDARDIZED
        return Stage.HIDDEN_STATES

    @property
    def n_full_blocks(self):
        """The number of frozen blocks that run at all positions; a last block that computes only one does not count."""
        is_one_query = self.n_frozen_blocks == len(self.gpt.trf_blocks) and not self.average_embeddings
        return self.n_frozen_blocks - is_one_query

    def forward(self, batch, method=None):
        """Return the logits (B, K) of a Batch, or what `method`, one of those below, returns for it.

        Every computation goes through forward(), because FSDP gathers the parameters there.
        """
        if method is not None:
            return method(batch)
        return self.trained_part(self.frozen_part(batch))

    @torch.no_grad()
    def frozen_part(self, batch):
        """Bring a Batch to `feature_stage`; one that is there already is returned unchanged."""
        stage = self.feature_stage
        if batch.stage is stage and batch.n_blocks == self.n_frozen_blocks:
            return batch
        batch = self.run_blocks(batch, self.n_frozen_blocks)
        match stage:
            case Stage.HIDDEN_STATES:
                return batch
            case Stage.STANDARDIZED:
                residual = select_positions(batch.x, batch.positions)  # (B, 1, D)
                # The standardized input is used in matmuls only, so with bf16 it can be stored in bfloat16.
                x_hat = self.gpt.trf_blocks[-1].standardize(batch.x).to(torch.bfloat16 if self.bf16 else batch.x.dtype)
                return replace(batch, stage=stage, x=x_hat, residual=residual)
            case Stage.HEAD_INPUT:
                return replace(batch, stage=stage, x=self.head_input(batch.x, batch), key_mask=None)

    def trained_part(self, batch):
        """Return the logits (B, K) of a Batch at `feature_stage`. The head computes in full precision."""
        match batch.stage:
            case Stage.HEAD_INPUT:
                return self.out_head(batch.x.squeeze(1))
            case Stage.STANDARDIZED:
                with self.autocast():
                    x = self.gpt.trf_blocks[-1].forward_normalized(batch.residual, batch.x, batch.key_mask)
            case _:
                x = self.run_blocks(batch, len(self.gpt.trf_blocks)).x
        return self.out_head(self.head_input(x, batch).squeeze(1))

    def run_blocks(self, batch, end):
        """Return a Batch with the hidden states after the first `end` blocks, from token ids or hidden states.

        The last block of the model computes one position only, unless the mean over positions is classified.
        """
        query_positions = None if self.average_embeddings else batch.positions
        with self.autocast():
            x = self.gpt.embed(batch.x) if batch.stage is Stage.TOKEN_IDS else batch.x
            x = self.gpt.blocks(x, batch.n_blocks, end, batch.key_mask, query_positions)
        return replace(batch, stage=Stage.HIDDEN_STATES, x=x, n_blocks=end)

    def head_input(self, x, batch):
        """Return the head's input (B, 1, D) from the last block's output: (B, 1, D), or (B, T, D) for the mean."""
        x = self.gpt.final_norm(x)
        return mean_up_to(x, batch.positions) if self.average_embeddings else x

    @torch.no_grad()
    def merge_lora(self):
        """Replace every LinearWithLoRA by one nn.Linear that computes the same function."""
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, LinearWithLoRA):
                    product = child.alpha * (child.A.double() @ child.B.double())
                    child.linear.weight.data = (child.linear.weight.double() + product.T).to(child.linear.weight.dtype)
                    setattr(module, name, child.linear)

    def autocast(self):
        """Return the context in which matmuls are in bfloat16, if this classifier uses bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def mean_up_to(x, positions):
    """Return the mean of each message's vectors up to its position: x (B, T, D) and positions (B,) give (B, 1, D).

    The head is linear, so it can be applied to this mean instead of to each vector.
    """
    is_averaged = torch.arange(x.shape[1], device=x.device) <= positions[:, None]  # (B, T)
    weights = is_averaged / is_averaged.sum(1, keepdim=True).to(x.dtype)
    return weights[:, None] @ x


def is_frozen(module):
    """Return whether no parameter of `module` requires a gradient."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def count_frozen_blocks(gpt):
    """Return how many blocks come before the first parameter that requires a gradient."""
    if not is_frozen(gpt.tok_emb) or not is_frozen(gpt.pos_emb):
        return 0
    return len(list(takewhile(is_frozen, gpt.trf_blocks)))


# --- building it, and placing it on a device ---


def build_classifier(experiment, n_classes, tensors=None):
    """Return the Classifier of an Experiment, on the CPU: GPT-2 frozen, then made trainable where the settings say so.

    `tensors` are those of a GPT-2 checkpoint by name; None draws random weights. The random numbers are drawn in the
    order of the public original: the seed is set, the model is drawn; the seed is set again, the head is drawn and then
    the LoRA matrices.
    """
    torch.manual_seed(experiment.seed)
    with nullcontext() if tensors is None else torch.device("meta"):  # names and shapes only; nothing is drawn
        gpt = GPTModel(experiment.config)
    if tensors is not None:
        load_gpt2_weights(gpt, tensors)
    gpt.requires_grad_(False)

    torch.manual_seed(experiment.seed)
    out_head = nn.Linear(gpt.cfg.emb_dim, n_classes)
    match experiment.trainable_layers:
        case "last_layer":
            trained = []
        case "last_block":
            trained = [gpt.trf_blocks[-1], gpt.final_norm]
        case "last_two_blocks":
            trained = [gpt.trf_blocks[-2:], gpt.final_norm]
        case "all":
            trained = [gpt]
        case "lora" | "lora_alternative" as name:
            trained = []
            lora_type = LinearWithLoRA if name == "lora" else LinearWithMergedLoRA
            add_lora(gpt, lora_type, experiment.lora_rank, experiment.lora_alpha)
            out_head = lora_type(out_head, experiment.lora_rank, experiment.lora_alpha)
    for module in trained:
        module.requires_grad_(True)
    return Classifier(gpt, out_head, experiment.average_embeddings, bf16=experiment.precision == "bf16")


def place(classifier, device, shard=False):
    """Move a classifier to the device on which it computes, ready for training, and return it.

    With `shard`, each rank gets its shard of the parameters. Otherwise the frozen blocks are prepared for speed: query,
    key and value become one matmul, and with bf16 linear layers are cast to bfloat16. Logits change by rounding only.
    """
    if shard:
        processes.shard(classifier, device)
        return classifier
    classifier.to(device)
    for parameter in classifier.parameters():
        # Weights from a file are transposed views of its memory map. On the CPU frozen ones can stay there.
        if parameter.requires_grad and device.type == "cpu":
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        elif device.type != "cpu":
            parameter.data = parameter.data.contiguous()
    blocks, bf16 = classifier.gpt.trf_blocks, torch.bfloat16 if classifier.bf16 else None
    for block in blocks[: classifier.n_frozen_blocks]:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(bf16)
        block.att.fuse()
    for module in blocks.modules():
        # Not under merged LoRA: in bfloat16 the small product that is added to the weight would be rounded away.
        if type(module) is LinearWithLoRA:
            module.linear.to(bf16)
    return classifier
