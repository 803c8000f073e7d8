"""Trained classifiers in the formats of transformers: a folder from which its AutoModelForSequenceClassification loads.

Nothing of transformers is needed to write it.
"""

import errno
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt_download import PRETRAINED
from previous_chapters import gpt2_tensors
from runner.data.datasets import DATASET_NAMES, SPLITS
from runner.files import UserError, replace_folder, sha256_of, sha256_of_json
from runner.wording import command_line, plain

# --- what can be exported ---


def check_experiment(experiment):
    """Raises UserError for what GPT2ForSequenceClassification cannot express: it sees the last real token only."""
    instead = "transformers classifies the last token that is not padding: use --trainable_token_pos flexible"
    if experiment.average_embeddings:
        raise UserError(f"--export cannot be combined with --average_embeddings; {instead}")
    if experiment.disable_causal_mask:
        raise UserError("--export cannot be combined with --disable_causal_mask: GPT-2 in transformers has its mask")
    position = experiment.trainable_token_pos
    if position == "first" or (position == "last" and not experiment.no_padding):
        others = " or --no_padding" if position == "last" else ""
        raise UserError(f"--export cannot be combined with --trainable_token_pos {position}; {instead}{others}")


def check_classes(n_classes, emb_dim):
    """Raises UserError for more classes than the model is wide: `fold_bias` has no solution then."""
    if n_classes > emb_dim:
        raise UserError(f"--export takes {emb_dim} classes at most, the width of the model; there are {n_classes}")


def check_folder(path):
    """Raises UserError for a path at which no export can be written, or at which there is something else than one."""
    if path == "":
        raise UserError("--export is given without the name of a folder")
    path = Path(path)
    parent = path.resolve().parent
    if not parent.is_dir():
        raise UserError(f"--export {path}: there is no folder {path.parent}")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--export {path}: nothing can be written into {parent}")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--export {path} is not a folder")
    if path.samefile(".") or os.path.ismount(path):
        raise UserError(f"--export {path} is the current folder or a mount point, which cannot be replaced")
    if not may_be_replaced(path):
        raise UserError(f"--export {path}: the folder holds something else than an unchanged export, which stays")


def may_be_replaced(folder):
    """Whether a folder is empty, or holds the files of an export and nothing else, each as it was written."""
    entries = list(Path(folder).iterdir())
    if not entries:
        return True
    if any(entry.is_symlink() or not entry.is_file() for entry in entries):
        return False
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        written = config.pop("exported_by")["sha256"]
        found = {entry.name: sha256_of(entry) for entry in entries if entry.name != "config.json"}
        return found | {"config.json": sha256_of_json(config)} == written
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_moved(folder):
    """`may_be_replaced` once more, for `replace_folder`: training may have taken hours. Raises OSError."""
    if not may_be_replaced(folder):
        raise OSError(errno.ENOTEMPTY, "the folder holds something else than an unchanged export, which stays")


# --- the files ---


def write_export(path, classifier, tokenizer, limit, class_names, card):
    """Write a Classifier without LoRA, on the CPU in float32, as a folder; whole or not at all. Raises OSError.

    `limit` is the number of tokens to which messages are cut, `card` the text of the model card.
    """
    cfg = classifier.gpt.cfg
    tensors = {f"transformer.{name}": tensor for name, tensor in gpt2_tensors(classifier.gpt).items()}
    head = classifier.out_head
    tensors["score.weight"] = head.weight.detach()
    tensors["transformer.ln_f.bias"] = fold_bias(tensors["transformer.ln_f.bias"], head.weight.detach(), head.bias)
    labels = {str(number): str(name) for number, name in enumerate(class_names)}
    config = dict(
        architectures=["GPT2ForSequenceClassification"],
        model_type="gpt2",
        vocab_size=cfg.vocab_size,
        n_positions=cfg.context_length,
        n_embd=cfg.emb_dim,
        n_layer=cfg.n_layers,
        n_head=cfg.n_heads,
        activation_function="gelu_new",
        layer_norm_epsilon=classifier.gpt.final_norm.eps,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.eot_token,
        eos_token_id=tokenizer.eot_token,
        pad_token_id=tokenizer.eot_token,
        num_labels=len(labels),
        id2label=labels,
        label2id={name: int(number) for number, name in labels.items()},
        problem_type="single_label_classification",
        dtype="float32",
        use_cache=False,
    )
    end = tokenizer.decode([tokenizer.eot_token])
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=limit,
        padding_side="right",
        truncation_side="right",
        pad_token=end,
        eos_token=end,
        split_special_tokens=True,  # in a message it is text like any other
        clean_up_tokenization_spaces=False,
    )
    with replace_folder(path, check_moved) as folder:
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        write_json(folder / "tokenizer.json", tokenizer_json(tokenizer, limit))
        (folder / "README.md").write_text(card, encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, folder / "model.safetensors", dict(format="pt"))
        except SafetensorError as error:  # raised for a full disk and the like
            raise OSError(str(error)) from error
        # By these the next export knows the folder; transformers keeps the entry, and whatever it writes has others.
        sha256 = {file.name: sha256_of(file) for file in folder.iterdir()} | {"config.json": sha256_of_json(config)}
        exported_by = dict(program="additional_experiments.py", sha256=sha256)
        write_json(folder / "config.json", config | dict(exported_by=exported_by))


