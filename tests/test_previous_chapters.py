"""The model against transformers' own on the same weights, its loading and its shortcuts.

Equality to rounding is asserted in float64. All parameters are random, those of the norms and the biases too: at
their usual start of one and zero nothing would be seen of a mistake in them.
"""

import re

import pytest
import torch
from helpers import assert_equal_to_rounding
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from previous_chapters import GPT_SIZES, GPTConfig, GPTModel, TransformerBlock, WeightsError, load_gpt2_weights
from runner.files import read_safetensors

D, LAYERS, HEADS, VOCAB, CONTEXT = 24, 3, 4, 61, 16
TOKEN_IDS = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(1))  # (B, T)
LENGTHS = torch.tensor([9, 4, 1, 6])  # (B,)
KEY_MASK = (torch.arange(9) < LENGTHS[:, None])[:, None, None]  # (B, 1, 1, T)


def config(**others):
    return GPTConfig(D, LAYERS, HEADS, VOCAB, CONTEXT, **others)


def randomize(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def transformers_gpt2(kind=GPT2Model):
    sizes = dict(n_embd=D, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCAB, n_positions=CONTEXT)
    # eager: attention written out, and a mask that is handed over is added as it is
    settings = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, attn_implementation="eager")
    return randomize(kind(settings)).eval()


def loaded(tensors, device="cpu", **others):
    with torch.device(device):
        model = GPTModel(config(**others))
    load_gpt2_weights(model, tensors)
    return model


@torch.no_grad()
def hidden_states(model, token_ids=TOKEN_IDS, causal=True):
    """(B, T, D) in float64. To transformers a 4-d mask is the whole truth: no causal mask comes on top of it."""
    if isinstance(model, GPTModel):
        return model.double()(token_ids)
    n_tokens = token_ids.shape[1]
    mask = None if causal else torch.zeros(len(token_ids), 1, n_tokens, n_tokens, dtype=torch.float64)
    return model.double().base_model(token_ids, attention_mask=mask).last_hidden_state


# --- hidden states ---


@pytest.mark.parametrize("n_tokens", [1, 7, CONTEXT])
def test_hidden_states_with_and_without_causal_mask(n_tokens):
    theirs = transformers_gpt2()
    token_ids = torch.randint(VOCAB, (3, n_tokens))
    ours = {causal: hidden_states(loaded(theirs.state_dict(), causal=causal), token_ids) for causal in (True, False)}

    assert_equal_to_rounding(ours[True], hidden_states(theirs, token_ids))
    assert_equal_to_rounding(ours[False], hidden_states(theirs, token_ids, causal=False))
    differences = (ours[True] - ours[False]).abs().amax(dim=2)  # (B, T)
    assert (differences > 1e-3).all() if n_tokens > 1 else (differences < 1e-12).all()


# --- loading ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, prefix", [(GPT2Model, ""), (GPT2LMHeadModel, "transformer.")])
def test_file_written_by_transformers(kind, prefix, dtype, tmp_path):
    """Older files also hold mask buffers, and the head that is tied to the embeddings."""
    theirs = transformers_gpt2(kind).to(dtype)
    theirs.save_pretrained(tmp_path)
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    head = tensors[f"{prefix}wte.weight"]
    skipped = {"lm_head.weight": head.clone()}
    for layer in range(LAYERS):
        mask = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
        skipped[f"{prefix}h.{layer}.attn.bias"] = mask.to(torch.uint8 if layer else torch.bool)
        skipped[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    expected = hidden_states(theirs)
    for further in ({}, skipped):
        ours = loaded(tensors | further)
        assert head.dtype == dtype and {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
        assert_equal_to_rounding(hidden_states(ours), expected)

    one_number_differs = head.clone()
    one_number_differs[-1, -1] += 1
    for other_head in (one_number_differs, head[:-1]):
        with pytest.raises(WeightsError, match=r"^tensor lm_head\.weight differs from wte\.weight"):
            loaded(tensors | {"lm_head.weight": other_head})


def refused(name, why):
    return pytest.raises(WeightsError, match=rf"^tensor {re.escape(name)} .*{why}")


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda tensor: tensor[:-1], "has shape"),
        (lambda tensor: tensor[None], "has shape"),
        (lambda tensor: tensor.long(), "has type torch.int64"),
        (lambda tensor: None, "is missing"),
    ],
)
def test_damaged_or_missing_tensor_is_refused_by_name(damage, why):
    tensors = transformers_gpt2().state_dict()
    for name in tensors:
        damaged = tensors | {name: damage(tensors[name])}
        with refused(name, why):
            loaded({name: tensor for name, tensor in damaged.items() if tensor is not None}, "meta")


