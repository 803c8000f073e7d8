"""The report as a page: parsed, hostile texts, and opened in a browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from helpers import made_up_confusion, made_up_record, made_up_run

from additional_experiments import DEFAULTS, QUESTIONS, ROWS, main
from runner.data import datasets
from runner.results import page
from runner.results.records import History
from runner.results.summary import answer_questions, arrange

HISTORY = History(steps=[0, 50, 100], train_losses=[1.0, 0.5, 0.1], val_losses=[1.0, 0.6, 0.4])
VOID = {"meta", "br", "link", "img"}


class Parsed(HTMLParser):
    """The elements of a page with their attributes and text; raises AssertionError where one is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag):
        return [(attributes, " ".join(text.split())) for name, attributes, text in self.elements if name == tag]


def page_of(*records):
    standing = arrange(records, ROWS, DEFAULTS)
    return page.render(standing, answer_questions(standing, QUESTIONS), ROWS)


def everything():
    """Two seeds of two rows, one of row 18, a run of an earlier version, a baseline."""
    records = [made_up_run(f"1 {seed}", range(20 + seed), seed=seed, history=HISTORY) for seed in (1, 2)]
    records += [made_up_run(f"2 {seed}", range(60 + seed), seed=seed, row=2, history=HISTORY) for seed in (1, 2)]
    records += [made_up_run("18", range(21), row=18, seed=1), made_up_record("old", row=3)]
    empty = dict.fromkeys(DEFAULTS, "")
    settings = made_up_record("x").settings | empty | dict(seed=123, precision="fp32")
    return [*records, made_up_run("b", range(9), row=None, configuration="linear SVM", **settings)]


def test_the_page_holds_everything():
    text = page_of(*everything())
    parsed = Parsed(text)
    assert [t for _, t in parsed.all("h2")] == [
        "The table", "Conclusions", "Each with each", "Single runs", "What was run where",
    ]  # fmt: skip
    captions = [t for _, t in parsed.all("caption")]
    assert captions[0] == "The rows of the table. Not run: 4–17, 19. Baselines: linear SVM 97.00%"
    assert len(parsed.all("table")) == len(captions)
    summaries = [t for _, t in parsed.all("summary")]
    assert len(summaries) == 7 and summaries[0].startswith("row 1, seed 1: 93.00% (279/300")
    cells = [t for _, t in parsed.all("td")]
    assert any(cell.startswith("▼ worse") for cell in cells)
    paragraphs = [t for _, t in parsed.all("p")]
    assert any(t.startswith("Not compared (not yet run): 1–4, 1–5, 1–6,") for t in paragraphs)
    assert "The course of training was not recorded." in paragraphs


def cell(parsed, line, column):
    """The text of a cell of the matrix, by the names of its line and its column."""
    matrix = next(i for i, (tag, attributes, _) in enumerate(parsed.elements) if attributes.get("class") == "matrix")
    names, cells, found = [], [], {}
    for tag, attributes, text in parsed.elements[matrix:]:
        if tag == "section":
            break
        if tag == "th" and attributes["scope"] == "col":
            names.append(" ".join(text.split()))
        elif tag == "th":
            cells = found.setdefault(" ".join(text.split()), [])
        elif tag == "td":
            cells.append((text.strip(), attributes.get("class", ""), attributes.get("title", "")))
    return found[line][names.index(column)]


def test_the_matrix_says_who_is_better():
    """Row 2 gets 60 messages wrong that row 1 gets right, and no other way round: 13.3 points worse."""
    parsed = Parsed(page_of(made_up_run("a", range(20)), made_up_run("b", range(60), row=2)))
    text, kind, title = cell(parsed, "row 2", "row 1")
    assert (text, kind) == ("-13.3", "number worse") and title.startswith("95% -17.6 to -9.9, p < 0.001")
    text, kind, title = cell(parsed, "row 1", "row 2")
    assert (text, kind) == ("+13.3", "number better") and title.startswith("95% +9.9 to +17.6, p < 0.001")
    assert cell(parsed, "row 1", "row 1")[0] == "·"


def test_an_interval_is_drawn_from_its_lower_to_its_upper_end():
    parsed = Parsed(page_of(made_up_run("a", range(20)), made_up_run("b", range(60), row=2)))
    svg = next(i for i, (tag, attributes, _) in enumerate(parsed.elements) if attributes.get("role") == "img")
    _, interval, mean = [attributes for tag, attributes, _ in parsed.elements[svg + 1 : svg + 4]]
    low, middle, high = float(interval["x1"]), float(mean["cx"]), float(interval["x2"])
    assert low == pytest.approx(-110, abs=0.1)  # of the widest interval, the farther end
    assert low < middle < high < 0 and middle / low == pytest.approx(13.33 / 17.6, abs=0.01)


def test_the_page_needs_nothing_from_elsewhere():
    text = page_of(*everything())
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text) and "url(" not in text and "@import" not in text
    assert "http" not in re.sub(r"<!DOCTYPE[^>]*>", "", text)


