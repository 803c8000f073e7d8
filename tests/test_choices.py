"""The pictures of docs/choices.md: all are drawn, all are shown, and what they show is what the model does."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY
from helpers import CPU, assert_equal_to_rounding, encoded
from PIL import Image, ImageChops

import additional_experiments as ae
from classifier import LinearWithLoRA, build_classifier
from gpt_download import SAMPLE
from runner.rows import ROWS

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))
from draw_choices import LONGEST, MESSAGE, classifier_parts, encode_message, main, tokens_seen

DOCS, FLEXIBLE = Path(ae.__file__).parent / "docs", dict(trainable_token_pos="flexible")


def tiny_experiment(row, **options):
    return ae.Experiment(**dict(model_size=TINY, weights="random") | ROWS[row].options | options)


def test_both_pages_show_every_picture_and_the_published_figures(tmp_path):
    main(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {path.name for path in (DOCS / "choices").iterdir()} and max(sizes.values()) < 60_000
    for name in sizes:  # the pictures are those of this program; letters may differ a little
        kept, drawn = (Image.open(folder / name).convert("RGB").reduce(20) for folder in (DOCS / "choices", tmp_path))
        assert kept.size == drawn.size and max(high for _, high in ImageChops.difference(kept, drawn).getextrema()) < 40
    english, japanese = r"(?P<test>[\d.]+)%\s+for\s+row\s+(?P<row>\d+)", r"(?P<row>\d+) 行目[がも] (?P<test>[\d.]+)%"
    for page, pattern in {"choices.md": english, "choices.ja.md": japanese}.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        assert sorted(re.findall(r'<img src="choices/(.+?)" width="\d+" alt=".+">', text)) == sorted(sizes)
        figures = [(float(match["test"]), ROWS[int(match["row"])].test) for match in re.finditer(pattern, text)]
        assert len(figures) == len(re.findall(r"\d\.\d\d%", text)) and all(ours == row for ours, row in figures)
    messages = [line.partition("\t")[2] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert MESSAGE in messages and LONGEST in messages


@pytest.mark.parametrize("row, more", [*((row, {}) for row in (1, 2, 13, 14, 16, 17, 19)), (19, FLEXIBLE)])
def test_the_classifier_depends_on_the_tokens_that_are_drawn_as_seen(row, more, tiny_size):
    """And on no other: a plain GPT-2 gets the whole message, the classifier what `encode` keeps of it."""
    experiment = tiny_experiment(row, **more)
    token_ids, position, seen, weights = encode_message(experiment)
    grid = {query: tokens_seen(experiment, len(token_ids), query) for query in (0, 5, position)}
    weights = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    classifier = build_classifier(experiment, 2).double().requires_grad_(False)
    splits = {"train": pd.DataFrame(dict(Text=[MESSAGE, LONGEST], Label=0))}
    batch = ae.encode(ae.load_vocabulary(), splits, experiment).pool.batch(torch.tensor([0]), CPU)

    before = classifier.gpt(torch.tensor([token_ids]))[0]  # (T, D)
    assert_equal_to_rounding(classifier(batch)[0], classifier.out_head(weights @ before))
    for index in {0, 3, 7, 8, 10, 11, len(token_ids) - 1} & {*range(len(token_ids))}:
        other_ids = torch.tensor([[*token_ids[:index], 464, *token_ids[index + 1 :]]])
        changed = (classifier.gpt(other_ids)[0] != before).any(-1)
        assert changed[position] == seen[index]
        assert all(changed[query] == line[index] for query, line in grid.items())


@pytest.mark.parametrize("row", [1, 3, 4, 5, 11])
def test_an_update_changes_what_is_drawn_as_trained(row, tiny_size, data_dir):
    experiment = tiny_experiment(row, data_dir=str(data_dir))
    parts, classifier = classifier_parts(experiment).values(), build_classifier(experiment, 2)
    before = [parameter.clone() for parameter in classifier.parameters()]
    optimizer = ae.make_optimizer(classifier, experiment)
    ae.accumulate_gradients(classifier, encoded(experiment), [torch.arange(8)], experiment)
    optimizer.step()
    drawn = [parameter for part in parts for parameter in part.parameters()]
    for (name, after), old, new in zip(classifier.named_parameters(), before, drawn, strict=True):
        if not name.endswith("W_key.bias"):  # it cancels in the softmax
            assert new.requires_grad == (not old.equal(after)), name
    lora = [[name for name, child in part.named_modules() if isinstance(child, LinearWithLoRA)] for part in parts]
    assert lora[1:-2] == [lora[1]] * 4 and len(lora[1]) == 6 * (row == 11)  # the first block stands for all
