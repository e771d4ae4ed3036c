"""``ssl-bench demo``: the whole path in minutes, without a download or a GPU."""

import shutil
from pathlib import Path

from ssl_bench.recipe.compose import compose
from ssl_bench.records.reader import RunRecord, read_run

# Sized for minutes on two CPU cores (1.5 where they have bf16 instructions, 5.5 where not). Digits have no colours,
# their mirror images are other shapes, and a small crop is meaningless: with the default augmentation, pretraining
# makes the features worse than random ones. The learning rates were chosen for this data set and length and say nothing
# about others.
COMMON = (
    "data=digits",
    "model.stem=imagenet",
    "method=barlow_twins",
    "batch_size=256",
    "precision=bf16",
    "augment.crop_scale=[0.4,1]",
    "augment.flip=0",
    "augment.jitter_p=0",
    "augment.gray_p=0",
    "augment.solarize_p=[0,0]",
    "eval.protocols=[knn-v1,linear-cached-v1]",
    "telemetry.every=1",
    "log_every=2",
)
OPTIMIZERS = {
    "LARS": ("optimizer=lars", "optimizer.lr=2"),
    "LAMB": ("optimizer=lamb", "optimizer.lr=0.002"),
    "TVLARS": ("optimizer=tvlars", "optimizer.variant=paper", "optimizer.lr=2"),
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

    folder = Path(folder)
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
    print(f"loss and trust ratios: {folder / 'demo.png'}")
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

    table = Table(title=f"Barlow Twins on 1,797 handwritten digits, {steps} steps of 256, seed 0 (n = 1)")
    for column in ("optimizer", "last loss", "kNN top-1 %", "linear top-1 %"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    baseline = _accuracies(next(iter(records.values())), "untrained")
    table.add_row("random init", "", *baseline, end_section=True)
    for label, record in records.items():
        loss = f"{record.metrics[-1]['loss']:.1f}" if record.metrics else ""
        cells = [record.status] * 2 if record.status == "diverged" else _accuracies(record, "trained")
        table.add_row(label, loss, *cells)
    Console(highlight=False).print(table)


def _accuracies(record: RunRecord, model: str) -> list[str]:
    entries = (record.results or {}).get("evaluations", [])
    top1 = {entry["protocol"]: entry["metrics"]["top1"] for entry in entries if entry["model"] == model}
    return [f"{top1[name]:.2f}" if name in top1 else "-" for name in ("knn-v1", "linear-cached-v1")]
