"""Draw the pictures of docs/choices.md into docs/choices/, or into another folder: `python docs/draw_choices.py [DIR]`.

The program says what they show: tokens, pads and the classified position come from `encode`, what a position sees from
the gradient of GPT-2, the weights of a mean from `Classifier.head_input`, what is trained from the model's parameters.
"""

import sys
import textwrap
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pandas as pd
import torch
from matplotlib import figure, patches
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from additional_experiments import PAD_TOKEN, Experiment, encode
from classifier import Classifier, LinearWithLoRA, build_classifier, is_frozen
from gpt_download import load_vocabulary
from previous_chapters import GPTModel, select_positions
from runner.results.pictures import BLUE, ORANGE
from runner.rows import ROWS
from runner.wording import changed_options, describe_settings

# Two messages of the sample: the one in the pictures, and one that stands for the longest training message.
MESSAGE, LONGEST = "Sounds great! Are you home now?", "Win a £1000 cash prize or a prize worth £5000"
SMALL = dict(emb_dim=8, n_layers=2, n_heads=2)

# --- what is drawn ---


def encode_message(experiment):
    """Return the token ids of MESSAGE (T), the classified position, what it sees (T,), the weights of pooling (T,)."""
    keep_unseen = replace(experiment, disable_causal_mask=True)  # `encode` drops the tokens that are not seen
    splits = {"train": pd.DataFrame(dict(Text=[MESSAGE, LONGEST], Label=0))}
    batch = encode(load_vocabulary(), splits, keep_unseen).pool.batch(torch.tensor([0]), torch.device("cpu"))
    n_tokens, position = batch.x.shape[1], int(batch.positions)
    gpt = GPTModel(replace(experiment.config, **SMALL))
    gpt.final_norm = nn.Identity()
    classifier = Classifier(gpt, nn.Linear(SMALL["emb_dim"], 2), experiment.average_embeddings)
    hidden_states = torch.eye(n_tokens).unsqueeze(0)  # the mean of unit vectors holds the weights
    if not experiment.average_embeddings:
        hidden_states = select_positions(hidden_states, batch.positions)  # as the last block does
    weights = [
        Fraction(w).limit_denominator(1024) for w in classifier.head_input(hidden_states, batch).flatten().tolist()
    ]
    return batch.x[0].tolist(), position, tokens_seen(experiment, n_tokens, position), weights


