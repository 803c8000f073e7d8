"""Trained classifiers for transformers: a folder from which its AutoModelForSequenceClassification loads."""

import os
import tempfile
from importlib import metadata
from itertools import dropwhile, takewhile
from pathlib import Path

import torch

from gpt_download import PRETRAINED, VOCABULARY
from previous_chapters import gpt2_tensors
from runner.data.datasets import DATASET_NAMES
from runner.files import UserError
from runner.wording import command_line

# --- what can be exported, and where to ---


def check_experiment(experiment):
    """Raises UserError for what GPT2ForSequenceClassification cannot express."""
    position = experiment.trainable_token_pos
    sees_last_real_token = position == "flexible" or (position == "last" and experiment.no_padding)
    if experiment.average_embeddings or experiment.disable_causal_mask or not sees_last_real_token:
        raise UserError(
            "--export needs --trainable_token_pos flexible or --no_padding, and neither --average_embeddings nor "
            "--disable_causal_mask: transformers classifies the last token that is not padding, under the causal mask"
        )


def check_folder(path):
    """Raises UserError where no export can be written: without transformers, or if `path` is not new or empty."""
    versions = [found.version for found in metadata.distributions(name="transformers")]
    if not versions or int(versions[0].split(".")[0]) < 5:
        raise UserError('--export needs transformers 5 or later: pip install "transformers>=5"')
    is_new = not os.path.lexists(path)
    if not is_new and (not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f"--export {path} is not a new or empty folder")
    where = Path(path).absolute().parent if is_new else path
    if not os.access(where, os.W_OK):
        raise UserError(f"--export {path}: nothing can be written into {where}")


# --- the files ---


def write_export(path, classifier, saved, defaults):
    """Write a Classifier without LoRA, on the CPU in float32, to a new or empty folder, whole or not at all.

    `saved` is its SavedClassifier, `defaults` the settings that the model card does not name. Raises OSError or
    SafetensorError; an empty folder is left then.
    """
    import transformers  # takes seconds, and nothing else needs it

    transformers.utils.logging.disable_progress_bar()
    path = Path(path)
    path.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as temporary:
        make_tokenizer(saved.limit).save_pretrained(temporary)
        make_model(classifier, saved.class_names).save_pretrained(temporary)
        card = Path(temporary, "README.md")
        card.write_text(model_card(path, saved, defaults), encoding="utf-8")
        mode = card.stat().st_mode  # the usual one: safetensors makes files for their owner only
        # Nothing loads from a folder without config.json, which is why it comes last.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "config.json"):
            file.chmod(mode)
            file.rename(path / file.name)


def make_model(classifier, class_names):
    """A Classifier as a GPT2ForSequenceClassification, which shares its tensors."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    cfg, names = classifier.gpt.cfg, [str(name) for name in class_names]
    config = GPT2Config(
        vocab_size=cfg.vocab_size,
        n_positions=cfg.context_length,
        n_embd=cfg.emb_dim,
        n_layer=cfg.n_layers,
        n_head=cfg.n_heads,
        pad_token_id=50256,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    with torch.device("meta"):
        model = GPT2ForSequenceClassification(config)
    tensors = {f"transformer.{name}": tensor.contiguous() for name, tensor in gpt2_tensors(classifier.gpt).items()}
    weight, bias = classifier.out_head.weight.detach(), classifier.out_head.bias.detach()
    tensors["score.weight"] = weight
    tensors["transformer.ln_f.bias"] = fold_bias(tensors["transformer.ln_f.bias"], weight, bias)
    model.load_state_dict(tensors, assign=True)
    return model


def fold_bias(shift, weight, bias):
    """The final norm's shift (D,) with which a head of `weight` (K, D) needs no bias (K,) any more.

    The logits are W (g x + b) + c, and with b' = b + W^T (W W^T)^-1 c they are W (g x + b'). Raises UserError for
    more classes than the model is wide: there is no such b' then.
    """
    n_classes, emb_dim = weight.shape
    if n_classes > emb_dim:
        raise UserError(f"--export takes {emb_dim} classes at most, the width of the model; there are {n_classes}")
    W, c = weight.double(), bias.double()
    return (shift.double() + W.T @ torch.linalg.solve(W @ W.T, c)).float()


def make_tokenizer(limit):
    """GPT-2's byte-pair encoding as a tokenizer of transformers, which cuts texts to `limit` tokens when asked to."""
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
        split_special_tokens=True,  # in a message it is text like any other
    )


# --- the model card ---

CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
{licence}---

# {size} as a classifier: {names}

GPT-2 with a head at the last token of a message. Load it with transformers alone:

```python
from transformers import pipeline

classify = pipeline("text-classification", model={name!r}, truncation=True)
print(classify(["You have won, call now", "See you at eight"]))
```

Messages are cut to {limit} tokens (`truncation=True`) and padded on the right. The head's bias is in the shift of the
final norm, where it gives the same logits.

- Trained by `python additional_experiments.py {command}`
- Base weights: {base}
- Data: {data_name}, SHA-256 of labels and texts `{data_sha256}`
- {minutes:.2f} minutes on {device_name}, {date}; Python {versions[python]}, PyTorch {versions[torch]}

```
{results}
```
"""


def model_card(path, saved, defaults):
    """The text of README.md: what the classifier is, how to load it, how it was trained, what it got right."""
    settings, record = saved.settings, saved.record
    size, base, licence = settings["model_size"], f"of SHA-256 `{saved.base_sha256}`", ""
    if settings["weights"] == "random":
        base = f"random ones, drawn with seed {settings['seed']}"
    elif size in PRETRAINED and saved.base_sha256 == PRETRAINED[size].sha256:
        base, licence = f"those of {PRETRAINED[size].repo_id}, {base}, under OpenAI's MIT License", "license: mit\n"
    citation = "" if record["data"] == "own" else " (Almeida & Gómez Hidalgo, DOI 10.24432/C5CC84, CC BY 4.0)"
    # What the run printed after training, but for the texts of messages, which are not ours to publish.
    results = dropwhile(lambda line: not line.startswith("Training completed"), record["history"]["lines"])
    results = list(takewhile(lambda line: not line.startswith("Most confident test mistakes"), results))[1:]
    fields = dict(
        size=size,
        licence=licence,
        names=", ".join(" ".join(str(name).split()) for name in saved.class_names),
        name=path.resolve().name,
        limit=saved.limit,
        command=command_line({name: value for name, value in settings.items() if value != defaults[name]}),
        base=base,
        data_name=DATASET_NAMES[record["data"]].split(" (")[0] + citation,
        results="\n".join(results),
    )
    return CARD.format(**record | fields)
