"""The report as a page: parsed, hostile texts, and opened in a browser where there is one."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers import made_up_record
from test_summary import baseline, nano, row

from runner.results import page
from runner.results.records import History
from runner.results.summary import summarize
from runner.rows import QUESTIONS

HISTORY = History(steps=[0, 50, 100], train_losses=[1.0, 0.5, 0.1], val_losses=[1.0, 0.6, 0.4])


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
        if tag not in ("meta", "img"):
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

    def texts(self, tag):
        return [text for _, text in self.all(tag)]


def page_of(*records):
    return page.render(summarize(records))


@pytest.fixture(scope="module")
def everything():
    """The page of three seeds of two rows, one of row 18, rows at the nano size, another run, a baseline."""
    records = [row(n, range(20 * n + seed), seed=seed, history=HISTORY) for n in (1, 2) for seed in (1, 2, 3)]
    records += [row(18, range(21), seed=1), nano(1), nano(2), row(1, lora_rank=4, note="a remark"), baseline()]
    return page_of(*records)


def test_the_page_holds_everything(everything):
    parsed = Parsed(everything)
    assert parsed.texts("h2") == ["The table", "Conclusions", "Single runs"]
    captions = parsed.texts("caption")
    assert captions[0].startswith("The table. Not run: rows 3, 4,")
    assert captions[1].startswith("Rows with gpt2-nano, random weights, sample data, lr 0.0005. Not run: rows 3, 4,")
    summaries = parsed.texts("summary")
    assert len(summaries) == 11 and summaries[0].startswith("row 1, seed 1: 93.00% (279/300")
    cells = parsed.texts("td")
    assert any(cell.startswith("worse, -") for cell in cells) and any(QUESTIONS[0].why in cell for cell in cells)
    assert any(cell.startswith("no verdict") for cell in cells) and "linear SVM" in cells and "message 3" in cells
    assert any(text.endswith(": a remark") for text in parsed.texts("p"))


def test_intervals_and_seeds_are_drawn_where_they_are(everything):
    drawn = [found for _, found, _ in Parsed(everything).elements if found.get("class") in ("interval", "seed", "mean")]
    places = [[float(x) for x in re.findall(r"[ML]([-\d.]+) 10", found["d"])] for found in drawn]
    [low, high], *seeds_and_mean = places[:5]  # of row 1, with its three seeds
    assert all(low < x < high for [x] in seeds_and_mean)
    assert min(map(min, places)) == 0 and max(map(max, places)) == 200  # the farther end of the widest difference, 100%


def test_the_page_needs_nothing_from_elsewhere_and_serves_screen_readers(everything):
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\(|@import|http|<script""", everything)
    parsed = Parsed(everything)
    [(html, _)] = parsed.all("html")
    assert html["lang"] == "en" and len(parsed.all("h1")) == len(parsed.all("main")) == 1
    assert {attributes["scope"] for attributes, _ in parsed.all("th")} == {"row", "col"}
    assert all("aria-hidden" in attributes or attributes["aria-label"] for attributes, _ in parsed.all("svg"))
    targets = {attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes}
    assert {attributes["href"][1:] for attributes, _ in parsed.all("a")} <= targets


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a|b`c`", "\u202eback", "{{ 7 * 7 }}"]
)
def test_hostile_texts_are_texts(text):
    fields = dict(
        device_name=text, date=text, note=text, class_names=[text, "b"], texts=[text], versions={"torch": text}
    )
    other = dict(options=dict(data=text), configuration=text)
    parsed = Parsed(page_of(made_up_record([0], **fields), made_up_record([0], **fields | other)))
    assert parsed.all("script") == parsed.all("img") == []
    assert [found for attributes, found in parsed.all("td") if attributes["data-label"] == "Text"] == [text] * 2


def test_a_page_of_no_runs():
    assert "There are no runs." in Parsed(page_of()).texts("p")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PROBE = """
<script>
addEventListener("load", () => {
  const root = document.documentElement;
  document.querySelectorAll("details").forEach(details => details.open = true);
  document.title = `${root.scrollWidth} of ${root.clientWidth}`;
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(everything, tmp_path, width):
    (tmp_path / "page.html").write_text(everything.replace("</body>", PROBE + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom"]
    address = f"file://{tmp_path / 'page.html'}"
    out = subprocess.run([*command, address], capture_output=True, text=True, timeout=60).stdout
    widths = re.search(r"<title>(\d+) of (\d+)</title>", out)
    assert int(widths[1]) <= int(widths[2])
