"""``ssl-bench demo``: the whole path in minutes, without a download or a GPU."""

import shutil
import time
from pathlib import Path

from ssl_bench.recipe.compose import compose
from ssl_bench.records.reader import RunRecord, read_run
from ssl_bench.runtime.console import duration

# Sized for two minutes on two CPU cores, and so that what was learned can be seen. Digits have no colours, their mirror
# images are other shapes, and a small crop is meaningless: under the default augmentation features become worse than
# random ones. With all labels random features do as well; with one label a class they do not.
COMMON = (
    "data=digits",
    "model.name=test_resnet",  # timm's smallest, 0.5 million parameters
    "model.stem=imagenet",
    "method=simclr",
    "method.projector=[512,512]",
    "batch_size=256",
    "augment.crop_scale=[0.4,1]",
    "augment.flip=0",
    "augment.jitter_p=0",
    "augment.gray_p=0",
    "augment.solarize_p=[0,0]",
    "eval.protocols=[knn-v1,few-shot-v1]",
    "telemetry.every=1",
    "log_every=2",
)
# Learning rates for this data and length alone, chosen by `ssl-bench tune demo` on train images that were held out.
OPTIMIZERS = {
    "LARS": ("optimizer=lars", "optimizer.lr=15"),
    "LAMB": ("optimizer=lamb", "optimizer.lr=0.013"),
    "TVLARS": ("optimizer=tvlars", "optimizer.variant=paper", "optimizer.delay_fraction=0.1", "optimizer.lr=8"),
}

# The table's columns: protocol and metric. One percent of the digits' labels is one of each class.
SCORES = {
    "kNN, all labels": ("knn-v1", "top1"),
    "10% of labels": ("few-shot-v1", "top1_10pct"),
    "1 label a class": ("few-shot-v1", "top1_1pct"),
}


def main(folder: str | Path, steps: int) -> int:
    """Trains, evaluates, and prints one table; returns the exit code.

    Args:
        folder: where the three runs and ``demo.png`` go; an earlier demo there is replaced.
        steps: optimizer steps of each run, of 256 images each.

    Raises:
        ValueError: the folder holds something other than an earlier demo.
    """
    from ssl_bench.pretrain import run
    from ssl_bench.report.figures.plates import demo_figure

    folder, start = Path(folder), time.monotonic()
    _clear(folder)
    records: dict[str, RunRecord] = {}
    for number, (label, choice) in enumerate(OPTIMIZERS.items()):
        # The untrained backbone is the same for all three: it is evaluated once.
        overrides = [*COMMON, *choice, f"steps={steps}", f"run_dir={folder / label.lower()}"]
        code = run(compose("pretrain", [*overrides, f"eval.baseline={str(number == 0).lower()}"]))
        if code:
            return code
        records[label] = read_run(folder / label.lower())
    demo_figure({label: record.folder for label, record in records.items()}, folder / "demo.png")
    _print(records, steps)
    print(f"{duration(time.monotonic() - start)}; loss and trust ratios: {folder / 'demo.png'}")
    return 0


def _clear(folder: Path) -> None:
    ours = {label.lower() for label in OPTIMIZERS} | {"demo.png"}
    if folder.exists():
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
        if foreign:
            raise ValueError(
                f"--output must be a new directory or an earlier demo's, got {folder}, which holds {foreign[0]!r}"
            )
        shutil.rmtree(folder)


def _print(records: dict[str, RunRecord], steps: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"SimCLR on 1,797 handwritten digits, {steps} steps of 256, seed 0 (n = 1)",
        caption="test images, top-1 %; ± is the deviation over 5 draws of the labelled images",
    )
    for column in ("optimizer", "last loss", *SCORES):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    table.add_row("random init", "", *_scores(next(iter(records.values())), "untrained"), end_section=True)
    for label, record in records.items():
        loss = f"{record.metrics[-1]['loss']:.2f}" if record.metrics else ""
        cells = [record.status] * len(SCORES) if record.status == "diverged" else _scores(record, "trained")
        table.add_row(label, loss, *cells)
    Console(highlight=False).print(table)


def _scores(record: RunRecord, model: str) -> list[str]:
    entries = (record.results or {}).get("evaluations", [])
    metrics = {entry["protocol"]: entry["metrics"] for entry in entries if entry["model"] == model}
    cells = []
    for protocol, name in SCORES.values():
        found = metrics.get(protocol, {})
        deviation = f" ± {found[name + '_sd']:.1f}" if name + "_sd" in found else ""
        cells.append(f"{found[name]:.1f}{deviation}" if name in found else "-")
    return cells