def tokens_seen(experiment, n_tokens, position):
    """Return for each token (T,) whether the last hidden state at a position depends on it: has a gradient there."""
    torch.manual_seed(123)
    gpt = GPTModel(replace(experiment.config, **SMALL)).double()
    x = gpt.embed(torch.zeros(1, n_tokens, dtype=torch.int64)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(gpt.blocks(x, 0, SMALL["n_layers"])[0, position].sum(), x)
    return (gradient[0] != 0).any(-1)


def classifier_parts(experiment):
    """Return the parts of an Experiment's Classifier, {name: module}, on the meta device: shapes without values."""
    with torch.device("meta"):
        classifier = build_classifier(experiment, n_classes=2)
    embeddings = nn.ModuleList([classifier.gpt.tok_emb, classifier.gpt.pos_emb])
    blocks = {str(number): block for number, block in enumerate(classifier.gpt.trf_blocks, 1)}
    return {"embeddings": embeddings, **blocks, "norm": classifier.gpt.final_norm, "head": classifier.out_head}


# --- how it is drawn, in pixels of a picture that is 900 wide ---

LEFT = 196  # to the right of the names of rows
TOKEN, PAD, TRAINED, FROZEN = (dict(facecolor=colour) for colour in ("#C9E2F0", "#F7ECA0", ORANGE, "#D9D9D9"))
UNUSED = dict(facecolor="white", edgecolor="0.6", linestyle=(0, (3, 2)))
CLASSIFIED = dict(facecolor="none", edgecolor=ORANGE, linewidth=3.2)
SEEN = {"classified": CLASSIFIED, "seen": TOKEN, "pad, seen": PAD, "not seen": UNUSED}
POOLED = {"counts": TOKEN, "pad, counts": PAD, "does not count": UNUSED}


@contextmanager
def canvas(path, height, styles, left=LEFT):
    """Yield the axes of a picture, y from the top down, above a legend of the `styles` of boxes, {text: style}."""
    drawn = figure.Figure(figsize=(9, height / 100), dpi=200)
    axes = drawn.add_axes((0, 0, 1, 1), xlim=(0, 900), ylim=(height, 0), frame_on=False, xticks=(), yticks=())
    yield axes
    for text, style in styles.items():
        box(axes, left, height - 31, 20, 18, style)
        write(axes, left + 28, height - 22, text)
        left += 56 + 9 * len(text)
    drawn.savefig(path)
    Image.open(path).convert("RGB").quantize(64).save(path)  # a third of the size


def write(axes, x, y, text, size=17, **style):
    axes.text(x, y, text, **dict(size=0.72 * size, color="0.15", va="center_baseline") | style)


def box(axes, x, y, width, height, style):
    axes.add_patch(patches.Rectangle((x, y), width, height, **dict(edgecolor="0.15", linewidth=0.9) | style))


def write_name(axes, x, y, experiment, width=15):
    """Write the number of an Experiment's row, if it is one, and what the report calls it."""
    options = changed_options(experiment)
    number = next((number for number, row in ROWS.items() if row.options == options), "–")
    write(axes, x, y, str(number), 19, ha="right", weight="bold")
    write(axes, x + 12, y, textwrap.fill(describe_settings(options), width), 19)


def text_and_style(token_id, is_used):
    if token_id == PAD_TOKEN:
        return "pad", PAD if is_used else UNUSED
    return load_vocabulary().decode([token_id]).strip(), TOKEN if is_used else UNUSED


def draw_messages(path, experiments, styles):
    """Draw the tokens that the classified one sees or, with the `styles` POOLED, those that count for the head."""
    pitch, is_pooled = (90, True) if styles is POOLED else (62, False)
    with canvas(path, 52 + pitch * len(experiments), styles) as axes:
        for y, experiment in zip(range(36, 900, pitch), experiments):
            token_ids, position, seen, weights = encode_message(experiment)
            write_name(axes, 34, y, experiment)
            x, last = LEFT, len(token_ids) - 1
            for index in range(last + 1) if last < 20 else (*range(9), last):  # of a thousand pads the first and last
                if index > 20:
                    write(axes, x + 8, y, f"… {last - 9:,} more")
                    x += 136
                is_used = weights[index] > 0 if is_pooled else seen[index]
                text, style = text_and_style(token_ids[index], is_used)
                width = 40 if text == "pad" else 16 + 11 * len(text)
                box(axes, x, y - 18, width, 36, style)
                write(axes, x + width / 2, y, text, 18, ha="center", family="monospace", alpha=1 if is_used else 0.6)
                if is_pooled and is_used:
                    write(axes, x + width / 2, y + 32, str(weights[index]), 15, ha="center", color=BLUE)
                elif index == position and not is_pooled:
                    box(axes, x, y - 18, width, 36, CLASSIFIED)
                x += width + 5


def draw_masks(path, experiments):
    with canvas(path, 356, SEEN, left=130) as axes:
        for left, experiment in zip((130, 580), experiments):
            token_ids, position, *_ = encode_message(experiment)
            write_name(axes, left + 24, 18, experiment, width=40)
            for row, y in enumerate(range(40, 40 + 22 * len(token_ids), 22)):
                write(axes, left - 10, y + 11, text_and_style(token_ids[row], True)[0], ha="right", family="monospace")
                for column, is_seen in enumerate(tokens_seen(experiment, len(token_ids), row)):
                    box(axes, left + 22 * column, y, 22, 22, text_and_style(token_ids[column], is_seen)[1])
            box(axes, left, 40 + 22 * position, 22 * len(token_ids), 22, CLASSIFIED)


def draw_layers(path, experiments):
    with canvas(path, 92 + 52 * len(experiments), {"trained": TRAINED, "frozen": FROZEN}) as axes:
        write(axes, 890, 24, "trained", ha="right")
        for y, experiment in zip(range(64, 900, 52), experiments):
            parts, x = classifier_parts(experiment), LEFT
            write_name(axes, 34, y, experiment)
            for name, module in parts.items():
                width = 25 if name.isdecimal() else 14 + 9 * len(name)
                box(axes, x, y - 17, width, 34, FROZEN if is_frozen(module) else TRAINED)
                write(axes, x + width / 2, 24, name, 16, ha="center", visible=experiment is experiments[0])
                x += width + 3
            trained = [p.numel() for module in parts.values() for p in module.parameters() if p.requires_grad]
            write(axes, 890, y, f"{sum(trained):,}", ha="right")


def draw_lora(path, experiment):
    """Draw each linear layer of a block, and the head, with its LoRA matrices; all to scale, except for the rank."""
    parts, x = classifier_parts(experiment), 62
    modules = {name.removeprefix("att."): module for name, module in parts["1"].named_modules()}
    with canvas(path, 318, {"trained": TRAINED, "frozen": FROZEN}, left=28) as axes:
        for left, y, text in ((28, 36, f"1 of {len(parts) - 3} blocks"), (33, 140, "A"), (80, 94, "B")):
            write(axes, left, y, text)
        for name, module in (modules | {"out_head": parts["head"]}).items():
            if name == "out_head":
                box(axes, 14, 14, x - 40, 252, dict(facecolor="none", edgecolor="0.6"))
                x += 32
            if isinstance(module, LinearWithLoRA):
                width, height = (max(size * 190 / 3072, 8) for size in module.linear.weight.shape)  # (out, in)
                box(axes, x, 140 - height / 2, width, height, FROZEN if is_frozen(module.linear) else TRAINED)
                box(axes, x - 12, 140 - height / 2, 8, height, TRAINED)
                box(axes, x, 128 - height / 2, width, 8, TRAINED)
                write(axes, x + width / 2, 252, name, ha="center", family="monospace")
                x += width + 52


def main(folder):
    row = {number: Experiment(**row.options) for number, row in ROWS.items()}
    draw_messages(folder / "position.png", [row[1], row[2], row[16]], SEEN)
    draw_messages(folder / "padding.png", [row[1], row[13], row[14], row[16]], SEEN)
    draw_messages(folder / "mean.png", [row[1], row[19], replace(row[19], trainable_token_pos="flexible")], POOLED)
    draw_masks(folder / "mask.png", [row[1], row[17]])
    draw_layers(folder / "layers.png", [row[3], row[1], row[4], row[5]])
    draw_lora(folder / "lora.png", row[11])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "choices")
