"""Messages on their way through the classifier: concatenated, in batches, in passes of bounded size.

In the shapes B is messages in a batch, T tokens in a message, D the embedding width.
"""

from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F


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
        parts = {name: getattr(self, name)[indices] for name in ("lengths", "positions", "labels")}
        return replace(self, x=self.x[tokens[is_real]], residual=None, **parts)

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


def tokenize(tokenizer, texts):
    """The token ids of each text, a list of tensors; a special token in a text is text like any other."""
    return [torch.tensor(tokenizer.encode_ordinary(text), dtype=torch.int32) for text in texts]


def cut_and_pad(token_ids, lengths, pad):
    """Messages, a list of tensors, one after the other (N,), each cut or padded to its own of `lengths` (n,)."""
    return torch.cat([F.pad(part, (0, n - len(part)), value=pad) for part, n in zip(token_ids, lengths.tolist())])


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
