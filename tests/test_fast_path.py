"""What is computed only once, or only for what the loss can see, gives what the plain path gives."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pandas as pd
import plain
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, encoded, train_quietly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import additional_experiments as ae
from additional_experiments import PAD_TOKEN, Experiment
from classifier import build_classifier, place
from runner.data import features

LAYERS = ["last_block", "last_layer", "last_two_blocks", "all", "lora", "lora_alternative"]
TINY = {"tiny-1": (12, 3, 2), "tiny-2": (8, 2, 1), "tiny-3": (16, 5, 8)}  # width, layers, heads


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Sizes at which float64 gradients of whole models cost milliseconds, and short passes over frozen features."""
    monkeypatch.setattr(ae, "MESSAGES_PER_PASS", 4)
    for name, (emb_dim, n_layers, n_heads) in TINY.items():
        monkeypatch.setitem(ae.GPT_SIZES, name, dict(emb_dim=emb_dim, n_layers=n_layers, n_heads=n_heads))


def encode(experiment, **splits):
    """Return the EncodedData of splits, lists of token ids, in which message i of a split has label i % 3."""
    labels = {name: [i % 3 for i in range(len(tokens))] for name, tokens in splits.items()}
    frames = {name: pd.DataFrame(dict(Label=labels[name], Text=tokens)) for name, tokens in splits.items()}
    return ae.encode(SimpleNamespace(encode_ordinary=list), frames, experiment)


@st.composite
def experiments(draw):
    position = draw(st.sampled_from(["last", "first", "flexible"]))
    return Experiment(
        model_size=draw(st.sampled_from(sorted(TINY))),
        weights="random",
        trainable_layers=draw(st.sampled_from(LAYERS)),
        lora_rank=draw(st.integers(1, 4)),
        lora_alpha=draw(st.sampled_from([0.5, 8.0])),
        trainable_token_pos=position,
        average_embeddings=draw(st.booleans()) and position != "first",
        context_length=draw(st.sampled_from(["longest_training_example", 1, 5, 20])),
        no_padding=draw(st.booleans()),
        disable_causal_mask=draw(st.booleans()),
        activation_checkpointing=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        batch_size=1,
        accumulation_steps=8,
    )


token_lists = st.lists(st.lists(st.integers(0, 9999), min_size=1, max_size=12), min_size=2, max_size=7)


def prepared(experiment):
    """Return a float64 Classifier with three classes; norms and LoRA's B are moved away from their ones and zeros."""
    classifier = build_classifier(experiment, n_classes=3).double()
    for name, parameter in classifier.named_parameters():
        if name.endswith(".B") or "norm" in name:
            parameter.data += torch.randn_like(parameter)
    return classifier


def gradients(classifier, backward):
    classifier.zero_grad()
    backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in classifier.named_parameters()
    }


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(experiment=experiments(), tokens=token_lists, order=st.randoms(use_true_random=False), kept=st.booleans())
def test_logits_loss_and_gradients_equal_the_plain_path(experiment, tokens, order, kept):
    """In a window of one batch instead of eight, in which messages may be there twice, with different labels."""
    tokens = tokens + tokens[:2]
    classifier, data = prepared(experiment), encode(experiment, train=tokens)
    batch = torch.tensor(order.sample(range(len(tokens)), order.randint(1, len(tokens))))
    labels, indices = batch % 3, data.splits["train"].indices[batch]

    expected = plain.logits(classifier, experiment, [tokens[i] for i in batch], data.limit)
    expected_gradients = gradients(classifier, F.cross_entropy(expected, labels).backward)

    place(classifier, CPU)
    if kept and classifier.n_frozen_blocks:
        data = replace(data, pool=features.compute_features(classifier, data.pool, CPU))
    logits = classifier(data.pool.batch(indices, CPU))
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ae.predict(classifier, data.pool, indices), expected, rtol=1e-9, atol=1e-9)

    loss = ae.mean_loss(ae.Predictions(logits.detach(), labels, [len(batch)], batch), experiment.ignore_index)
    assert loss == pytest.approx(F.cross_entropy(expected, labels).item(), abs=1e-9)
    found = gradients(classifier, lambda: ae.accumulate_gradients(classifier, data, [batch], experiment))
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-9, msg=lambda text: f"{name}: {text}")


