"""GPT-2 in plain PyTorch: sizes, attention, transformer blocks, the model, and loading of named tensors.

The model follows Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): learned
position embeddings, layer norm before attention and feed-forward (pre-norm), tanh GELU, a bias in the query, key
and value projections. The model ends at the final norm; `classifier.py` adds the head.

Shapes: B messages in a batch, T tokens in a message, D embedding width, H attention heads.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# --- sizes ---


@dataclass(frozen=True)
class GPTConfig:
    """The settings of a `GPTModel`: `emb_dim` is D, `n_heads` is H."""

    emb_dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = 50257
    context_length: int = 1024
    causal: bool = True  # a token attends to itself and to those before it; False: to every token
    activation_checkpointing: bool = False  # recompute each block in the backward pass, to save memory


GPT_SIZES = {
    "gpt2-small (124M)": dict(emb_dim=768, n_layers=12, n_heads=12),
    "gpt2-medium (355M)": dict(emb_dim=1024, n_layers=24, n_heads=16),
    "gpt2-large (774M)": dict(emb_dim=1280, n_layers=36, n_heads=20),
    "gpt2-xl (1558M)": dict(emb_dim=1600, n_layers=48, n_heads=25),
    "gpt2-nano (7M)": dict(emb_dim=128, n_layers=4, n_heads=4),  # for trying things out; nobody pretrained it
}


# --- the model ---


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with a workaround for MPS, where PyTorch up to 2.12 computes wrong gradients if the input is frozen.

    They are right if the input requires a gradient, so here it requires one, which nobody reads (pytorch issue 183825).
    """

    def forward(self, x):
        if x.device.type == "mps" and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_(self.weight.requires_grad)
        return super().forward(x)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention over H heads (Vaswani et al. 2017, section 3.2).

    The projections are created in the order query, key, value, output, which is the order in which their
    random weights are drawn.
    """

    def __init__(self, cfg):
        super().__init__()
        self.n_heads, self.causal = cfg.n_heads, cfg.causal
        self.W_query = nn.Linear(cfg.emb_dim, cfg.emb_dim)
        self.W_key = nn.Linear(cfg.emb_dim, cfg.emb_dim)
        self.W_value = nn.Linear(cfg.emb_dim, cfg.emb_dim)
        self.out_proj = nn.Linear(cfg.emb_dim, cfg.emb_dim)
        self.W_qkv = None

    def forward(self, x, key_mask=None, query_positions=None):
        """Return the attention output of x (B, T, D): (B, T, D), or (B, 1, D) for one query per message.

        `query_positions` (B,) are the positions of these queries. `key_mask` (B, 1, 1, T) is True where a token may be
        attended to. With the causal mask and all queries it is ignored: padding is on the right, where no token attends
        to it. A single query attends to all that `key_mask` allows; with the causal mask these must be the tokens up to
        its own position.
        """
        one_query = query_positions is not None
        # Matmul inputs are 2-dimensional: on some Macs PyTorch multiplies 3-dimensional ones wrongly.
        if self.W_qkv is not None and not one_query:
            projected = F.linear(x.flatten(0, 1), *self.W_qkv).chunk(3, dim=-1)
        else:
            query_input = select_positions(x, query_positions) if one_query else x
            queries = self.W_query(query_input.flatten(0, 1))
            projected = queries, self.W_key(x.flatten(0, 1)), self.W_value(x.flatten(0, 1))
        queries, keys, values = (self.split_heads(part, len(x)) for part in projected)
        # Except on CUDA, attention is in float32 with bf16 too: on a CPU the backward pass of the fused kernel takes
        # 1.5 times as long in bfloat16; on MPS the kernel has ignored the causal mask and misread strided tensors.
        if x.device.type != "cuda" and queries.dtype == torch.bfloat16:
            queries, keys, values = queries.float(), keys.float(), values.float()
        if x.device.type == "mps":
            queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        causal = self.causal and not one_query
        with torch.autocast("mps" if x.device.type == "mps" else "cpu", enabled=False):  # not bfloat16 again
            context = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=None if causal else key_mask, is_causal=causal
            )
        context = context.transpose(1, 2).flatten(2).flatten(0, 1)  # (B, H, T, D/H) -> (B T, D)
        return self.out_proj(context).unflatten(0, (len(x), -1))

    def split_heads(self, x, batch_size):
        return x.view(batch_size, -1, self.n_heads, x.shape[-1] // self.n_heads).transpose(1, 2)  # to (B, H, T, D/H)

    def attend_to_normalized(self, query_input, x_hat, norm, key_mask=None):
        """Return what `forward` returns for one query per message, without computing keys and values.

        query_input (B, 1, D) is the normed input at the query's position; x_hat (B, T, D) is the input of `norm`,
        standardized but not yet scaled and shifted: the norm gives g x_hat + b. With k_t = W_k (g x_hat_t + b) + c,
        the score q . k_t is ((W_k^T q) g) . x_hat_t plus a term that is the same for every t and cancels in the
        softmax. And since the attention weights a_t sum to one, sum_t a_t v_t = W_v (g (sum_t a_t x_hat_t) + b) + c.
        So all T positions take part in two batched products only; the keys' b and c drop out.
        """
        head_dim = query_input.shape[2] // self.n_heads
        queries = self.W_query(query_input.squeeze(1)).unflatten(1, (self.n_heads, head_dim))  # (B, H, D/H)
        W_key = self.W_key.weight.unflatten(0, (self.n_heads, head_dim))  # (H, D/H, D)
        W_value = self.W_value.weight.unflatten(0, (self.n_heads, head_dim))

        # In full precision under autocast too, like the attention in `forward`: bfloat16 would round the scores.
        with torch.autocast(x_hat.device.type, enabled=False):
            queries, x_hat = queries.to(W_key.dtype), x_hat.to(W_key.dtype)
            folded = torch.einsum("bhd,hde->bhe", queries, W_key) * norm.weight  # (B, H, D)
            scores = (folded / head_dim**0.5) @ x_hat.mT  # (B, H, T)
            if key_mask is not None:
                scores = scores.masked_fill(~key_mask.squeeze(1), float("-inf"))
            mean = scores.softmax(dim=-1) @ x_hat  # (B, H, D)
            context = torch.einsum("bhe,hde->bhd", mean * norm.weight + norm.bias, W_value).flatten(1)
            context = context + self.W_value.bias
        return self.out_proj(context).unsqueeze(1)

    @torch.no_grad()
    def fuse(self):
        """Join the query, key and value projections into one matmul, for a frozen block that is on its device.

        The three layers' weights and biases become views of the joined ones.
        """
        parts = (self.W_query, self.W_key, self.W_value)
        weight = torch.cat([part.weight for part in parts])  # (3 D, D)
        bias = torch.cat([part.bias for part in parts])
        for index, part in enumerate(parts):
            part.weight.data, part.bias.data = weight.chunk(3)[index], bias.chunk(3)[index]
        self.W_qkv = (weight, bias)


class FeedForward(nn.Sequential):
    """Two linear layers, four times as wide between them, with the tanh form of GELU (Hendrycks & Gimpel 2016)."""

    def __init__(self, cfg):
        super().__init__(
            nn.Linear(cfg.emb_dim, 4 * cfg.emb_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * cfg.emb_dim, cfg.emb_dim),
        )


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a layer norm and added to its input (pre-norm)."""

    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(cfg)
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg.emb_dim)
        self.norm2 = LayerNorm(cfg.emb_dim)

    def forward(self, x, key_mask=None, query_positions=None):
        """Return the block's output for x (B, T, D): (B, T, D), or (B, 1, D) with `query_positions`.

        The arguments are those of `MultiHeadAttention.forward`.
        """
        residual = x if query_positions is None else select_positions(x, query_positions)
        return self.feed_forward(residual + self.att(self.norm1(x), key_mask, query_positions))

    def feed_forward(self, x):
        return x + self.ff(self.norm2(x).flatten(0, 1)).view_as(x)

    def forward_normalized(self, residual, x_hat, key_mask=None):
        """Return what `forward` returns for one query per message, from two parts of a frozen input x (B, T, D).

        residual (B, 1, D) is x at the query's position; x_hat (B, T, D) is `standardize(x)`.
        """
        return self.feed_forward(
            residual + self.att.attend_to_normalized(self.norm1(residual), x_hat, self.norm1, key_mask)
        )

    def standardize(self, x):
        """Apply `norm1` without its scale and shift, the part that training the block does not change."""
        return F.layer_norm(x, x.shape[-1:], eps=self.norm1.eps)