@pytest.mark.parametrize(
    "name",
    ["score.weight", "h.3.ln_1.weight", "h.0.attn.q_attn.weight", "h.0.mlp.bias", "h.0.attn.bias.1", "xh.0.attn.bias"],
)
def test_left_over_tensor_is_refused_by_name(name):
    tensors = transformers_gpt2().state_dict()
    for prefix in ("", "transformer."):
        with refused(name, "is not part of this model"):
            loaded(tensors | {prefix + name: torch.ones(D)}, "meta")
    with refused("wte.weight", "is there twice"):
        loaded(tensors | {"transformer.wte.weight": tensors["wte.weight"] + 1}, "meta")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_float32_is_viewed_not_copied(device):
    theirs = transformers_gpt2()
    tensors = theirs.state_dict()
    ours = loaded(tensors, device)

    assert ours.tok_emb.weight.data_ptr() == tensors["wte.weight"].data_ptr()
    keys_start = tensors["h.1.attn.c_attn.weight"][:, D:].data_ptr()
    assert ours.trf_blocks[1].att.W_key.weight.data_ptr() == keys_start
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()} == storages
    assert_equal_to_rounding(hidden_states(ours), hidden_states(theirs))  # last, since it converts to float64


def test_parameter_counts():
    """As they are published."""
    with torch.device("meta"):
        models = {name: GPTModel(GPTConfig(**sizes)) for name, sizes in GPT_SIZES.items()}
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == {
        "gpt2-small (124M)": 124_439_808,
        "gpt2-medium (355M)": 354_823_168,
        "gpt2-large (774M)": 774_030_080,
        "gpt2-xl (1558M)": 1_557_611_200,
        "gpt2-nano (7M)": 7_357_312,  # (50257 + 1024) D + 4 (12 D^2 + 13 D) + 2 D, D = 128
    }


# --- shortcuts in a block ---


def block_and_input(causal):
    block = randomize(TransformerBlock(config(causal=causal))).double()
    x = torch.randn(4, 9, D, dtype=torch.float64) + 0.5  # (B, T, D); a mean of zero would leave nothing to subtract
    return block, x


LAST, ANY = [8, 3, 0, 5], [2, 3, 0, 1]  # (B,) positions: the last that KEY_MASK shows, and any of those


@pytest.mark.parametrize(
    "causal, key_mask, positions",
    [(True, None, [8, 8, 8, 8]), (True, KEY_MASK, LAST), (False, None, [8, 0, 3, 5]), (False, KEY_MASK, ANY)],
)
def test_one_query_gives_that_position_of_the_whole_block(causal, key_mask, positions):
    """From the input, and from its kept parts, which give the gradients too."""
    block, x = block_and_input(causal)
    outputs = block(x, key_mask, torch.tensor(positions))
    assert_equal_to_rounding(outputs, block(x, key_mask)[range(4), positions].unsqueeze(1))
    residual = x[range(4), positions].unsqueeze(1)  # (B, 1, D)
    from_kept = block.forward_normalized(residual, block.standardize(x), key_mask)
    assert_equal_to_rounding(from_kept, outputs)

    names, parameters = zip(*block.named_parameters())
    upstream = torch.randn_like(outputs)
    gradients = dict(zip(names, torch.autograd.grad(outputs, parameters, upstream)))
    gradients_from_kept = dict(zip(names, torch.autograd.grad(from_kept, parameters, upstream, allow_unused=True)))
    of_key_bias = gradients.pop("att.W_key.bias")  # the same for every key, so that it cancels in the softmax
    assert_close(of_key_bias, torch.zeros_like(of_key_bias), rtol=0, atol=1e-12)
    assert gradients_from_kept.pop("att.W_key.bias") is None
    assert [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-3] == []
    for name, gradient in gradients.items():
        assert_equal_to_rounding(gradients_from_kept[name], gradient)


@pytest.mark.parametrize("causal", [True, False])
def test_fused_weights_change_no_output_and_are_kept_once(causal):
    block, x = block_and_input(causal)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    everywhere, one = block(x, KEY_MASK), block(x, KEY_MASK, torch.tensor(LAST))
    block.att.fuse()
    assert_equal_to_rounding(block(x, KEY_MASK), everywhere)
    assert_equal_to_rounding(block(x, KEY_MASK, torch.tensor(LAST)), one)
    assert_close({name: parameter.detach() for name, parameter in block.named_parameters()}, before, rtol=0, atol=0)
    parts = (block.att.W_query, block.att.W_key, block.att.W_value)
    assert len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1