# --- the pool of distinct messages ---


def message_of(data, name, index):
    """Return the tokens and the position of a message of a split."""
    batch = data.pool.batch(data.splits[name].indices[[index]], CPU)
    return batch.x[0].tolist(), batch.positions.item()


def test_a_pool_holds_each_message_once_and_splits_keep_their_order_and_labels():
    """Messages are the same if their tokens and positions are."""
    splits = dict(train=[[5, 6], [7], [5, 6], [5, 6, 8]], test=[[7], [9], [5, PAD_TOKEN], [5], [5, 6]])
    flexible = dict(disable_causal_mask=True, trainable_token_pos="flexible")
    data = encode(Experiment(model_size="tiny-1", weights="random", **flexible), **splits)
    for name, messages in splits.items():
        padded = [(message + [PAD_TOKEN] * (3 - len(message)), len(message) - 1) for message in messages]
        assert [message_of(data, name, index) for index in range(len(messages))] == padded
        assert data.splits[name].labels.tolist() == [index % 3 for index in range(len(messages))]
    assert len(data.pool) == 6


@pytest.mark.parametrize(
    "settings, lengths, limit, cut",
    [
        (dict(), (1100, 1100), 1024, (1024, 1024)),
        (dict(), (6, 1100), 6, (6, 6)),
        (dict(context_length=7), (1100, 3), 7, (7, 7)),
        (dict(context_length="model_context_length"), (6, 3), 1024, (1024, 1024)),
        (dict(no_padding=True), (6, 1100), 1024, (6, 1024)),  # not to the longest training message, as in the original
        (dict(no_padding=True, context_length=50), (60, 3), 50, (50, 3)),
    ],
)
def test_messages_are_cut_and_padded(settings, lengths, limit, cut):
    """Two messages of these lengths, one for training and one for the test."""
    experiment = Experiment(model_size="tiny-2", weights="random", **settings)
    data = encode(experiment, train=[[1] * lengths[0]], test=[[1] * lengths[1]])
    assert tuple(len(message_of(data, name, 0)[0]) for name in data.splits) == cut
    assert (data.limit, data.longest) == (limit, max(cut))


def repeat_messages(data_dir):
    """Have each file hold its first eight messages twice, and those of another file as well."""
    first = {name: pd.read_csv(data_dir / f"{name}.csv").head(8) for name in ("train", "validation", "test")}
    for name, frame in first.items():
        pd.concat([frame, first["train"], frame]).to_csv(data_dir / f"{name}.csv", index=None)


def test_each_distinct_message_is_computed_once(nano, data_dir, seen):
    """By frozen blocks in a whole run, and by all blocks in an evaluation."""
    repeat_messages(data_dir)
    changes = dict(model_size="tiny-3", num_epochs=3)
    ae.run(replace(ae.parse_args(nano)[0], **changes), ae.RunOptions(quiet=True, feature_cache=""))
    assert list(seen.values())[:4] == [24] * 4
    seen.clear()
    experiment = ae.parse_args([*nano, "--trainable_layers", "all"])[0]
    data, classifier = encoded(experiment), build_classifier(experiment, 2)
    loader = ae.make_loaders(data.splits, batch_size=8)["test"]
    logits = ae.predict_batches(classifier, data, "test", loader).logits
    assert list(seen.values()) == [16] * 4
    assert logits[:8].equal(logits[16:]) and len(logits[:16].unique(dim=0)) == 16


# --- memory ---


