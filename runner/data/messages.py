"""Messages on their way through the classifier: the pool of distinct messages, splits of it, batches and passes.

In the shapes B is messages in a batch, T tokens in a message, D the embedding width.
"""

from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import torch

from runner.machine import processes


class Stage(Enum):
    """How far messages are processed: what `x` of a Batch or a MessagePool holds."""

    TOKEN_IDS = "token ids"  # (B, T)
    HIDDEN_STATES = "hidden states"  # (B, T, D) after some of the blocks
    STANDARDIZED = "standardized hidden states"  # (B, T, D) the last block's input, with mean 0 and variance 1
    HEAD_INPUT = "head input"  # (B, 1, D) after the final norm and the pooling


@dataclass
class Batch:
    """B messages, padded on the right to the longest of them."""

    stage: Stage
    x: torch.Tensor  # (B, T) or (B, T, D), see Stage
    positions: torch.Tensor  # (B,) the position that is classified, or the last one that is averaged over
    key_mask: torch.Tensor | None  # (B, 1, 1, T) True where a token may be attended to; None: everywhere
    residual: torch.Tensor | None = None  # (B, 1, D) with standardized x: the hidden states at `positions`
    n_blocks: int = 0  # the number of blocks that x has passed


@dataclass
class MessagePool:
    """The n distinct messages of all splits, of unequal lengths, concatenated."""

    stage: Stage
    x: torch.Tensor  # (N,) token ids, or (N, D) the output of the frozen part, possibly mapped from a file
    lengths: torch.Tensor  # (n,) tokens of each message in x
    positions: torch.Tensor  # (n,) as in Batch
    residual: torch.Tensor | None = None  # (n, D) as in Batch
    n_blocks: int = 0  # as in Batch

    def __post_init__(self):
        self.starts = self.lengths.cumsum(0) - self.lengths

    def __len__(self):
        return len(self.lengths)

    def token_indices(self, indices):
        """Return the indices in x (B, T) of the tokens of messages (B,), and a mask (B, T) that is False for padding.

        Padding points at the last token of its message.
        """
        lengths = self.lengths[indices, None]
        offsets = torch.arange(int(lengths.max()))
        return self.starts[indices, None] + offsets.minimum(lengths - 1), offsets < lengths

    def select(self, indices):
        """Return a MessagePool of the messages `indices` (B,)."""
        tokens, is_real = self.token_indices(indices)
        x, residual = self.x[tokens[is_real]], None if self.residual is None else self.residual[indices]
        return replace(self, x=x, lengths=self.lengths[indices], positions=self.positions[indices], residual=residual)

    def batch(self, indices, device):
        """Return the messages `indices` (B,) as a Batch on `device`."""
        tokens, is_real = self.token_indices(indices)
        return Batch(
            self.stage,
            self.x[tokens.to(self.x.device)].to(device),
            self.positions[indices].to(device),
            None if is_real.all() else is_real[:, None, None].to(device),
            None if self.residual is None else self.residual[indices.to(self.x.device), None].to(device),
            self.n_blocks,
        )


@dataclass(frozen=True)
class Split:
    """The labelled messages of a split, in their order."""

    indices: torch.Tensor  # (n,) of each message in the MessagePool
    labels: torch.Tensor  # (n,)

    def __len__(self):
        return len(self.indices)


@dataclass(frozen=True)
class EncodedData:
    """The messages of a data set as token ids, each distinct message once."""

    pool: MessagePool
    splits: dict  # {name: Split}
    limit: int  # the number of tokens to which messages are cut, and padded unless padding is off
    longest: int  # tokens of the longest message, padding included
    n_cut: dict = field(default_factory=dict)  # {name: how many messages of a split have more tokens than `limit`}
    usual: int = 0  # 99% of the messages of the first split have at most this number of tokens

    def describe_cut(self):
        """Return a line for each split some of whose messages are cut."""
        lines, kinds = [], {"train": "training texts", "texts": "texts"}
        for name, n in self.n_cut.items():
            has, is_cut = ("has", "is cut") if n == 1 else ("have", "are cut")
            texts = f"{len(self.splits[name]):,} {kinds.get(name, name + ' texts')}"
            lines += [f"{n:,} of {texts} {has} more than {self.limit:,} tokens and {is_cut}"] * bool(n)
        return lines


# --- from texts to the pool ---


# No token of GPT-2 is longer than 128 bytes, so half of this has as many tokens as the context. What follows is not
# encoded: it would take time and memory, and a million spaces overflow the stack of tiktoken.
MAX_CHARACTERS = 2 * 128 * 1024


def tokenize(tokenizer, texts):
    """Return the token ids of each text, a list of int32 arrays. Special tokens in a text are text like any other."""
    return [np.array(tokenizer.encode_ordinary(text[:MAX_CHARACTERS]), dtype=np.int32) for text in texts]


def make_pool(token_ids, lengths, positions, pad_token):
    """Return the MessagePool of the distinct messages, and the index in it (n,) of each message.

    Each of the messages, a list of n arrays, is cut or padded to its own of `lengths` (n,). Two messages are the same
    if their tokens and their `positions` (n,) are.
    """
    index_of, indices = {}, []
    for ids, length, position in zip(token_ids, lengths.tolist(), positions.tolist(), strict=True):
        padding = np.full(max(length - len(ids), 0), pad_token, dtype=ids.dtype)
        message = np.concatenate([ids[:length], padding]).tobytes(), position
        indices.append(index_of.setdefault(message, len(index_of)))
    contents, distinct_positions = zip(*index_of, strict=True)
    x = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.int32)
    distinct_lengths = torch.tensor([len(content) // 4 for content in contents])
    pool = MessagePool(Stage.TOKEN_IDS, x, distinct_lengths, torch.tensor(distinct_positions))
    return pool, torch.tensor(indices)


# --- passes ---

# Tokens in a forward pass without gradients: enough to keep the device busy; more cost memory and gain nothing.
TOKENS_PER_PASS = {"cpu": 1024, "mps": 4096, "cuda": 16384}


def split_into_passes(lengths, device):
    """Yield the indices of messages of these lengths (n,), from short to long, in tensors of one pass each."""
    lengths, order = lengths.sort(stable=True)
    start, longest = 0, lengths.tolist()
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * longest[end] > TOKENS_PER_PASS[device.type]:
            yield order[start:end]
            start = end


def run_passes(classifier, pool, indices, compute):
    """Yield (message indices, what `compute` returns for their Batch) for each pass over messages (n,) of a pool.

    `compute` returns a list of tensors. The classifier is in evaluation mode, and no gradients are computed. Each rank
    computes its share of the passes, and all get every result.
    """

    @torch.no_grad()
    def compute_pass(own):
        return compute(pool.batch(indices[own], classifier.device))

    was_training = classifier.training
    classifier.eval()
    passes = split_into_passes(pool.lengths[indices], classifier.device)
    for own, results in processes.distribute_passes(passes, compute_pass):
        yield indices[own], results
    classifier.train(was_training)
