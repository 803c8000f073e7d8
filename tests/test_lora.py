"""LoRA against peft's own, what it wraps, and which parameters each setting trains.

B starts at zero, which hides A and the factor; where these matter, B is random. peft divides its factor by the
rank and this project does not, hence lora_alpha = alpha x rank.
"""

import copy

import pytest
import torch
from helpers import CPU, assert_equal_to_rounding, train_quietly
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2Model

from additional_experiments import Experiment
from classifier import LinearWithLoRA, LinearWithMergedLoRA, build_classifier, place
from runner.data.datasets import SPLITS
from runner.data.messages import Batch, EncodedData, MessagePool, Split, Stage

RANK, ALPHA, CLASSES = 3, 2.5, 4
NANO = dict(model_size="gpt2-nano (7M)", weights="random", lora_rank=RANK, lora_alpha=ALPHA)
D, LAYERS = 128, 4  # of nano
KINDS = {"lora": LinearWithLoRA, "lora_alternative": LinearWithMergedLoRA}

LINEAR_LAYERS = ("att.W_query", "att.W_key", "att.W_value", "att.out_proj", "ff.0", "ff.2")  # of a block
ALL_LINEAR_LAYERS = [f"gpt.trf_blocks.{n}.{name}" for n in range(LAYERS) for name in LINEAR_LAYERS] + ["out_head"]


def both(module):
    return [f"{module}.weight", f"{module}.bias"]


def of_block(number):
    return [name for part in (*LINEAR_LAYERS, "norm1", "norm2") for name in both(f"gpt.trf_blocks.{number}.{part}")]


LORA = [f"{layer}.{matrix}" for layer in ALL_LINEAR_LAYERS for matrix in "AB"] + both("out_head.linear")
LAST_BLOCK = of_block(3) + both("gpt.final_norm") + both("out_head")
TRAINED = {
    "last_layer": both("out_head"),
    "last_block": LAST_BLOCK,
    "last_two_blocks": of_block(2) + LAST_BLOCK,
    "all": ["gpt.tok_emb.weight", "gpt.pos_emb.weight", *of_block(0), *of_block(1), *of_block(2), *LAST_BLOCK],
    "lora": LORA,
    "lora_alternative": LORA,
}


def build(trainable_layers, **others):
    return build_classifier(Experiment(trainable_layers=trainable_layers, **NANO, **others), CLASSES)


def randomize_B(module, std=0.1):
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, LinearWithLoRA):
            nn.init.normal_(part.B, std=std)


# --- one layer ---


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 5)])
def test_layer_gives_outputs_and_gradients_of_peft(kind, bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(5, 7, bias)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA * RANK, lora_dropout=0.0, target_modules=["0"])
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(linear)), settings).double()
    their_layer = theirs.base_model.model[0]
    ours = kind(linear, RANK, ALPHA).double()
    randomize_B(ours)
    their_A, their_B = their_layer.lora_A["default"].weight, their_layer.lora_B["default"].weight
    their_A.data, their_B.data = ours.A.data.T.clone(), ours.B.data.T.clone()  # peft keeps (out, in)

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    our_output, their_output = ours(x), theirs(x)
    assert (our_output - linear(x)).abs().max() > 0.1
    assert_equal_to_rounding(our_output, their_output)

    our_gradients = torch.autograd.grad(our_output, (x, ours.A, ours.B), upstream)
    of_x, of_A, of_B = torch.autograd.grad(their_output, (x, their_A, their_B), upstream)
    for our_gradient, their_gradient in zip(our_gradients, (of_x, of_A.T, of_B.T), strict=True):
        assert their_gradient.abs().max() > 0.1
        assert_equal_to_rounding(our_gradient, their_gradient)


# --- the whole classifier ---


def batch():
    """Three messages of unequal lengths."""
    torch.manual_seed(2)
    lengths = torch.tensor([6, 2, 4])
    key_mask = (torch.arange(6) < lengths[:, None])[:, None, None]
    return Batch(Stage.TOKEN_IDS, torch.randint(50257, (3, 6)), lengths - 1, key_mask)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_classifier_with_lora_is_the_bare_one_with_other_weights(name):
    classifier, bare = build(name).double(), build("last_layer").double()
    assert {type(part) for part in classifier.modules() if isinstance(part, LinearWithLoRA)} == {KINDS[name]}
    assert classifier(batch()).equal(bare(batch()))

    randomize_B(classifier)
    for layer in ALL_LINEAR_LAYERS:
        part = classifier.get_submodule(layer)
        bare.get_submodule(layer).weight += ALPHA * (part.A @ part.B).T
    assert_equal_to_rounding(classifier(batch()), bare(batch()))


@torch.no_grad()
def test_with_bf16_the_first_steps_of_merged_lora_are_not_lost():
    """They are smaller than the distance between two bfloat16 numbers of the size of the weights."""
    classifier = build("lora_alternative", precision="bf16")
    for part in classifier.gpt.modules():
        if isinstance(part, LinearWithLoRA):  # as large as pretrained weights
            part.linear.weight.copy_(0.1 * part.linear.weight.sign() + part.linear.weight / 4)
    before = place(classifier, CPU)(batch())
    randomize_B(classifier.gpt, std=1e-5)
    assert not classifier(batch()).equal(before)


# --- what is trained ---


def changed(classifier, before):
    return {name for name, parameter in classifier.named_parameters() if not parameter.equal(before[name])}


@pytest.mark.parametrize("trainable_layers", TRAINED)
@pytest.mark.parametrize("from_file", [False, True], ids=["random", "from file"])
def test_one_step_changes_what_is_trained_and_nothing_else(trainable_layers, from_file):
    tensors = {}
    if from_file:  # the model views these tensors, which with a real file are the file itself
        torch.manual_seed(0)
        tensors = GPT2Model(GPT2Config(n_embd=D, n_layer=LAYERS, n_head=4)).state_dict()
    tensors_before = {name: tensor.clone() for name, tensor in tensors.items()}
    # Weight decay would also change what gets no gradient.
    experiment = Experiment(trainable_layers=trainable_layers, **NANO, num_epochs=1, weight_decay=0.0)
    classifier = place(build_classifier(experiment, CLASSES, tensors or None), CPU)
    before = {name: parameter.detach().clone() for name, parameter in classifier.named_parameters()}
    trained = set(TRAINED[trainable_layers])
    assert {name for name, parameter in classifier.named_parameters() if parameter.requires_grad} == trained
    lengths, labels = torch.arange(8) % 5 + 2, torch.arange(8) % CLASSES
    pool = MessagePool(Stage.TOKEN_IDS, torch.randint(50257, (int(lengths.sum()),)), lengths, lengths - 1)
    data = EncodedData(pool, dict.fromkeys(SPLITS, Split(torch.arange(8), labels)), limit=6, longest=6)  # one batch
    maybe = {name for name in trained if name.endswith("W_key.bias")}  # its gradient is zero but for rounding

    train_quietly(classifier, data, experiment)
    # The gradient of A has B as a factor, which is zero until the first step is done.
    assert changed(classifier, before) - maybe == {name for name in trained - maybe if not name.endswith(".A")}
    train_quietly(classifier, data, experiment)
    assert changed(classifier, before) - maybe == trained - maybe
    assert [name for name in tensors if not tensors[name].equal(tensors_before[name])] == []
