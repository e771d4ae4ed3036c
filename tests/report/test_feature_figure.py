"""The figure of the features: which runs it shows, and that odd or missing pictures cost nothing else."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic_runs import evaluation, write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import Collection, gather
from ssl_bench.report.build import Loader, report_of
from ssl_bench.report.curves import load_curves
from ssl_bench.report.figures.features import PANELS, features, panels_of
from ssl_bench.report.figures.plates import write_figures
from ssl_bench.report.page import write_page


def column(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def picture(model: str = "trained", n: int = 30, protocol: str = "pca-2d-v1", **points: Any) -> dict[str, Any]:
    """An entry of results.json's evaluations."""
    made = {
        "scale": 2.5,
        "x": column(37 * i % 2001 - 1000 for i in range(n)),
        "y": column(91 * i % 2001 - 1000 for i in range(n)),
        "label": column(i % 3 for i in range(n)),
        "classes": ["cat", "dog", "$ship$"],
    }
    metrics = {"explained": 45.0, "explained_1": 30.0, "explained_2": 15.0, "n_test": n}
    return {"protocol": protocol, "model": model, "metrics": metrics, "points": made | points, "n_test": n}


def run(folder: Path, top1: float, *pictures: dict[str, Any], **settings: Any) -> None:
    scores = [evaluation("linear-cached-v1", "trained", top1, 10.0, ()), *pictures]
    write_run(folder, track="pretrain", evaluations=scores, steps=30, telemetry=False, **settings)


def collected(folder: Path) -> Collection:
    return gather(*find_runs(folder))


def test_each_method_and_optimizer_at_its_best_beside_an_untrained_network(tmp_path: Path) -> None:
    both = picture(), picture("untrained")
    run(tmp_path / "a", 50.0, *both, lr=1.0)
    run(tmp_path / "b", 60.0, *both, lr=2.0, batch_size=1024)
    run(tmp_path / "c", 55.0, *both, optimizer="tvlars", seed=4)
    run(tmp_path / "d", 40.0, *both, method="simclr")
    run(tmp_path / "e", 70.0, lr=3.0)  # the best of all, without a picture
    panels = panels_of(collected(tmp_path))
    assert list(panels) == [("pca-2d-v1", "cifar10")]
    titles = [panel.title for panel in panels["pca-2d-v1", "cifar10"]]
    assert titles[0] == "untrained\nseed 0; 30% + 15%"
    assert titles[1:] == [
        "barlow_twins, LARS\nB = 512, seed 0; 30% + 15%",
        "barlow_twins, TVLARS\nB = 512, seed 4; 30% + 15%",
        "simclr, LARS\nB = 512, seed 0; 30% + 15%",
    ]


def test_the_figure_is_written_linked_and_says_what_it_shows(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "a", 50.0, picture(), picture("untrained"), picture(protocol="pca-2d-v1@stl10"))
    collection = collected(tmp_path / "runs")
    plates, undrawn = write_figures(collection, lambda result: load_curves(result.record), tmp_path / "figures")
    assert undrawn == []
    plate, other = (plate for plate in plates if plate.name.startswith("features"))
    assert plate.name == "features-pca-2d-v1-cifar10"
    assert plate.title == "Features of cifar10's test images, in two dimensions"
    assert other.title == "Features of stl10's test images, in two dimensions"
    assert "n = 30 fixed test images by pca-2d-v1;" in plate.caption
    with Image.open(tmp_path / "figures" / f"{plate.name}.png") as image:
        assert image.width > 500
    svg = (tmp_path / "figures" / f"{plate.name}.svg").read_text()
    for text in ("untrained", "barlow_twins, LARS", "cat", "dog", "$ship$"):
        assert text in svg
    assert len(svg) < 100_000  # the points are pixels


def test_runs_without_a_picture_have_no_such_figure(collection: Collection) -> None:
    assert list(features(collection)) == []


@pytest.mark.parametrize(
    "points",
    [
        {"x": "1.5 " * 30}, {"x": "2000 " * 30}, {"y": "1"}, {"label": "-1 " * 30}, {"label": "a " * 30}, {"x": 5},
        {"x": ["1"] * 30}, {"classes": [1, 2]}, {"x": "", "y": "", "label": ""}, {"x": "1" * 10**6},
    ],
)  # fmt: skip
def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path, points: dict[str, Any]) -> None:
    run(tmp_path / "bad", 50.0, picture(**points))
    run(tmp_path / "good", 40.0, picture(), method="simclr")
    (panels,) = panels_of(collected(tmp_path)).values()
    assert [panel.title.split("\n")[0] for panel in panels] == ["simclr, LARS"]


def test_many_panels_and_classes_are_cut_and_said(tmp_path: Path) -> None:
    many = picture(label=column(i % 12 for i in range(30)), classes=[])
    for number in range(PANELS + 1):
        run(tmp_path / str(number), 50.0, many, method=f"m{number}")
    ((plate, figure),) = features(collected(tmp_path))
    assert sum(axis.get_visible() for axis in figure.axes) == PANELS
    assert plate.caption.endswith(
        f"The first 10 of 12 classes in colour, the others grey. The first {PANELS} of {PANELS + 1} panels."
    )
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f"class {number}" for number in range(10)]


def test_the_page_does_not_repeat_the_points(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "a", 50.0, picture(scale=123.456))
    collection = collected(tmp_path / "runs")
    page = write_page(report_of(collection, Loader(), None, tmp_path / "runs"), tmp_path / "index.html")
    text = page.read_text()
    assert '"protocol":"pca-2d-v1"' in text
    assert "123.456" not in text
    assert not re.search(r'"points":\{', text)
