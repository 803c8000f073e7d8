"""The report as a page: parsed, hostile texts, and opened in a browser where there is one."""

import html
import re
import shutil
import subprocess
from collections import defaultdict
from xml.etree import ElementTree

import pytest
from helpers import made_up_record
from test_summary import baseline, nano, row

from runner.results import page
from runner.results.records import History
from runner.results.summary import summarize

HISTORY = History(steps=[0, 50, 100], train_losses=[1.0, 0.5, 0.1], val_losses=[1.0, 0.6, 0.4])


def page_of(*records):
    return page.render(summarize(records))


def texts(text, tag):
    """The texts of all elements of a kind. Raises ParseError where an element of the page is not closed."""
    return [" ".join("".join(found.itertext()).split()) for found in ElementTree.fromstring(text).iter(tag)]


@pytest.fixture(scope="module")
def everything():
    """The page of three seeds of two rows, one of row 18, rows at the nano size, another run, a baseline."""
    records = [row(n, range(20 * n + seed), seed=seed, history=HISTORY) for n in (1, 2) for seed in (1, 2, 3)]
    records += [row(18, range(21), seed=1), nano(1), nano(2), row(1, lora_rank=4, note="a remark"), baseline()]
    return page_of(*records)


def test_the_page_holds_everything(everything):
    captions, summaries, cells = (texts(everything, tag) for tag in ("caption", "summary", "td"))
    assert captions[0].startswith("The table. Not run: rows 3, 4,")
    assert captions[1].startswith("Rows with gpt2-nano, random weights, sample data, lr 0.0005. Not run: rows 3, 4,")
    assert len(summaries) == 11 and summaries[0].startswith("row 1, seed 1: 93.00% (279/300")
    assert any(re.match(r"Row 2 is \d+\.\d\d points worse .* What differs: Under the", cell) for cell in cells)
    assert any(cell.startswith("Row 18 has no verdict") for cell in cells) and {"linear SVM", "message 3"} < set(cells)
    paragraphs = "\n".join(texts(everything, "p"))
    assert "\nThese seeds can show a difference of about" in paragraphs and ": a remark\n" in paragraphs
    assert "Minutes: training only. Features: seconds to compute" in paragraphs
    assert any(text.startswith("There are no runs. This command") for text in texts(page_of(), "p"))


def test_precision_and_recall_of_each_class():
    """Of 21 mistakes, 11 of them on ham."""
    tables = ElementTree.fromstring(page_of(row(1, range(21)))).iter("table")
    [table] = [table for table in tables if "Classes" in table[0].text]
    found = [[cell.text for cell in line] for line in table.iter("tr")][1:]
    assert found == [["ham", "150", "93.29%", "92.67%"], ["spam", "150", "92.72%", "93.33%"]]


def test_the_legend_names_what_is_drawn(everything):
    assert "seeds (strokes), published (diamond)" in everything
    alone = page_of(nano(1), nano(2))
    assert "strokes" not in alone and "diamond" not in alone and "mean (disc)" in alone
    assert 'class="seed"' not in alone and 'class="published"' not in alone


def test_intervals_and_seeds_are_drawn_where_they_are(everything):
    places = defaultdict(list)
    for found in ElementTree.fromstring(everything).iter("path"):
        places[found.get("class")].append([float(x) for x in re.findall(r"[ML]([-\d.]+) 10", found.get("d"))])
    low, high = places["interval"][0]  # of row 1, with its three seeds
    assert all(low < x < high for [x] in [*places["seed"][:3], places["mean"][0]])
    ends = [end for place in places["interval"] for end in place]
    assert 0 <= min(ends) < 10 and max(ends) == 200 and not places["cut"]
    assert {"75", "100%", "10 points worse", "0", "10 better"} <= set(texts(everything, "text"))
    assert {"1.00", "0", "100 batches"} <= set(texts(everything, "text"))  # of the losses


def test_a_wide_interval_is_cut_with_an_arrow():
    wide = [row(1, range(n), seed=seed, lora_rank=4) for seed, n in ((1, 10), (2, 30))]
    found = ElementTree.fromstring(
        page_of(*(row(n, range(9), seed=seed) for n in (1, 2, 3) for seed in (1, 2, 3)), *wide)
    )
    [cut] = [one.get("d") for one in found.iter("path") if one.get("class") == "cut"]
    starts = [one.get("d").split()[0] for one in found.iter("path") if one.get("class") == "interval"]
    assert cut.startswith("M0.0 10") and "M0.0" in starts


def test_losses_that_are_not_known_are_not_drawn():
    nan = float("nan")
    for losses in ([nan, 0.5, 0.1], [nan] * 3):
        assert "nan" not in page_of(row(1, history=History([0, 50, 100], losses, [nan] * 3)))


def test_the_page_needs_nothing_from_elsewhere_and_serves_screen_readers(everything):
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\(|@import|http""", everything)
    root = ElementTree.fromstring(everything)
    assert root.get("lang") == "en" and len([*root.iter("h1")]) == len([*root.iter("main")]) == 1
    assert {found.get("scope") for found in root.iter("th")} == {"row", "col"}
    assert all("aria-hidden" in found.attrib or found.get("aria-label") for found in root.iter("svg"))
    assert {found.get("href")[1:] for found in root.iter("a")} <= {found.get("id") for found in root.iter()}


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a|b`c`", "\u202eback", "{{ 7 * 7 }}"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_texts(text):
    fields = dict(
        device_name=text, date=text, note=text, class_names=[text, "b"], texts=[text], versions={"torch": text}
    )
    other = dict(options=dict(data=text), row=None, configuration=text)
    found = page_of(made_up_record([0], **fields), made_up_record([0], **fields | other))
    assert len(texts(found, "script")) == 1 and "alert" not in texts(found, "script")[0] and texts(found, "img") == []
    cells = [cell for cell in ElementTree.fromstring(found).iter("td") if cell.get("data-label") == "Text"]
    assert [cell.text for cell in cells] == [text] * 2


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# A frame, because a window of Chromium is at least 500 wide.
OUTER = """<iframe id="page" width="{}" height="900" srcdoc="{}"></iframe><script>onload = () => {{
const inside = document.getElementById("page").contentDocument, root = inside.documentElement;
inside.querySelectorAll("details").forEach(details => details.open = true);
document.title = `${{root.scrollWidth}} of ${{root.clientWidth}}`;
const shown = name => inside.defaultView.getComputedStyle(inside.querySelector(name)).display;
document.title += ` ${{shown("thead")}} ${{shown("th[scope=row]:empty")}}`;
const table = inside.querySelector("table"), values = [];
table.querySelector("th:nth-child(4) button").click();
for (const row of table.tBodies[0].rows) values.push(parseFloat(row.cells[3].textContent));
document.title += ` sorted ${{values.length > 2 && values.every((x, i) => i === 0 || values[i - 1] <= x)}}`;
}}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_nothing_is_wider_than_the_window_and_a_heading_sorts(everything, tmp_path, width):
    (tmp_path / "page.html").write_text(OUTER.format(width, html.escape(everything)), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"<title>(\d+) of (\d+) (\S+) (\S+) sorted true</title>", out)
    assert int(found[1]) <= int(found[2]) <= width
    assert found[3] == ("none" if width < 600 else "table-header-group")  # cards on a telephone only
    assert found[4] == ("none" if width < 600 else "table-cell")  # no "Row:" with nothing behind it