# --- the model card ---

LICENCE = "OpenAI has published GPT-2's weights under a [modified MIT License](https://github.com/openai/gpt-2)"


def model_card(path, settings, defaults, weights, limit, class_names, record):
    """The text of README.md: what the classifier is, how to load it, how it was trained, what it got right.

    `settings` are the Experiment's by name, `weights` a gpt_download.Weights, `record` the run's Record or None.
    """
    size = settings["model_size"]
    changed = {name: value for name, value in settings.items() if value != defaults[name]}
    if weights.is_published:
        base = f"those of {PRETRAINED[size].repo_id} (SHA-256 `{weights.sha256}`). {LICENCE}."
    elif weights.is_random:
        base = f"random ones, drawn with seed {settings['seed']}: there is no licence but your own."
    else:
        base = f"a file with SHA-256 `{weights.sha256}`, whose licence holds for this classifier too."
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        *(["license: mit"] if weights.is_published else []),
        "---",
        "",
        f"# {size} as a classifier: {', '.join(plain(name) for name in class_names)}",
        "",
        "GPT-2 with a head at the last token of a message. Load it with transformers alone:",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f"classify = pipeline('text-classification', model={json.dumps(Path(path).resolve().name)}, truncation=True)",
        "print(classify(['You have won, call now', 'See you at eight']))",
        "```",
        "",
        f"Messages are cut to {limit} tokens (`truncation=True`) and padded on the right. The head's bias is in the",
        "shift of the final norm, where it gives the same logits.",
        "",
        "## Training",
        "",
        f"- `{' '.join(['python additional_experiments.py', command_line(changed)]).strip()}`",
        f"- Base weights: {base}",
    ]
    if record is None:
        lines.append("- Accuracies, data and versions were not recorded by the version that saved this classifier.")
        return "\n".join(lines) + "\n"
    row = f"row {record.row} of the table of additional_experiments.py" if record.row else record.configuration
    lines += [
        f"- Configuration: {plain(row)}; {record.minutes:.2f} minutes on {record.device_name}, {record.date}",
        f"- Data: {DATASET_NAMES[record.data].split(' (')[0]}, SHA-256 of labels and texts `{record.data_sha256}`"
        + ("" if record.data == "own" else " (Almeida & Gómez Hidalgo, DOI 10.24432/C5CC84, CC BY 4.0)"),
        f"- Versions: Python {record.python}, PyTorch {record.torch}, tiktoken {record.tiktoken}",
        "",
        "## Results",
        "",
        "| messages | accuracy |",
        "| --- | --- |",
        *(f"| {title} | {getattr(record, split).in_full} |" for split, title in SPLITS.items()),
    ]
    if record.confusions is not None:
        lines += ["", "Test:", "", "```", *record.confusions["test"].describe(class_names), "```"]
    return "\n".join(lines) + "\n"


# --- tensors and tokens ---


def write_json(path, content):
    """Write what JSON can hold."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def fold_bias(shift, weight, bias):
    """The final norm's shift (D,) with which a head of `weight` (K, D) needs no bias (K,) any more.

    The logits are W (g x + b) + c, and with b' = b + W^T (W W^T)^-1 c they are W (g x + b').
    """
    W, c = weight.double(), bias.detach().double()
    return (shift.double() + W.T @ torch.linalg.solve(W @ W.T, c)).float()


def tokenizer_json(tokenizer, limit):
    """A tiktoken.Encoding as the JSON of the tokenizers library; texts are cut to `limit` tokens."""
    letters = letters_of_bytes()
    tokens = {tokenizer.decode_single_token_bytes(number): number for number in range(tokenizer.eot_token)}
    names = {token: "".join(letters[byte] for byte in token) for token in tokens}
    merges = [[names[part] for part in parts_of(token, tokens)] for token in tokens if len(token) > 1]
    end = tokenizer.decode([tokenizer.eot_token])
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(
        version="1.0",
        truncation=dict(direction="Right", max_length=limit, strategy="LongestFirst", stride=0),
        padding=None,
        added_tokens=[dict(id=tokenizer.eot_token, content=end) | flags],
        normalizer=None,
        pre_tokenizer=byte_level,
        post_processor=None,
        decoder=byte_level,
        model=dict(
            type="BPE",
            vocab={name: tokens[token] for token, name in names.items()} | {end: tokenizer.eot_token},
            merges=merges,
        ),
    )


def letters_of_bytes():
    """The letter that stands for each byte in the names of tokens: its own if printable, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def parts_of(token, ranks):
    """The two tokens that are merged into `token` (bytes): what is left when all merges of a lower rank are made."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        _, i = min(candidate for candidate in candidates if candidate[0] < ranks[token])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
