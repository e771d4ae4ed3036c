"""Text of somebody else's record in every format that the report writes: it stays text."""

import csv
import html
import io
import json
import re
import shutil
import subprocess
import xml.dom.minidom
from pathlib import Path

import pytest
from synthetic_runs import write_run
from typer.testing import CliRunner

from ssl_bench.cli.app import app
from ssl_bench.report.build import write_report
from ssl_bench.report.tables import Table

HOSTILE = (
    "\n\\input{/etc/passwd}\n",
    "\\write18{id} $\\frac{ $ %",
    '=HYPERLINK("x")',
    "@SUM(1)",
    "-1+cmd|' /C calc'!A0",
    "|a|\n\n# heading\n![x](http://x/y.png) <img src=x onerror=alert(1)>",
    "</script><script>document.title='taken'</script>",
    "\x1b[31mred\x07 [bold]rich[/bold] :bomb: \x00\u202egnp.exe",
    "**bold** `code` ../../etc/passwd",
    "\ud800 half",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs whose optimizer, method, data set, options, protocol and folders bear these names."""
    folder = tmp_path_factory.mktemp("hostile")
    for index, name in enumerate(HOSTILE):
        plain = name.encode("utf-8", "ignore").decode().replace("/", "").replace("\0", "")
        run = folder / "runs" / f"{index}-{plain[:60]}"
        write_run(run, track="pretrain", lr=1.0 + index % 2, telemetry=index == 0, steps=10)
        head = json.loads((run / "run.json").read_text())
        head["recipe"]["optimizer"]["target"] = f"my_pkg:{name}"
        head["recipe"]["optimizer"]["note"] = name
        if index % 3 == 0:
            head["recipe"]["method"]["target"] = name
        (run / "run.json").write_text(json.dumps(head))
        if "\x1b" in name:  # of one alone: each protocol has columns, for which a terminal has no room
            results = json.loads((run / "results.json").read_text())
            results["evaluations"].append({"protocol": name, "metrics": {"top1": 50.0}})
            (run / "results.json").write_text(json.dumps(results))
        if index % 2 == 0:  # and again with another note, so that notes become variants
            shutil.copytree(run, run.with_name(f"{index}-again"))
            head["recipe"]["optimizer"]["note"] = f"again {name}"
            (run.with_name(f"{index}-again") / "run.json").write_text(json.dumps(head))
    (folder / "runs" / "broken\n\\input{x}").mkdir()
    (folder / "runs" / "broken\n\\input{x}" / "run.json").write_text("[")
    write_report(folder / "runs", folder / "out", figures="all")
    return folder / "out"


def test_file_names_are_plain(report: Path) -> None:
    names = [str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()]
    assert len(names) > 30
    assert all(re.fullmatch(r"((tables|figures)/)?[A-Za-z0-9._-]+", name) and ".." not in name for name in names)


def test_latex_executes_nothing(report: Path) -> None:
    for path in (report / "tables").glob("*.tex"):
        text = path.read_text()
        assert not re.search(r"\\(input|write18|frac)", text), path.name
        lines = text.splitlines()
        begin = next(index for index, line in enumerate(lines) if line.startswith(r"\begin{table}"))
        assert all(line.startswith("%") for line in lines[:begin])  # no note has broken out of its comment
        for line in lines[begin:]:  # a line is a rule, a row or the caption, and its specials are escaped
            ours = (r"\begin{", r"\end{", r"\caption{", r"\centering", r"\resizebox{\ifdim")
            assert line.endswith((r"\\", "rule")) or line.startswith(ours), line
            assert len(re.findall(r"(?<!\\)\$", line)) % 2 == 0
            assert not re.search(r"(?<!\\)[%#]", line)


def test_csv_computes_nothing(report: Path) -> None:
    written = 0
    for path in (report / "tables").glob("*.csv"):
        for record in csv.DictReader(io.StringIO(path.read_text())):
            for value in record.values():
                number = re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|-?inf", value)
                assert number or not value.startswith(("=", "+", "-", "@", "\t", "\r")), (path.name, value)
                written += value.startswith("'=")
    assert written


def test_markdown_shows_text(report: Path) -> None:
    for path in [report / "report.md", *(report / "tables").glob("*.md")]:
        text = path.read_text()
        assert not re.search(r"(?<!\\)<(img|script|/script)", text), path.name
        assert not re.search(r"(?<![\\!])!\[x\]", text.replace(r"\[", "")), path.name
        assert "\n# heading" not in text
        assert "\x1b" not in text
        assert "\x00" not in text
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # every row has its header's columns
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1


def test_html_runs_no_scripts_of_records(report: Path, tmp_path: Path) -> None:
    page = (report / "index.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img src=x" not in page
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium here")
    probe = "<script>document.body.dataset.answer = JSON.stringify([document.title, document.images.length])</script>"
    copy = tmp_path / "copy.html"
    copy.write_text(page.replace("</body>", probe + "</body>"))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", copy.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title, images = json.loads(html.unescape(re.search(r'data-answer="([^"]*)"', dumped)[1]))  # type: ignore[index]
    assert title == "ssl_bench report"
    assert images == len(re.findall("data:image/svg", page))  # the figures, and no picture of a record's


def test_figures_are_sound_and_their_text_is_no_mathematics(report: Path) -> None:
    figures = list((report / "figures").glob("*.svg"))
    assert len(figures) > 3
    for path in figures:
        xml.dom.minidom.parse(str(path))
    texts = "".join(path.read_text() for path in figures)
    assert "write18{id} $\\frac{ $" in html.unescape(texts)


def test_the_terminal_is_not_commanded(report: Path) -> None:
    answer = CliRunner().invoke(app, ["leaderboard", str(report.parent / "runs")])
    assert answer.exit_code == 0, answer.output
    assert "\x1b" not in answer.output
    assert "\x07" not in answer.output
    assert "\N{BOMB}" not in answer.output
    assert "[bold]rich" in answer.output.replace("\n", "")


def test_a_number_in_stars_is_bold_and_nothing_else() -> None:
    table = Table("t", "t", ("a",), (), [("**1.50** **x**",)])
    assert r"**1.50** \*\*x\*\*" in table.markdown()
    assert r"\textbf{1.50} **x**" in table.latex()