class GPTModel(nn.Module):
    """GPT-2 from token ids to the final norm. Modules are created in the order in which their weights are drawn."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.pos_emb = nn.Embedding(cfg.context_length, cfg.emb_dim)
        self.trf_blocks = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.n_layers))
        self.final_norm = LayerNorm(cfg.emb_dim)

    def embed(self, token_ids):
        """Return the sum of token and position embeddings (B, T, D) of token ids (B, T)."""
        return self.tok_emb(token_ids) + self.pos_emb.weight[: token_ids.shape[1]]

    def blocks(self, x, start, end, key_mask=None, query_positions=None):
        """Apply blocks `start` to `end` (exclusive) to x (B, T, D) and return (B, T, D).

        With `query_positions` (B,), the last block of the model computes its output at those positions only: (B, 1, D).
        """
        for index, block in enumerate(self.trf_blocks[start:end], start):
            arguments = x, key_mask, query_positions if index == len(self.trf_blocks) - 1 else None
            if self.cfg.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
            else:
                x = block(*arguments)
        return x

    def forward(self, token_ids, key_mask=None):
        """Return the hidden states after the final norm (B, T, D) of token ids (B, T)."""
        return self.final_norm(self.blocks(self.embed(token_ids), 0, len(self.trf_blocks), key_mask))


def select_positions(x, positions):
    """Return the vector of each message at its own position: x (B, T, D) and positions (B,) give (B, 1, D)."""
    return x[torch.arange(len(x), device=x.device), positions].unsqueeze(1)


# --- loading of named tensors ---

# Names of parameters in this module, mapped to those in a GPT-2 checkpoint.
CHECKPOINT_NAMES = {"tok_emb.weight": "wte.weight", "pos_emb.weight": "wpe.weight"}
CHECKPOINT_NAMES |= {f"final_norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")}
BLOCK_NAMES = {
    "att.W_query": "attn.c_attn",
    "att.W_key": "attn.c_attn",
    "att.W_value": "attn.c_attn",
    "att.out_proj": "attn.c_proj",
    "ff.0": "mlp.c_fc",
    "ff.2": "mlp.c_proj",
    "norm1": "ln_1",
    "norm2": "ln_2",
}
THIRD_OF_C_ATTN = {"W_query": 0, "W_key": 1, "W_value": 2}
MASK_BUFFER = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")


class WeightsError(ValueError):
    """A checkpoint's tensors do not fit the model; the message names the tensor."""


