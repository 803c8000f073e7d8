"""README and docs/: commands, options, rows and names of code exist, links resolve, the Japanese README is equal."""

import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import additional_experiments as ae
import classifier
import gpt_download
import previous_chapters
from runner.options import RunOptions
from runner.rows import QUESTIONS, ROWS
from runner.wording import changed_options

ROOT = Path(ae.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, JAPANESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/README.ja.md"))
CODE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
PROGRAM = "python additional_experiments.py"
UV = "uv run --with-requirements requirements.txt additional_experiments.py"
TOP = (ae, classifier, previous_chapters, gpt_download)  # the files of a first reading


def commands(text):
    """The arguments of each call of the program in the blocks of a page, without redirections; $row is 16."""
    lines = [line.strip().replace("$row", "16") for _, code in CODE.findall(text) for line in code.splitlines()]
    calls = [call for line in lines for call in line.replace(UV, PROGRAM).split(" && ") if call.startswith(PROGRAM)]
    return [shlex.split(call.split(" < ")[0].removeprefix(PROGRAM)) for call in calls]


def table_rows(text):
    """The cells of each line of the tables of a page."""
    lines = CODE.sub("", text).splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_names_the_japanese_one_first():
    assert len(README.split()) <= 2700
    assert "(docs/README.ja.md)" in README.splitlines()[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_can_be_parsed(page):
    found = commands(page.read_text(encoding="utf-8"))
    assert len(found) >= 10 or "README" not in page.name or page.parent.name == "data"
    for arguments in found:
        ae.parse_args(arguments)  # raises UserError


def test_the_table_holds_the_rows():
    found = {}
    for number, command, *figures in table_rows(README):
        if number.isdecimal():
            options = "" if command == "(no options)" else command.strip("`")
            experiment, *_ = ae.parse_args(shlex.split(options))
            found[int(number)] = changed_options(experiment), [float(figure.split()[0]) for figure in figures]
    assert found == {n: (row.options, [row.train, row.validation, row.test, row.minutes]) for n, row in ROWS.items()}


def test_the_section_on_options_names_each_option_and_no_other():
    section = README.partition("## Options\n")[2].partition("\n## ")[0]
    expected = {setting.name for kind in (ae.Experiment, RunOptions) for setting in fields(kind)}
    assert set(re.findall(r"--(\w+)", section)) == expected | {"row", "demo", "help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', CODE.sub("", text))
    for link in (link or image for link, image in links):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_japanese_readme_has_the_same_commands_tables_and_sections():
    def facts(text):
        """What does not depend on the language: blocks, of each line of a table its code and numbers, levels."""
        cells = [sorted(re.findall(r"`[^`]+`|\d[\d.,]*\b", " | ".join(row))) for row in table_rows(text)]
        levels = re.findall(r"^(#+) ", CODE.sub("", text), re.M)
        return CODE.findall(text), cells, levels, [Path(image).name for image in re.findall(r'<img src="(.+?)"', text)]

    assert facts(README) == facts(JAPANESE)


def test_the_python_of_the_readme_runs(capsys):
    """After its commands that write the files which it reads; the accuracy in a comment is what it prints.

    The lines that the README shows of the demo are printed too, with other numbers.
    """

    def without_numbers(text):
        text = re.sub(r"(Wrote the record to results/).*", r"\1", text.replace("thread;", "threads;"))
        return set(re.sub(r"\b\d[\w.+]*", "N", text).splitlines())

    options = "--demo --num_epochs 1 --trainable_layers last_layer --trainable_token_pos flexible"
    assert ae.main([*options.split(), "--device", "cpu", "--save_model", "spam.safetensors"]) == 0
    [shown] = [code for language, code in CODE.findall(README) if "Device: " in code]
    assert without_numbers(shown) - {"..."} <= without_numbers(capsys.readouterr().out)
    assert ae.main(["--load_model", "spam.safetensors", "--export", "spam-classifier"]) == 0
    capsys.readouterr()
    blocks = [code for language, code in CODE.findall(README) if language == "python"]
    [example] = [code for code in blocks if "load_classifier" in code]
    for code in blocks:
        exec(code, {})
    printed = re.findall(r"^(\d+\.\d\d)%$", capsys.readouterr().out, re.M)
    claimed = re.findall(r"# (\d+\.\d\d)%", example)
    assert claimed and list(map(float, printed)) == pytest.approx(list(map(float, claimed)), abs=2)


def test_numbers_of_questions_and_of_trained_parameters():
    assert f"answers {len(QUESTIONS)} questions" in README and f" {len(QUESTIONS)} の問い" in JAPANESE
    trained, shares = {}, {}
    for number, row in ROWS.items():
        with torch.device("meta"):
            model = ae.build_classifier(ae.Experiment(**row.options | dict(weights="random")), n_classes=2)
        trained[number] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shares[number] = trained[number] / sum(p.numel() for p in model.parameters())
    size = {number: 3 * 4 * n for number, n in trained.items()}  # parameters and two moments in float32
    checkpoints, table = f"{size[1] / 1e6:.0f} MB for row 1, {size[9] / 1e9:.0f} GB\nfor row 9", 5 * sum(size.values())
    assert " ".join(checkpoints.split()) in " ".join(README.split())
    assert f"{shares[11]:.1%} and {shares[12]:.1%} of the parameters" in README
    places = ROOT / "docs" / "cluster.md", ROOT / "runner" / "slurm_array.sh"
    assert all(f"{table / 1e9:.0f} GB" in path.read_text(encoding="utf-8") for path in places)


def test_sizes_of_kept_features():
    """The distinct messages of the collection are 1,388, padded to 120 tokens."""
    lines = table_rows((ROOT / "docs" / "figures.md").read_text(encoding="utf-8"))
    found = {name: kept for name, *_, kept in lines if name in previous_chapters.GPT_SIZES}
    widths = {name: sizes["emb_dim"] for name, sizes in previous_chapters.GPT_SIZES.items() if "nano" not in name}
    assert found == {name: f"{1388 * 120 * width * 4 / 1e9:.2f} GB" for name, width in widths.items()}


def test_the_misprinted_command_of_row_9_is_refused_with_the_sizes(capsys):
    assert ae.main(["--model_size", "gpt2-xl (1558M)--trainable_layers", "all"]) == 2
    assert '(1558M)--trainable_layers" is none of gpt2-small (124M), gpt2-medium' in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows what it ignores")
def test_git_ignores_what_the_commands_write_and_nothing_of_the_project():
    written = {"results/x.json", "sms_spam_collection/train.csv"}
    for _, options, _ in map(ae.parse_args, commands(README)):
        written |= {
            *filter(None, (options.checkpoint, options.save_model, options.export, options.predictions)),
            *options.write,
        }
    command = ["git", "check-ignore", *written, "runner/results/new.py", "runner/data/new.py", "docs/report.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.splitlines()) == written


def test_the_walk_has_every_kind_of_switch_and_names_what_exists():
    switches = dict(table_rows((ROOT / "docs" / "switches.md").read_text(encoding="utf-8"))[1:])
    expected = "trainable_token_pos trainable_layers model_size weights lora_rank lora_alpha context_length no_padding"
    expected += " disable_causal_mask average_embeddings"
    assert set(re.findall(r"`--(\w+)`", " ".join(switches))) == set(expected.split())
    names = [re.findall(r"`([\w.]+)`", places) for places in switches.values()]
    assert all(names)
    for name in sum(names, []):
        owner, *attributes = name.split(".")
        found = next(getattr(module, owner) for module in TOP if hasattr(module, owner))
        for attribute in attributes:
            found = getattr(found, attribute)
        found = found.fget if isinstance(found, property) else found
        assert callable(found) and found.__module__ in {module.__name__ for module in TOP}, name
