"""Figures: what they show, and that odd records do not break them."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from synthetic_runs import LAYERS, analysis_of, write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import Collection, gather
from ssl_bench.report.comparisons import arms
from ssl_bench.report.curves import load_curves, load_metrics, short_names, thin
from ssl_bench.report.figures import plates as plates_module
from ssl_bench.report.figures.accuracy import best_by_batch_size
from ssl_bench.report.figures.drawing import PALETTE, legend_below, looks_of, save, style
from ssl_bench.report.figures.plates import demo_figure, write_figures
from ssl_bench.report.figures.sharpness import sharpness_figures
from ssl_bench.report.tables import name_of


def test_curves_are_the_record(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=40)
    curves = load_curves(tmp_path / "run")
    assert curves.layers == LAYERS
    assert curves.steps.tolist() == list(range(1, 41))
    assert curves.telemetry["weight_norm"].shape == (40, len(LAYERS))
    assert curves.telemetry["weight_norm"][0].tolist() == pytest.approx([8, 10, 12, 14, 16])
    steps, top1 = curves.metric("test_top1")
    assert steps.tolist() == [10, 20, 30, 40]
    assert top1[-1] == pytest.approx(70 * (1 - 2.718281828**-4))
    assert curves.metric("test_top1", "samples")[0].tolist() == [5120, 10240, 15360, 20480]
    assert curves.metric("online_top1")[0].size == 0
    assert not curves.has("phi")  # LARS has none
    assert curves.has("raw_ratio")


def test_both_readers_of_metrics_give_the_same(tmp_path: Path) -> None:
    """Arrow's, and the one line by line for what Arrow does not read: a word for a number, a line cut short."""
    write_run(tmp_path / "run", telemetry=False)
    path = tmp_path / "run" / "metrics.jsonl"
    fast = load_metrics(tmp_path / "run")
    path.write_text(path.read_text() + '{"step": 65, "lo')
    slow = load_metrics(tmp_path / "run")
    assert fast.keys() == slow.keys()
    for name, values in fast.items():
        np.testing.assert_array_equal(values, slow[name])
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": "nan"}\n{"step": 3, "loss": 1e300, "top1": 4}\n')
    odd = load_metrics(tmp_path / "run")
    np.testing.assert_array_equal(odd["loss"], [2.5, np.nan, np.nan])
    np.testing.assert_array_equal(odd["top1"], [np.nan, np.nan, 4.0])
    path.write_text('{"step": 2}\n{"step": 1}\n')
    with pytest.raises(ValueError, match="steps do not ascend"):
        load_metrics(tmp_path / "run")


def test_a_run_without_telemetry_has_no_layers(tmp_path: Path) -> None:
    write_run(tmp_path / "run", telemetry=False)
    curves = load_curves(tmp_path / "run")
    assert curves.layers == ()
    assert not curves.has("weight_norm")


def test_names_are_shortened_and_stay_unique() -> None:
    assert short_names(["backbone.conv1.weight", "backbone.layer2.0.downsample.0.weight", "projector.0.weight"]) == [
        "conv1",
        "layer2.0.downsample",
        "projector.0",
    ]
    assert short_names(["backbone.fc.weight", "fc.weight", "fc.bias"]) == ["backbone.fc.weight", "fc.weight", "fc.bias"]


def test_thinning_keeps_the_ends() -> None:
    assert thin(5, 10).tolist() == [0, 1, 2, 3, 4]
    kept = thin(1001, 11)
    assert kept.tolist() == list(range(0, 1001, 100))


def test_demo_figure_shows_several_runs(tmp_path: Path) -> None:
    for optimizer in ("lars", "lamb", "tvlars"):
        write_run(tmp_path / optimizer, optimizer=optimizer)
    write_run(tmp_path / "bad", status="diverged", telemetry=False)
    runs = {name.upper(): tmp_path / name for name in ("lars", "lamb", "tvlars", "bad")}
    path = demo_figure(runs, tmp_path / "demo.png")
    with Image.open(path) as image:
        assert image.width > image.height > 500
    svg = demo_figure(runs, tmp_path / "demo.svg").read_text()
    for text in ("LARS", "TVLARS", "training loss", "not recorded", "layer, from the input"):
        assert text in svg
    assert "dc:date" not in svg


def test_demo_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs"):
        demo_figure({}, tmp_path / "demo.png")


