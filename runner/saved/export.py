"""Trained classifiers exported to a folder from which transformers' AutoModelForSequenceClassification loads."""

import os
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from gpt_download import PRETRAINED, VOCABULARY, is_published
from previous_chapters import gpt2_tensors
from runner.data.datasets import DATASET_NAMES
from runner.files import UserError


def check_experiment(experiment):
    """Raise UserError for settings that GPT2ForSequenceClassification cannot express."""
    position = experiment.trainable_token_pos
    sees_last_real_token = position == "flexible" or (position == "last" and experiment.no_padding)
    if experiment.average_embeddings or experiment.disable_causal_mask or not sees_last_real_token:
        raise UserError(
            "--export needs --trainable_token_pos flexible or --no_padding, and neither --average_embeddings nor "
            "--disable_causal_mask: transformers classifies the last token that is not padding, under the causal mask"
        )


def check_class_count(path, n_classes, emb_dim):
    """Raise UserError for an export to `path` of more classes than a head without a bias can express: `make_model`."""
    if path is not None and n_classes > emb_dim:
        raise UserError(f"--export takes {emb_dim} classes at most, the width of the model; there are {n_classes}")


def check_folder(path):
    """Raise UserError if transformers is not installed, or if `path` is not a new or empty folder."""
    versions = [found.version for found in metadata.distributions(name="transformers")]
    if not versions or int(versions[0].split(".")[0]) < 5:
        raise UserError('--export needs transformers 5 or later: pip install "transformers>=5"')
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f"--export {path} is not a new or empty folder")


def write_export(path, classifier, saved):
    """Write a Classifier on the CPU and its SavedClassifier to a new or empty folder, whole or not at all.

    LoRA is merged into the weights of the Classifier. Raises OSError or SafetensorError, which leave an empty folder.
    """
    import transformers  # imported here, because this takes seconds

    transformers.utils.logging.disable_progress_bar()
    classifier.merge_lora()
    path = Path(path)
    path.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as temporary:
        make_tokenizer(saved.limit).save_pretrained(temporary)
        make_model(classifier, saved.class_names).save_pretrained(temporary)
        card = Path(temporary, "README.md")
        card.write_text(model_card(path, saved), encoding="utf-8")
        mode = card.stat().st_mode  # safetensors makes files that only their owner can read
        # config.json comes last: transformers loads nothing from a folder without it.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "config.json"):
            file.chmod(mode)
            file.rename(path / file.name)


def make_model(classifier, class_names):
    """Return a Classifier as a GPT2ForSequenceClassification, which shares its tensors.

    The head of that class has no bias, so the final norm takes it over. With the weight W (K, D) and bias c (K,) of the
    head and the shift b (D,) of the norm, the logits are W (g x + b) + c = W (g x + b'), b' = b + W^T (W W^T)^-1 c.
    For more classes than dimensions, which `check_class_count` refuses, no such b' exists.
    """
    from transformers import GPT2Config, GPT2ForSequenceClassification

    cfg, head = classifier.gpt.cfg, classifier.out_head
    sizes = dict(n_positions=cfg.context_length, n_embd=cfg.emb_dim, n_layer=cfg.n_layers, n_head=cfg.n_heads)
    labels = dict(id2label=dict(enumerate(class_names)), label2id={name: n for n, name in enumerate(class_names)})
    config = GPT2Config(vocab_size=cfg.vocab_size, pad_token_id=50256, **sizes, **labels)
    with torch.device("meta"):
        model = GPT2ForSequenceClassification(config)
    tensors = {f"transformer.{name}": tensor.contiguous() for name, tensor in gpt2_tensors(classifier.gpt).items()}
    W, b, c = (tensor.detach().double() for tensor in (head.weight, tensors["transformer.ln_f.bias"], head.bias))
    tensors["transformer.ln_f.bias"] = (b + W.T @ torch.linalg.solve(W @ W.T, c)).float()
    tensors["score.weight"] = head.weight.detach()
    model.load_state_dict(tensors, assign=True)
    return model


def make_tokenizer(limit):
    """Return GPT-2's byte-pair encoding as a tokenizer of transformers whose truncation length is `limit`."""
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(VOCABULARY))
    end = "<|endoftext|>"
    return GPT2Tokenizer(
        vocab=vocabulary | {end: len(vocabulary)},
        merges=merges,
        pad_token=end,
        model_max_length=limit,
        padding_side="right",
        split_special_tokens=True,  # in a message a special token is text like any other
    )


CARD = """\
# {size} as a classifier

```python
from transformers import pipeline

classify = pipeline("text-classification", model={name!r}, truncation=True)
print(classify(["You have won, call now", "See you at eight"]))
```

Messages are cut to {limit} tokens (`truncation=True`) and padded on the right.

- Trained by `python additional_experiments.py {command}`
- Base weights: {base}
- Data: {data}

```
{results}
```
"""


def model_card(path, saved):
    """Return the text of README.md: how to load the classifier, how it was trained, its accuracies."""
    size, base = saved.settings["model_size"], saved.settings["weights"]
    if is_published(size, saved.base_sha256):
        base = f"{PRETRAINED[size].repo_id}, under OpenAI's MIT License"
    citation = "" if saved.data == "own" else " (Almeida & Gómez Hidalgo, DOI 10.24432/C5CC84, CC BY 4.0)"
    return CARD.format(
        size=size,
        name=path.resolve().name,
        limit=saved.limit,
        command=saved.command,
        base=base,
        data=DATASET_NAMES[saved.data].split(" (")[0] + citation,
        results="\n".join(saved.results),
    )
