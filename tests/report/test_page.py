"""The web page, in a real browser: it draws, sorts, filters, opens a cell, changes its theme, and fits a phone."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import analysis_of, write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import Collection, gather
from ssl_bench.report.build import Loader, report_of
from ssl_bench.report.curves import Curves
from ssl_bench.report.leaderboard import answer as answer_of
from ssl_bench.report.page import images_per_step, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

WATCH = "<script>window.problems = []; addEventListener('error', (event) => problems.push(event.message));</script>"


@pytest.fixture(scope="module")
def page(collection: Collection, study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's page."""
    path = tmp_path_factory.mktemp("page") / "index.html"
    return write_page(report_of(collection, Loader(), None, study), path)


def embedded(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found.group(1))


def ask(page: Path, script: str, tmp_path: Path, *, wrap: str = "{}") -> Any:
    """Opens the page in headless Chromium, runs a script in it and returns what the script leaves in ``answer``."""
    leave = "parent.document.body.dataset.answer = JSON.stringify([answer, problems]);"
    probe = f"<script>let answer; {script}; {leave}</script>"
    text = page.read_text().replace("<head>", "<head>" + WATCH).replace("</body>", probe + "</body>")
    copy = tmp_path / "probed.html"
    copy.write_text(wrap.format(html.escape(text)) if wrap != "{}" else text)
    dumped = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1280,900", "--virtual-time-budget=2000", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = re.search(r'data-answer="([^"]*)"', dumped)
    assert found, dumped[-2000:]
    answer, problems = json.loads(html.unescape(found.group(1)))
    assert problems == []
    return answer


def test_the_page_is_self_contained(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text  # a browser would refuse the network
    assert not re.search(r'(?:src|href)=["\'](?!#|\$)', text)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert set(re.findall(r"https?://[\w./-]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "{{" + "data}}" not in text


def test_the_page_holds_what_the_tables_say(page: Path, collection: Collection) -> None:
    data = embedded(page)
    assert set(data["cells"]) == {cell.key for cell in collection.cells}
    for table in data["tables"]:
        assert all(len(row) == len(table["columns"]) == len(table["numeric"]) for row in table["rows"])
        assert len(table["keys"]) == len(table["rows"])
    lars = next(cell for cell in data["cells"].values() if cell["title"].startswith("LARS: classification"))
    run = lars["runs"][0]
    assert run["metrics"]["test_top1"]["step"] == [10, 20, 30]
    assert run["images_per_step"] == 512
    assert run["layers"]["weight_norm"]["low"][0] == 8
    assert run["layers"]["weight_norm"]["high"][0] == 16
    assert data["shared"][run["provenance"]["code"]]["commit"] == "0123abc"
    assert lars["runs_table"]["rows"][0][-1] == "clf/lars-1-0"
    assert lars["recipe"]["optimizer"]["eta"] == 1e-3
    lost = next(cell for cell in data["cells"].values() if cell["title"].startswith("LAMB") and "lr 3" in cell["title"])
    assert lost["runs_table"]["rows"][0][1] == "diverged at step 15, first in backbone.conv1.weight"
    fields = sum(len(run["provenance"]) for cell in data["cells"].values() for run in cell["runs"])
    assert len(data["shared"]) < fields / 4  # what runs have in common is there once


def test_samples_are_counted_as_the_run_counted_them() -> None:
    """24, 24 and 16 of 64 images, again and again: 21.3 a step."""
    steps = np.array([2.0, 3.0, 6.0])
    short = Curves({"step": steps, "samples": np.array([48.0, 64.0, 128.0])})
    assert images_per_step(short, 24) == 128 / 6
    assert images_per_step(Curves({}), 24) == 24


def test_a_record_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    write_run(tmp_path / "runs" / "a", optimizer="lars", telemetry=False, note=bad)
    collection = gather(*find_runs(tmp_path / "runs"))
    path = write_page(report_of(collection, Loader(), None, tmp_path), tmp_path / "p.html")
    assert bad not in path.read_text()
    assert embedded(path)["cells"][collection.cells[0].key]["recipe"]["optimizer"]["note"] == bad


@browser
def test_it_sorts_and_filters(page: Path, tmp_path: Path) -> None:
    script = """
    const table = document.querySelector('#table1');
    const rows = () => [...table.querySelectorAll('tbody tr:not([hidden])')];
    const column = (n) => rows().map((row) => row.children[n].textContent);
    const head = [...table.querySelectorAll('th')].find((node) => node.textContent === 'difference');
    const place = [...head.parentNode.children].indexOf(head);
    head.querySelector('button').click();
    const rising = column(place), said = head.getAttribute('aria-sort');
    head.querySelector('button').click();
    const falling = column(place);
    const search = table.querySelector('input');
    search.value = 'classification TVLARS';
    search.dispatchEvent(new Event('input'));
    const found = column(5), count = table.querySelector('output').textContent;
    search.value = '';
    const select = table.querySelector('select[aria-label^="optimizer"]');
    select.value = 'LAMB';
    select.dispatchEvent(new Event('change'));
    const sections = [...document.querySelectorAll('section')].map((node) => node.id);
    answer = {rising, falling, said, found, count, chosen: column(5), sections};
    """
    answer = ask(page, script, tmp_path)
    numbers = [float(text) for text in answer["rising"] if text != "–"]
    assert numbers == sorted(numbers)
    assert len(numbers) == 9
    assert answer["rising"][-1] == answer["falling"][-1] == "–"  # what has no number is last in both
    assert answer["falling"][:9] == answer["rising"][:9][::-1]
    assert answer["said"] == "ascending"
    assert answer["found"] == ["TVLARS"] * 3
    assert answer["count"] == "3 of 11 rows"
    assert answer["chosen"] == ["LAMB"] * 3
    assert {"leaderboard", "table1", "comparisons", "claims", "errata", "skipped"} <= set(answer["sections"])


def test_the_first_screen_answers(page: Path, collection: Collection) -> None:
    data = embedded(page)
    assert data["answer"] == answer_of(collection)
    assert [chart["title"] for chart in data["overview"]] == ["classification, cifar10", "barlow_twins, cifar10"]
    lines = {line["name"]: line for line in data["overview"][0]["series"]}
    assert list(lines) == ["LARS", "LAMB", "TVLARS"]
    assert (lines["LARS"]["x"], lines["LARS"]["y"], lines["LARS"]["lost"]) == ([512], [80.0], [False])
    assert lines["LARS"]["low"][0] == pytest.approx(80 - 4.30265 * 0.5 / 3**0.5, abs=1e-3)
    assert lines["LAMB"]["lost"] == [True]  # at lr 3
    assert data["looks"]["LARS"] == data["looks"]["LARS"] | {"color": 0, "dash": ""}
    labels = dict(data["header"])
    assert labels["Made"].endswith("ssl_bench 0.1.0")
    assert labels["Runs"].startswith("study")


def test_a_footnote_stands_once_and_empty_columns_nowhere(page: Path) -> None:
    tables = embedded(page)["tables"]
    notes = [note for table in tables for note in table["notes"]]
    assert len(notes) == len(set(notes))
    for table in tables:
        for index in range(len(table["columns"])):
            assert {row[index] for row in table["rows"]} - {"", "–"}, (table["title"], table["columns"][index])


def test_claims_and_errata_stand_where_the_runs_are_the_papers(tmp_path: Path) -> None:
    noise = {64: 4.0, 256: 1.0, 1024: 0.25}  # which would decide claim (g)
    analysis = analysis_of((5, 10), (50, 20), noise=noise)
    write_run(tmp_path / "runs" / "a", batch_size=96, telemetry=False, analysis=analysis)
    contents = report_of(gather(*find_runs(tmp_path / "runs")), Loader(), None, tmp_path)
    data = embedded(write_page(contents, tmp_path / "p.html"))
    assert (data["claims"], data["errata"]) == ([], [])


@browser
@pytest.mark.parametrize("width", [1280, 400])
def test_no_table_is_cut_off(page: Path, tmp_path: Path, width: int) -> None:
    script = """
    document.querySelectorAll('details').forEach((node) => { node.open = true; });
    const tables = [...document.querySelectorAll('.scroll')];
    const cut = tables.filter((node) => node.scrollWidth > node.clientWidth);
    answer = cut.map((node) => node.getAttribute('aria-label'));
    answer.push(tables.length);
    """
    frame = (
        f'<body style="margin:0"><iframe style="width:{width}px;height:800px;border:0" srcdoc="{{}}"></iframe></body>'
    )
    *cut, count = ask(page, script, tmp_path, wrap=frame)
    assert cut == []
    assert count > 8


@browser
def test_two_cells_are_laid_over_each_other(page: Path, tmp_path: Path) -> None:
    script = """
    document.querySelector('#leaderboard tbody button').click();
    const dialog = document.getElementById('cell');
    const count = () => dialog.querySelector('svg[role=img]').querySelectorAll('polyline').length;
    const alone = count();
    const beside = dialog.querySelector('#beside');
    const other = [...beside.options].find((one) => one.textContent.startsWith('TVLARS: classification'));
    beside.value = other.value;
    beside.dispatchEvent(new Event('change'));
    const names = [...dialog.querySelectorAll('.legend li')].map((one) => one.textContent);
    const lines = [...dialog.querySelector('svg[role=img]').querySelectorAll('polyline')];
    const looks = lines.map((line) => [line.getAttribute('stroke'), line.getAttribute('stroke-dasharray')]);
    answer = {alone, both: count(), names, title: other.textContent, looks, own: ['LARS', 'TVLARS'].map(look)};
    """
    answer = ask(page, script, tmp_path)
    assert (answer["alone"], answer["both"]) == (3, 6)
    # Each in its optimizer's colour, as on every other chart, and TVLARS's is not the second one here.
    lars, tvlars = (f"var(--s{one['color']})" for one in answer["own"])
    assert lars != tvlars != "var(--s1)"
    assert answer["looks"] == [[lars, None]] * 3 + [[tvlars, "5 3"]] * 3
    assert answer["names"] == ["LARS: classification, cifar10, batch size 512, lr 3", answer["title"]]


@browser
def test_a_cell_opens_its_runs(page: Path, tmp_path: Path) -> None:
    script = """
    const button = document.querySelector('#leaderboard tbody button');
    const label = button.getAttribute('aria-label');
    button.focus();
    button.click();
    const dialog = document.getElementById('cell');
    const titles = [...dialog.querySelectorAll('figcaption')].map((node) => node.firstChild.textContent);
    const image = dialog.querySelector('svg');
    const before = image.getAttribute('aria-label'), lines = image.querySelectorAll('polyline').length;
    const clock = dialog.querySelector('#clock');
    clock.value = 'samples';
    clock.dispatchEvent(new Event('change'));
    const after = dialog.querySelector('svg').getAttribute('aria-label');
    const modal = dialog.matches(':modal'), hash = location.hash;
    answer = {label, titles, before, after, lines, modal, hash, text: dialog.textContent.includes('0123abc')};
    dialog.close();
    answer.closed = !dialog.open;
    """
    answer = ask(page, script, tmp_path)
    assert answer["label"] == "Open the runs of LARS: classification, cifar10, batch size 512, lr 3"
    assert answer["titles"][:4] == ["training loss", "test top-1 (%)", "test top-5 (%)", "test loss"]
    assert "trust ratio |w| / |u|" in answer["titles"]
    assert answer["lines"] == 3
    assert "against step" in answer["before"]
    assert "against samples seen" in answer["after"]
    assert "seed 2" in answer["after"]
    assert answer["modal"]
    assert answer["closed"]
    assert answer["text"]
    assert answer["hash"].startswith("#cell-")


@browser
def test_light_and_dark(page: Path, tmp_path: Path) -> None:
    script = """
    const shade = () => { const c = getComputedStyle(document.body); return [c.backgroundColor, c.color]; };
    const first = shade();
    document.getElementById('theme').click();
    answer = [first, shade()];
    """
    light, dark = ask(page, script, tmp_path)
    assert light == ["rgb(255, 255, 255)", "rgb(28, 33, 39)"]
    assert dark == ["rgb(20, 24, 29)", "rgb(228, 232, 236)"]


@browser
def test_it_fits_a_phone_and_names_its_controls(page: Path, tmp_path: Path) -> None:
    script = """
    const named = (node) => node.textContent.trim() || node.getAttribute('aria-label') || node.labels?.length;
    const controls = [...document.querySelectorAll('button, input, select, svg, [role=region]')];
    const row = document.querySelector('#leaderboard tbody tr');
    answer = {
      width: innerWidth,
      overflow: document.documentElement.scrollWidth - innerWidth,
      controls: controls.length,
      unnamed: controls.filter((node) => !named(node)).length,
      card: getComputedStyle(row).display,
      right: Math.max(...[...row.children].map((cell) => cell.getBoundingClientRect().right)),
    };
    """
    frame = '<body style="margin:0"><iframe style="width:400px;height:800px;border:0" srcdoc="{}"></iframe></body>'
    answer = ask(page, script, tmp_path, wrap=frame)
    assert answer["width"] == 400
    assert answer["overflow"] <= 0
    assert answer["controls"] > 50
    assert answer["unnamed"] == 0
    assert answer["card"] == "grid"
    assert answer["right"] <= 400


@pytest.fixture(scope="module")
def analyzed_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three runs, of which two have an analysis."""
    folder = tmp_path_factory.mktemp("analyzed")
    noise = {64: 4.0, 256: 1.0, 1024: 0.25}
    write_run(folder / "wa", telemetry=False, analysis=analysis_of((5, 10), (50, 20), noise=noise))
    nowa = {"target": "polynomial", "power": 1.0}
    write_run(folder / "nowa", telemetry=False, schedule=nowa, analysis=analysis_of((5, 10), (20, 20)))
    write_run(folder / "plain", telemetry=False, lr=2.0)
    return write_page(report_of(gather(*find_runs(folder)), Loader(), None, folder), folder / "index.html")


def test_the_page_holds_the_analyses(analyzed_page: Path) -> None:
    data = embedded(analyzed_page)
    claims = {claim["letter"]: claim for claim in data["claims"]}
    assert claims["f"]["verdict"] == "undecided (n = 1)"
    assert [len(claims[letter]["charts"]) for letter in "abcdefg"] == [0, 0, 0, 0, 0, 1, 1]
    (group,) = claims["f"]["charts"]
    assert [chart["title"] for chart in group["charts"]] == ["top eigenvalue", "top eigenvalue × |w|²", "trace", "SAM"]
    scaled = {line["name"]: line for line in group["charts"][1]["series"]}
    assert scaled["LARS (schedule=warmup_cosine), seed 0"]["y"] == [500, 20000]
    assert scaled["LARS (schedule=warmup_cosine), seed 0"]["high"] == [550, 20200]
    assert "low" not in group["charts"][3]["series"][0]
    (noise,) = claims["g"]["charts"]
    assert noise["charts"][0]["series"][-1] == {"name": "1 / B", "color": 6, "x": [64, 256, 1024], "y": [4, 1, 0.25]}
    assert data["scope"] == [
        "classification: 0.61 epochs per run (the paper: 100); n = 1 seed for each recipe, so no spread between seeds "
        "is known."
    ]
    analyses = [run["analysis"] for cell in data["cells"].values() for run in cell["runs"]]
    assert sum(analysis is None for analysis in analyses) == 1
    found = next(analysis for analysis in analyses if analysis and len(analysis["tables"]) == 2)
    assert found["settings"]["settings"]["batch_norm"] == "train"
    assert found["tables"][0]["rows"][1][:2] == ["10", "2"]


@browser
def test_the_page_draws_the_analyses(analyzed_page: Path, tmp_path: Path) -> None:
    script = """
    const claims = [...document.querySelectorAll('#claims article')];
    const titles = (node) => [...node.querySelectorAll('figcaption')].map((one) => one.firstChild.textContent);
    const log = claims[6].querySelector('svg');
    const numbers = [...log.querySelectorAll('text')].map((one) => one.textContent);
    const places = [...log.querySelectorAll('circle')].slice(0, 3).map((one) => +one.getAttribute('cx'));
    const names = [...claims[6].querySelectorAll('.legend li')].map((one) => one.textContent);
    const rows = [...document.querySelectorAll('#results-classification tbody tr')];
    const opened = rows.map((row) => {
      row.querySelector('button').click();
      const dialog = document.getElementById('cell');
      const found = [...dialog.querySelectorAll('summary')].map((one) => one.textContent);
      const cells = dialog.querySelectorAll('details table td').length;
      dialog.close();
      return [found.includes('Sharpness and gradient noise of seed 0'), cells];
    });
    const scope = document.getElementById('scope').textContent;
    const shorts = [150000, 2e5, 12345, 0.00015, 1234.5].map(short);
    answer = {sharp: titles(claims[5]), noise: titles(claims[6])};
    answer = {...answer, ticks: numbers, places, legend: names, opened, scope, shorts};
    """
    answer = ask(analyzed_page, script, tmp_path)
    assert answer["sharp"] == ["top eigenvalue", "top eigenvalue × |w|²", "trace", "SAM"]
    assert answer["noise"] == ["LARS (schedule=warmup_cosine), seed 0"]
    assert {"64", "256", "1024"} <= set(answer["ticks"])
    left, middle, right = answer["places"]
    assert middle - left == pytest.approx(right - middle, abs=0.5)  # a logarithmic axis
    assert answer["legend"] == ["epoch 0", "epoch 0.102", "falling as 1 / B"]
    assert sorted(has for has, _ in answer["opened"]) == [False, True, True]
    assert max(cells for _, cells in answer["opened"]) == 2 * 10 + 6 * 5
    assert "the paper: 100" in answer["scope"]
    assert answer["shorts"] == ["1.5e5", "2e5", "1.2e4", "1.5e-4", "1235"]
