"""README and docs/: commands, options, rows and names of code exist, links resolve, the Japanese README is equal."""

import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

import additional_experiments as ae
import classifier
import gpt_download
import previous_chapters
from runner.options import RunOptions
from runner.rows import ROWS
from runner.wording import changed_options

ROOT = Path(ae.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, JAPANESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/README.ja.md"))
CODE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
PROGRAM = "python additional_experiments.py"
TOP = (ae, classifier, previous_chapters, gpt_download)  # the files of a first reading


def commands(text):
    """The arguments of each call of the program in the blocks of a page, without redirections; $row is 16."""
    lines = [line.strip().replace("$row", "16") for _, code in CODE.findall(text) for line in code.splitlines()]
    return [shlex.split(line.split(" < ")[0].removeprefix(PROGRAM)) for line in lines if line.startswith(PROGRAM)]


def table_rows(text):
    """The cells of each line of the tables of a page."""
    lines = CODE.sub("", text).splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_names_the_japanese_one_first():
    assert len(README.replace("|", " ").split()) <= 2600
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
    """After its commands that write the files which it reads; the accuracy in a comment is what it prints."""
    options = "--demo --num_epochs 1 --trainable_layers last_layer --trainable_token_pos flexible"
    assert ae.main([*options.split(), "--save_model", "spam.safetensors"]) == 0
    assert ae.main(["--load_model", "spam.safetensors", "--export", "spam-classifier"]) == 0
    capsys.readouterr()
    blocks = [code for language, code in CODE.findall(README) if language == "python"]
    [example] = [code for code in blocks if "load_classifier" in code]
    for code in blocks:
        exec(code, {})
    printed = re.findall(r"^(\d+\.\d\d)%$", capsys.readouterr().out, re.M)
    claimed = re.findall(r"# (\d+\.\d\d)%", example)
    assert claimed and list(map(float, printed)) == pytest.approx(list(map(float, claimed)), abs=2)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows what it ignores")
def test_git_ignores_what_the_commands_write_and_nothing_of_the_project():
    written = {"results/x.json", "sms_spam_collection/train.csv"}
    for _, options, _ in map(ae.parse_args, commands(README)):
        written |= {*filter(None, (options.checkpoint, options.save_model, options.export)), *options.write}
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
