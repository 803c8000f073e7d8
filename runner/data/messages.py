"""Messages on their way through the classifier: concatenated, in batches, in passes of bounded size.

In the shapes B is messages in a batch, T tokens in a message, D the embedding width.
"""

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch


class Stage(Enum):
    """How far messages are processed: what `x` of Batch and Messages holds."""

    TOKEN_IDS = "token ids"  # (B, T)
    HIDDEN_STATES = "hidden states"  # (B, T, D) after some of the blocks
    STANDARDIZED = "standardized hidden states"  # (B, T, D) the last block's input, with mean 0 and variance 1
    HEAD_INPUT = "head input"  # (B, 1, D) after the final norm and the pooling


@dataclass
class Batch:
    """B messages next to each other, padded on the right to the longest of them."""

    stage: Stage
    x: torch.Tensor  # (B, T) or (B, T, D), see Stage
    positions: torch.Tensor  # (B,) the position that is classified, or the last one that is averaged over
    key_mask: torch.Tensor | None  # (B, 1, 1, T) True where there is something to attend to; None: everywhere
    residual: torch.Tensor | None = None  # (B, 1, D) with standardized x: the hidden states at `positions`
    n_blocks: int = 0  # that x has been through


@dataclass
class Messages:
    """The n messages of a split, of unequal lengths, concatenated."""

    stage: Stage
    x: torch.Tensor  # (N,) token ids, or (N, D) what the frozen blocks made of them, perhaps mapped from a file
    lengths: torch.Tensor  # (n,) tokens of each message in x
    positions: torch.Tensor  # (n,) as in Batch
    labels: torch.Tensor  # (n,)
    residual: torch.Tensor | None = None  # (n, D) as in Batch
    n_blocks: int = 0  # as in Batch

    def __post_init__(self):
        self.starts = self.lengths.cumsum(0) - self.lengths

    def __len__(self):
        return len(self.lengths)

    def token_indices(self, indices):
        """Where in x the tokens of the messages `indices` (B,) are: (B, T), and (B, T) False where there is a pad.

        Pads point at the message's last token.
        """
        lengths = self.lengths[indices, None]
        offsets = torch.arange(int(lengths.max()))
        return self.starts[indices, None] + offsets.minimum(lengths - 1), offsets < lengths

    def select(self, indices):
        """The messages `indices` (B,) as Messages, without a residual."""
        tokens, is_real = self.token_indices(indices)
        own = dict(x=self.x[tokens[is_real]], lengths=self.lengths[indices], residual=None)
        return replace(self, **own, positions=self.positions[indices], labels=self.labels[indices])

    def batch(self, indices, device):
        """The messages `indices` (B,) as a Batch on `device`."""
        tokens, is_real = self.token_indices(indices)
        return Batch(
            self.stage,
            self.x[tokens.to(self.x.device)].to(device),
            self.positions[indices].to(device),
            None if is_real.all() else is_real[:, None, None].to(device),
            None if self.residual is None else self.residual[indices.to(self.x.device), None].to(device),
            self.n_blocks,
        )


# --- from texts to tokens ---

TEXTS_PER_CALL = 1000


def tokenize(tokenizer, texts):
    """The token ids of n texts, one after the other (N,), and how many each has (n,).

    Many texts are one call of the tokenizer, which splits them at a special token; and there is no Python object for
    each token.
    """
    separator, separator_id = tokenizer.decode([tokenizer.eot_token]), tokenizer.eot_token
    parts = []
    for start in range(0, len(texts), TEXTS_PER_CALL):
        chunk = texts[start : start + TEXTS_PER_CALL]
        joined = separator.join(chunk)
        if joined.count(separator) < len(chunk):
            parts.append(tokenizer.encode_to_numpy(joined, allowed_special={separator}))
            parts.append([separator_id])
        else:  # in a message it is text like any other
            for text in chunk:
                parts.append(tokenizer.encode_ordinary(text))
                parts.append([separator_id])
    token_ids = torch.cat([torch.from_numpy(np.asarray(part, dtype=np.int32)) for part in parts])
    is_separator = token_ids == separator_id
    ends = is_separator.nonzero().flatten()
    return token_ids[~is_separator], ends.diff(prepend=torch.tensor([-1])) - 1


def cut_and_pad(x, lengths, new_lengths, pad):
    """n messages of these lengths (n,), one after the other in x (N,), cut or padded to their `new_lengths` (n,).

    Where one is padded, all new lengths must be the same.
    """
    n_kept = lengths.minimum(new_lengths)
    if not n_kept.equal(lengths):
        offsets = torch.arange(len(x)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        x = x[offsets < n_kept.repeat_interleave(lengths)]
    if n_kept.equal(new_lengths):
        return x
    length = int(new_lengths[0])
    padded = torch.full((len(lengths), length), pad, dtype=x.dtype)
    return padded.masked_scatter_(torch.arange(length) < n_kept[:, None], x).flatten()


# --- passes ---

# Tokens in a forward pass without gradients: enough to keep the device busy; more cost memory and gain nothing.
TOKENS_PER_PASS = {"cpu": 1024, "mps": 4096, "cuda": 16384}


def split_into_passes(lengths, device):
    """Indices of messages of these lengths (n,), from short to long, cut into tensors for one pass each."""
    lengths, order = lengths.sort(stable=True)
    start, longest = 0, lengths.tolist()
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * longest[end] > TOKENS_PER_PASS[device.type]:
            yield order[start:end]
            start = end
