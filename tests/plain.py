"""The experiment as it is written in textbooks: slow, and what the fast path is held against.

Every token of every padded message goes through every block, every position through the head, and only then is
one position picked or all are averaged. Norm, GELU, attention and LoRA are their formulas, element by element.
It reads its parameters from a Classifier and shares none of that class's code.
"""

import math

import torch

from additional_experiments import PAD_TOKEN
from classifier import LinearWithLoRA


def linear(module, x):
    if isinstance(module, LinearWithLoRA):
        return linear(module.linear, x) + module.alpha * (x @ module.A @ module.B)
    return x @ module.weight.T + module.bias


def norm(module, x):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * module.weight + module.bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(att, x, causal):
    B, T, D = x.shape
    q, k, v = (
        linear(w, x).view(B, T, att.n_heads, -1).transpose(1, 2) for w in (att.W_query, att.W_key, att.W_value)
    )  # (B, H, T, D/H)
    scores = q @ k.transpose(2, 3) / math.sqrt(D / att.n_heads)
    if causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=bool, device=x.device).triu(1), -torch.inf)
    context = torch.softmax(scores, -1) @ v
    return linear(att.out_proj, context.transpose(1, 2).reshape(B, T, D))


def all_logits(classifier, token_ids, causal):
    """(B, T) token ids to (B, T, K) logits."""
    gpt = classifier.gpt
    x = gpt.tok_emb.weight[token_ids] + gpt.pos_emb.weight[torch.arange(token_ids.shape[1])]
    for block in gpt.trf_blocks:
        x = x + attention(block.att, norm(block.norm1, x), causal)
        x = x + linear(block.ff[2], gelu(linear(block.ff[0], norm(block.norm2, x))))
    return linear(classifier.out_head, norm(gpt.final_norm, x))


def pad(token_lists, max_tokens, no_padding):
    """The messages cut to `max_tokens` and padded to it, and how many tokens of each are real."""
    cut = [tokens[:max_tokens] for tokens in token_lists]
    padded = [tokens if no_padding else tokens + [PAD_TOKEN] * (max_tokens - len(tokens)) for tokens in cut]
    return padded, [len(tokens) for tokens in cut]


def logits(classifier, experiment, token_lists, max_tokens):
    """Lists of token ids to logits (B, K); messages that are not padded go one by one."""
    padded, real = pad(token_lists, max_tokens, experiment.no_padding)
    batches = [[message] for message in padded] if experiment.no_padding else [padded]
    outputs = [
        message
        for batch in batches
        for message in all_logits(classifier, torch.tensor(batch), causal=not experiment.disable_causal_mask)
    ]  # of (T, K)
    rows = []
    for output, n_real in zip(outputs, real):
        if experiment.average_embeddings:
            rows.append(output[:n_real].mean(0) if experiment.trainable_token_pos == "flexible" else output.mean(0))
        else:
            rows.append(output[{"last": -1, "first": 0, "flexible": n_real - 1}[experiment.trainable_token_pos]])
    return torch.stack(rows)