def test_every_group_has_its_figure(collection: Collection, tmp_path: Path) -> None:
    plates, _ = write_figures(collection, lambda result: load_curves(result.record), tmp_path)
    assert [plate.name for plate in plates] == [
        "best-accuracy",
        "profiles",
        "accuracy-classification-cifar10-512",
        "learning-rate-classification-cifar10",
        "learning-rate-barlow_twins-cifar10",
        "phi",
        "layers-classification-cifar10-512-LARS",
        "layers-classification-cifar10-512-TVLARS",
    ]
    for plate in plates:
        with Image.open(tmp_path / f"{plate.name}.png") as image:
            assert image.width > 500
    layers = (tmp_path / "layers-classification-cifar10-512-LARS.svg").read_text()
    for text in ("lr 3, seed 0", "layer2.0.downsample", "weight norm", "relative step", "test", "step"):
        assert text in layers
    assert "training time (s)" in (tmp_path / "accuracy-classification-cifar10-512.svg").read_text()


def test_lambda_has_a_figure_where_it_varies(tmp_path: Path) -> None:
    for decay in (1e-5, 1e-2):
        for batch_size in (1024, 16384):
            for lr in (1.0, 2.0):
                name = tmp_path / f"{decay}-{batch_size}-{lr}"
                settings = {"decay": decay, "batch_size": batch_size, "lr": lr, "steps": 20}
                write_run(name, optimizer="tvlars", telemetry=False, **settings)  # type: ignore[arg-type]
    collection = gather(*find_runs(tmp_path))
    plates, _ = write_figures(collection, lambda result: load_curves(result.record), tmp_path / "figures")
    names = [plate.name for plate in plates if plate.name.startswith("lambda")]
    assert names == [
        "lambda-classification-cifar10",
        "lambda-by-batch-size-classification-cifar10",
        "lambda-curves-0.01-classification-cifar10",
        "lambda-curves-1e-05-classification-cifar10",
    ]
    matrix = (tmp_path / "figures" / f"{names[1]}.svg").read_text()
    for text in (
        "B = 1024, λ = 0.01",
        "B = 1024, λ = 1e-05",
        "B = 16384, λ = 0.01",
        "B = 16384, λ = 1e-05",
        "lr 1",
        "lr 2",
    ):
        assert text in matrix
    assert "B = 16384" in (tmp_path / "figures" / f"{names[2]}.svg").read_text()


def test_with_and_without_a_warmup_are_side_by_side_at_each_rate(tmp_path: Path) -> None:
    for lr in (1.0, 2.0, 3.0):
        write_run(tmp_path / f"wa{lr}", lr=lr, telemetry=False)
        if lr < 3:
            schedule = {"target": "polynomial", "power": 1.0}
            write_run(tmp_path / f"nowa{lr}", lr=lr, telemetry=False, schedule=schedule)
    collection = gather(*find_runs(tmp_path))
    plates, _ = write_figures(collection, lambda result: load_curves(result.record), tmp_path / "figures")
    assert "warmup-classification-cifar10-512" in [plate.name for plate in plates]
    svg = (tmp_path / "figures" / "warmup-classification-cifar10-512.svg").read_text()
    for text in ("lr 1", "lr 2", "schedule=warmup_cosine", "schedule=polynomial"):
        assert text in svg
    assert "lr 3" not in svg  # it ran with a warm-up alone


def test_no_two_arms_of_a_plate_look_alike_and_an_optimizer_keeps_its_colour() -> None:
    arms = [("LARS", f"LARS ({variant})") for variant in range(30)] + [
        (f"opt{index}", f"opt{index}") for index in range(9)
    ]
    looks = looks_of(arms)
    assert len(set(looks.values())) == len(arms)
    assert {looks[f"LARS ({variant})"].color for variant in range(30)} == {looks["LARS (0)"].color}
    assert looks_of(arms[:1])["LARS (0)"] == looks["LARS (0)"]
    assert len(set(looks_of(("LARS", str(variant)) for variant in range(280)).values())) == 280


def test_a_legend_has_every_curve_and_makes_room_for_itself(tmp_path: Path) -> None:
    names = [f"LARS (optimizer.decay={index})" for index in range(40)]
    looks = looks_of(("LARS", name) for name in names)
    with style():
        figure = Figure(figsize=(5, 3), layout="constrained")
        axis = figure.subplots()
        legend_below(figure, looks=looks, shown=names)
        save(figure, tmp_path / "figure.png")
    assert len(figure.legends[0].get_texts()) == 40
    assert axis.get_window_extent().height > 1.5 * figure.dpi  # the panel keeps its height


def test_of_a_large_study_the_first_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plates_module, "MANY_RUNS", 1)
    monkeypatch.setattr(plates_module, "FEW_FIGURES", 2)
    for seed in range(2):
        write_run(tmp_path / f"{seed}", seed=seed, telemetry=False)
    collection = gather(*find_runs(tmp_path))

    def drawn(choice: plates_module.Choice) -> int:
        return len(write_figures(collection, lambda run: load_curves(run.record), tmp_path / "f", choice=choice)[0])

    assert (drawn("none"), drawn("auto")) == (0, 2)
    assert drawn("all") > 2