def load_gpt2_weights(model, tensors):
    """Replace every parameter of `model` by the tensor of a GPT-2 checkpoint.

    `tensors` maps the names of GPT-2 checkpoints, with or without the prefix `transformer.`, to tensors: linear weights
    are (in, out), and query, key and value are side by side in `c_attn` (D, 3 D). Mask buffers and an `lm_head.weight`
    that equals `wte.weight` are skipped. A float32 tensor becomes a view, so that a memory-mapped file is read only
    when the model uses it; other floating-point types are converted.

    Raises WeightsError if a tensor is missing, unexpected, duplicated, of another shape or not floating-point.
    """
    for name in tensors:
        if f"transformer.{name}" in tensors:
            raise WeightsError(f"tensor {name} is there twice, with and without the prefix transformer.")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if not is_mask(name)}
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    sources = {name: checkpoint_name(name) for name in wanted}

    head = tensors.pop("lm_head.weight", None)
    for source in sources.values():
        if source not in tensors:
            raise WeightsError(f"tensor {source} is missing")
    if left_over := sorted(tensors.keys() - set(sources.values())):
        raise WeightsError(f"tensor {left_over[0]} is not part of this model ({len(left_over)} left over)")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise WeightsError(f"tensor {name} has type {tensor.dtype}, not a floating-point type")

    state = {}
    for name, shape in wanted.items():
        tensor = tensors[sources[name]]
        needed = checkpoint_shape(name, shape)
        if tensor.shape != needed:
            raise WeightsError(f"tensor {sources[name]} has shape {tuple(tensor.shape)}, the model needs {needed}")
        if tensor.ndim == 2 and is_linear(name):
            tensor = tensor.T
        if (third := THIRD_OF_C_ATTN.get(name.split(".")[-2])) is not None:
            tensor = tensor.chunk(3)[third]
        state[name] = tensor.float()
    if head is not None and not head.equal(tensors["wte.weight"]):
        raise WeightsError("tensor lm_head.weight differs from wte.weight, to which GPT-2 ties it")
    model.load_state_dict(state, strict=True, assign=True)


def gpt2_tensors(model):
    """Return the parameters of `model` as a GPT-2 checkpoint names and stores them, {name: tensor}.

    This is the inverse of `load_gpt2_weights`.
    """
    parts = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        parts.setdefault(checkpoint_name(name), []).append(tensor.T if tensor.ndim == 2 and is_linear(name) else tensor)
    return {name: torch.cat(tensors, dim=-1) for name, tensors in parts.items()}  # query, key and value side by side


def is_mask(name):
    """Return whether a checkpoint's tensor of this name is a mask buffer and not a parameter."""
    return MASK_BUFFER.fullmatch(name) is not None


def is_linear(name):
    """Return whether a parameter of this name belongs to a linear layer."""
    return name.startswith("trf_blocks.") and "norm" not in name


def checkpoint_name(name):
    """Translate a parameter's name: `trf_blocks.3.att.W_key.bias` is in `h.3.attn.c_attn.bias`."""
    if not name.startswith("trf_blocks."):
        return CHECKPOINT_NAMES[name]
    _, layer, *module, kind = name.split(".")
    return f"h.{layer}.{BLOCK_NAMES['.'.join(module)]}.{kind}"


def checkpoint_shape(name, shape):
    """Return the shape of a parameter in a checkpoint: linear weights are (in, out), `c_attn` is thrice as wide."""
    times = 3 if name.split(".")[-2] in THIRD_OF_C_ATTN else 1
    shape = (times * shape[0], *shape[1:])
    return tuple(reversed(shape)) if is_linear(name) else shape