def kept_for_backward(classifier, batch):
    """Return the bytes of the tensors that a forward pass keeps, without the parameters."""
    parameters, kept = {parameter.data_ptr() for parameter in classifier.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        classifier(batch)
    return sum(size for address, size in kept.items() if address not in parameters)


def test_activation_checkpointing_keeps_the_input_of_a_block_only(nano):
    experiment = replace(ae.parse_args(nano)[0], trainable_layers="all", trainable_token_pos="flexible")
    batch = encoded(experiment).pool.batch(torch.arange(8), CPU)
    whole = kept_for_backward(build_classifier(experiment, 2), batch)
    kept = kept_for_backward(build_classifier(replace(experiment, activation_checkpointing=True), 2), batch)
    inputs = 4 * batch.x.numel() * 4 * 128  # four blocks, float32, the width
    assert inputs < kept < inputs + 50_000 < whole / 5


# --- batches and windows ---


@pytest.mark.parametrize("layers", ["last_block", "all"])
def test_accumulated_batches_train_like_one_large_batch(nano, data_dir, layers):
    train = data_dir / "train.csv"
    pd.read_csv(train).head(40).to_csv(train, index=None)  # so that no batch size drops another message than the others
    experiment, trained = replace(ae.parse_args(nano)[0], model_size="tiny-1", trainable_layers=layers), []
    for batch_size, accumulation_steps in ((8, 1), (4, 2), (2, 4)):
        experiment = replace(experiment, batch_size=batch_size, accumulation_steps=accumulation_steps)
        classifier = build_classifier(experiment, 2).double()
        torch.manual_seed(1)
        train_quietly(classifier, encoded(experiment), experiment)
        trained.append(torch.cat([p.detach().flatten() for p in classifier.parameters() if p.requires_grad]))
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("layers", ["last_layer", "last_block", "lora_alternative"])
def test_bf16_is_close_and_its_trained_weights_and_head_are_float32(nano, layers):
    experiment, *_ = ae.parse_args([*nano, "--trainable_layers", layers])
    data = encoded(experiment)
    logits, found = {}, {}
    for precision in ("fp32", "bf16"):
        classifier = place(build_classifier(replace(experiment, precision=precision), 2), CPU)
        assert {p.dtype for p in classifier.parameters() if p.requires_grad} == {torch.float32}
        logits[precision] = ae.predict(classifier, data.pool, data.splits["test"].indices)
        backward = partial(ae.accumulate_gradients, classifier, data, [torch.arange(8)], experiment)
        found[precision] = torch.cat([gradient.flatten() for gradient in gradients(classifier, backward).values()])
    for fp32, bf16 in (logits.values(), found.values()):
        assert bf16.dtype == torch.float32 and 0 < (bf16 - fp32).abs().max() < 0.1 * fp32.abs().max()


def test_ignored_labels_add_nothing(nano):
    logits, labels = torch.arange(18.0).sin().view(6, 3), torch.tensor([0, 7, 2, 7, 7, 7])
    weights = ae.loss_weights(labels, [2, 2, 2], ignore_index=7)
    assert weights.tolist() == [0.5, 0, 0.5, 0, 0, 0]  # two batches of three count, with one label each
    assert ae.loss_weights(labels, [3, 3], ignore_index=7).tolist() == [0.5, 0, 0.5, 0, 0, 0]
    assert ae.loss_weights(labels[:3], [3], ignore_index=0).tolist() == [0, 0.5, 0.5]
    assert ae.loss_weights(labels[3:], [3], ignore_index=7).tolist() == [0, 0, 0]

    expected = F.cross_entropy(logits[[0, 2]], labels[[0, 2]]).item()
    assert ae.mean_loss(ae.Predictions(logits, labels, [2, 2, 2], None), ignore_index=7) == pytest.approx(expected)
    assert ae.mean_loss(ae.Predictions(logits[3:], labels[3:], [3], None), ignore_index=7) is math.nan

    experiment, *_ = ae.parse_args([*nano, "--trainable_layers", "all", "--ignore_index", "1"])
    classifier, data = build_classifier(experiment, 2), encoded(experiment)
    window = [data.splits["train"].labels.nonzero().flatten()[:8]]
    found = gradients(classifier, lambda: ae.accumulate_gradients(classifier, data, window, experiment))
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("layers, expected", [("last_block", [4, 4, 2]), ("all", [5, 5])])
def test_memory_does_not_grow_with_the_window(nano, layers, expected):
    """Over frozen features it runs in passes of a few messages, otherwise batch by batch."""
    experiment, *_ = ae.parse_args([*nano, "--trainable_layers", layers, "--batch_size", "5"])
    data, classifier, sizes = encoded(experiment), build_classifier(experiment, 2), []
    trained_part = classifier.trained_part
    classifier.trained_part = lambda batch: sizes.append(len(batch.x)) or trained_part(batch)
    ae.accumulate_gradients(classifier, data, torch.arange(10).split(5), experiment)
    assert sizes == expected