def test_the_page_is_made_for_screen_readers_and_keyboards():
    parsed = Parsed(page_of(*everything()))
    [(html, _)] = parsed.all("html")
    assert html["lang"] == "en" and len(parsed.all("h1")) == len(parsed.all("main")) == 1
    for attributes, _ in parsed.all("th"):
        assert attributes["scope"] in ("row", "col")
    for attributes, _ in parsed.all("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
    for attributes, _ in parsed.all("div"):
        if attributes.get("class") == "wide":
            assert attributes["tabindex"] == "0" and attributes["role"] == "region" and attributes["aria-label"]
    targets = {attributes["id"] for tag, attributes, _ in parsed.elements if "id" in attributes}
    assert {attributes["href"][1:] for attributes, _ in parsed.all("a")} <= targets


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a|b`c`",
    "\u202eback",
    "{{ 7 * 7 }}",
    "x" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_values_are_texts(text):
    record = made_up_run("x", [1], row=None, configuration=text, device_name=text, num_epochs=7, torch=text, date=text)
    other = made_up_run("y", [2], row=1, device_name=text)
    found = page_of(record, other)
    parsed = Parsed(found)
    assert len(parsed.all("script")) == 1 and parsed.all("img") == []
    assert text[:30] in " ".join(text for *_, text in parsed.elements) or text == "\u202eback"
    assert len(found) < 200_000


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_messages_are_texts(tmp_path, text):
    for split in ("train", "validation", "test"):
        pd.DataFrame({"Label": [0, 1], "Text": [text, "b"]}).to_csv(tmp_path / f"{split}.csv", index=None)
    splits, _ = datasets.load_splits(tmp_path, "uci")
    record = made_up_run(
        "x", [], row=None, data="own", data_sha256=datasets.sha256_of_splits(splits), data_dir=str(tmp_path)
    )
    record.confusions["test"] = made_up_confusion({0: 0.99}, totals=(1, 1))
    found = page_of(record)
    parsed = Parsed(found)
    [shown] = [t for attributes, t in parsed.all("td") if attributes.get("class") == "text"]
    assert shown == " ".join(text[:200].split()) and len(parsed.all("script")) == 1
    assert len(parsed.all("bdi")) == 1  # whatever its direction, the line around it keeps its own


def test_messages_are_shown_only_if_they_are_those_of_the_run(tmp_path):
    for split in ("train", "validation", "test"):
        pd.DataFrame({"Label": [0, 1], "Text": ["secret", "b"]}).to_csv(tmp_path / f"{split}.csv", index=None)
    for folder in (tmp_path, tmp_path / "nowhere", ""):
        found = page_of(made_up_run("x", [0], row=None, data="own", data_sha256="other", data_dir=str(folder)))
        assert "secret" not in found and "(the data are not where they were)" in found


def test_a_page_of_no_runs():
    parsed = Parsed(page_of())
    assert "None of the rows was run." in [t for _, t in parsed.all("p")]


def test_a_page_of_many_runs_stays_small():
    records = []
    for seed in range(120):
        records += [made_up_run(f"{row} {seed}", range(50), row=row, seed=seed, history=HISTORY) for row in ROWS]
    found = page_of(*records)
    assert 300_000 < len(found.encode()) < 1_000_000
    shown = len(Parsed(found).all("summary"))
    assert f"{len(records) - shown} further runs are in the file and not shown here." in found


def test_a_page_of_many_configurations_stays_small():
    records = [
        made_up_run(str(n), range(n % 50), row=None, configuration=f"{n} " + "x" * 100, num_epochs=n + 6)
        for n in range(2000)
    ]
    found = page_of(*records)
    assert len(found.encode()) < 1_000_000 and "the first 300 of 2000" in found


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

PROBE = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable"), button = table.querySelectorAll("th button")[2];
  button.click();
  const column = [...table.tBodies[0].rows].map(row => Number(row.cells[2].dataset.value));
  button.click();
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.body.innerHTML = "";
  document.body.append(JSON.stringify({
    up: column, down: button.closest("th").getAttribute("aria-sort"), wide,
    ground: getComputedStyle(document.body).backgroundColor}));
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(tmp_path, width):
    """It sorts, and nothing but its tables is wider than the window."""
    text = page_of(*everything())
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom"]
    out = subprocess.run(
        [*command, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=60
    ).stdout
    found = json.loads(re.search(r"<body>(\{.*\})</body>", out, re.S)[1])
    assert found["up"] == sorted(found["up"]) and found["down"] == "descending" and found["wide"] <= 0


def test_a_page_from_the_command_line(options, capfd):
    assert main(options) == 0
    capfd.readouterr()
    assert main(["--report", "--report_page", "page.txt"]) == 2
    assert '"page.txt" does not end in .html' in capfd.readouterr().err
    assert main(["--report", "--report_page", "page.html"]) == 0
    parsed = Parsed(Path("page.html").read_text())
    [summary] = [t for _, t in parsed.all("summary")]
    assert (
        summary.startswith("gpt2-tiny (1M), random weights, batch size 1, 2 epochs, own data ")
        and "seed 123: " in summary
    )
    assert any(attributes.get("class") == "text" and text for attributes, text in parsed.all("td"))
