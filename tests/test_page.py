"""The report as a page: parsed, hostile texts, and opened in a browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers import made_up_record
from test_report import baseline
from test_summary import nano, row

from runner.results import page
from runner.results.records import History
from runner.results.summary import summarize
from runner.rows import QUESTIONS, ROWS

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
    return page.render(summarize(records))


def everything():
    """Three seeds of two rows, one of row 18, rows at the nano size, another run, a baseline."""
    records = [row(n, range(20 * n + seed), seed=seed, history=HISTORY) for n in (1, 2) for seed in (1, 2, 3)]
    records += [row(18, range(21), seed=1), nano(1), nano(2), row(1, lora_rank=4, note="a remark"), baseline()]
    return records


def test_the_page_holds_everything():
    parsed = Parsed(page_of(*everything()))
    titles = ["The table", "Conclusions", "Single runs", "What was run where"]
    assert [t for _, t in parsed.all("h2")] == titles
    captions = [t for _, t in parsed.all("caption")]
    assert captions[0] == "The rows of the table. Baseline: linear SVM 97.67 [95.3–98.9]. Not run: rows 3–17, 19."
    assert captions[1] == "The rows with gpt2-nano, random weights, sample data, lr 0.0005. Not run: rows 3–5, 9–19."
    summaries = [t for _, t in parsed.all("summary")]
    assert len(summaries) == 11 and summaries[0].startswith("row 1, seed 1: 93.00% (279/300")
    cells = [t for _, t in parsed.all("td")]
    assert any(cell.startswith("▼ worse") for cell in cells) and any(QUESTIONS[0].why in cell for cell in cells)
    assert any(cell.startswith("no verdict") for cell in cells) and "0.28 inside" not in cells
    paragraphs = [t for _, t in parsed.all("p")]
    assert any(t.startswith("Not compared (not yet run): 1–3, 1–4, 1–5,") for t in paragraphs)
    assert any(t.endswith(": a remark") for t in paragraphs)


def test_intervals_and_seeds_are_drawn_where_they_are():
    parsed = Parsed(page_of(*everything()))
    drawn = [found for _, found, _ in parsed.elements if found.get("class") in ("interval", "seed", "mean")]
    interval, *seeds, mean = drawn[:5]  # of row 1, with its three seeds
    low, high = float(interval["x1"]), float(interval["x2"])
    assert all(low < float(found["cx"]) < high for found in (*seeds, mean))
    widest = min(float(found["x1"]) for found in drawn if found["class"] == "interval")
    assert widest == pytest.approx(-110, abs=0.1)  # the farther end of the widest difference


def test_the_page_needs_nothing_from_elsewhere_and_serves_screen_readers_and_keyboards():
    text = page_of(*everything())
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\(|@import|http""", text)
    parsed = Parsed(text)
    [(html, _)] = parsed.all("html")
    assert html["lang"] == "en" and len(parsed.all("h1")) == len(parsed.all("main")) == 1
    assert {attributes["scope"] for attributes, _ in parsed.all("th")} == {"row", "col"}
    assert all("aria-hidden" in attributes or attributes["aria-label"] for attributes, _ in parsed.all("svg"))
    targets = {attributes["id"] for tag, attributes, _ in parsed.elements if "id" in attributes}
    assert {attributes["href"][1:] for attributes, _ in parsed.all("a")} <= targets


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a|b`c`", "\u202eback", "{{ 7 * 7 }}"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_texts(text):
    fields = dict(device_name=text, torch=text, date=text, note=text, class_names=[text, "b"], texts={0: text})
    other = dict(options=dict(data=text), configuration=text)
    parsed = Parsed(page_of(made_up_record([0], **fields), made_up_record([0], **fields | other)))
    assert len(parsed.all("script")) == 1 and parsed.all("img") == []
    texts = [t for attributes, t in parsed.all("td") if attributes.get("class") == "text"]
    assert texts == [text] * 2 and len(parsed.all("bdi")) == 2  # whatever its direction, its line keeps its own


def test_pages_of_no_runs_and_of_many():
    assert "There are no runs." in [t for _, t in Parsed(page_of()).all("p")]
    records = [row(number, range(50), seed=seed, history=HISTORY) for seed in range(20) for number in ROWS]
    found = page_of(*records, *(row(1, range(n % 50), lora_rank=n + 100) for n in range(1000)))
    assert "Other runs, 300 of 1000" in found and "1080 further runs are not shown here." in found
    assert len(found.encode()) < 1_500_000


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
    """It sorts, and nothing is wider than the window."""
    text = page_of(*everything())
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom"]
    address = f"file://{tmp_path / 'page.html'}"
    out = subprocess.run([*command, address], capture_output=True, text=True, timeout=60).stdout
    found = json.loads(re.search(r"<body>(\{.*\})</body>", out, re.S)[1])
    assert found["up"] == sorted(found["up"]) and found["down"] == "descending" and found["wide"] <= 0