def test_a_figure_that_cannot_be_drawn_costs_only_itself(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plates_module.accuracy, "profiles", fails)
    plates, problems = write_figures(collection, lambda run: load_curves(run.record), tmp_path)
    assert "profiles" not in [plate.name for plate in plates]
    assert len(plates) == 7
    assert [problem.reason for problem in problems] == ["a figure of the kind 'fails' could not be drawn: no such luck"]


def fails(*_: object) -> None:
    raise ZeroDivisionError("no such luck")


def test_an_analysis_has_its_figures(tmp_path: Path) -> None:
    noise = {64: 4.0, 256: 1.0, 1024: 0.3}
    write_run(tmp_path / "a", telemetry=False, analysis=analysis_of((5, 10), (50, 20), noise=noise))
    write_run(tmp_path / "b", telemetry=False, optimizer="tvlars", analysis=analysis_of((5, 10), (500, 20)))
    write_run(tmp_path / "c", telemetry=False, lr=2.0, analysis=analysis_of((5, 10), noise=noise))
    write_run(tmp_path / "d", telemetry=False, lr=3.0, batch_size=1024)
    collection = gather(*find_runs(tmp_path))
    plates, _ = write_figures(collection, lambda result: load_curves(result.record), tmp_path / "figures")
    names = [plate.name for plate in plates if plate.name.startswith(("sharpness", "gradient-noise"))]
    assert names == ["sharpness-classification-cifar10-512", "gradient-noise-classification-cifar10-512"]
    assert "batch norm in train mode, 512 images" in next(p.caption for p in plates if p.name == names[0])
    sharp = (tmp_path / "figures" / f"{names[0]}.svg").read_text()
    for text in ("lr 1", "lr 2", "Hessian trace", "SAM sharpness", "epoch", "LARS", "TVLARS"):
        assert text in sharp
    noisy = (tmp_path / "figures" / f"{names[1]}.svg").read_text()
    for text in ("epoch 0.102", "batch size B (images)", "1024"):
        assert text in noisy
    assert "TVLARS" not in noisy  # it has no noise
    for name in names:
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert image.width > 500


def test_an_optimizer_has_one_colour_on_every_figure(tmp_path: Path) -> None:
    """Also where a figure shows a part of the runs: only TVLARS, the second of this report, has an analysis."""
    write_run(tmp_path / "a", telemetry=False)
    write_run(tmp_path / "b", telemetry=False, optimizer="tvlars", analysis=analysis_of((5, 10), (500, 20)))
    collection = gather(*find_runs(tmp_path))
    looks = looks_of((cell.optimizer, cell.arm) for cell in collection.cells)
    ((_, sharp),) = sharpness_figures(collection, looks)
    ((_, best),) = best_by_batch_size(arms(collection))
    drawn = [line.get_color() for axis in sharp.axes for line in axis.get_lines() if len(line.get_xdata()) > 1]
    assert set(drawn) == {PALETTE[1]} == {looks["TVLARS"].color}
    entries = {line.get_label(): line.get_color() for line in best.legends[0].get_lines()}
    assert entries["TVLARS"] == PALETTE[1]


def test_sharpness_without_its_columns_is_noted(tmp_path: Path) -> None:
    found = {"sharpness": [{"step": 0, "top_eigenvalue": 3.0}, {"step": 60, "top_eigenvalue": -1.0}]}
    write_run(tmp_path / "a", telemetry=False, analysis=found)
    write_figures(gather(*find_runs(tmp_path)), lambda result: load_curves(result.record), tmp_path)
    svg = (tmp_path / "sharpness-classification-cifar10-512.svg").read_text()
    assert svg.count("not measured") == 3


def test_long_variants_have_short_file_names_and_legends_that_fit(tmp_path: Path) -> None:
    """A variant may name many keys: a file's name must stay below 255 bytes, a legend inside its figure."""
    long, other = (f"LARS ({'-'.join(f'key{index}={value}' for index in range(40))})" for value in (1, 2))
    assert len({name_of("layers", long), name_of("layers", other), name_of("layers", long[:50])}) == 3
    assert max(len(name_of("layers", name)) for name in (long, other)) == 100
    with style():
        figure = Figure(figsize=(5, 3), layout="constrained")
        axis = figure.subplots()
        for name in (long, other, "TVLARS"):
            axis.plot([0, 1], [0, 1], label=name)
        legend_below(figure, axis)
        save(figure, tmp_path / "figure.png")  # a warning that nothing fits would be an error here
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
