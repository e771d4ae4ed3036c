"""``ssl-bench study ...`` and ``ssl-bench tune ...``: their command lines."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ssl_bench.cli.options import Debug, expanded, finish

Name = Annotated[str, typer.Argument(help="A shipped study's name, or the path of a YAML file.", callback=expanded)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for every cell.")]
Runs = Annotated[str, typer.Option(help="Folder of all runs.", callback=expanded)]
Seeds = Annotated[str | None, typer.Option(help="Instead of the study's own, e.g. 0,1,2.")]
DataPath = Annotated[
    list[str] | None, typer.Option(help="DATASET=FOLDER: where to read that data set; repeat for several data sets.")
]
Launcher = Annotated[str, typer.Option(help="local or slurm.")]
Workers = Annotated[int | None, typer.Option(help="Cells to run at a time; left out: as many as fit.")]
PerGpu = Annotated[int, typer.Option(help="Cells that may share a GPU, as far as its memory allows.")]
Slurm = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE: timeout_min, gpus_per_node, cpus_per_task, mem_gb, or any parameter of sbatch."),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cells with an estimate of the time; run nothing.")]
PrintCommands = Annotated[
    bool, typer.Option("--print-commands", help="Print the missing cells' command lines; run nothing.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="The file may name code to import (package.module:Name) and paths to read.")
]


class _RunByDefault(TyperGroup):
    """A group that runs its first command where none is named: ``study table1`` is ``study run table1``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


study_app = typer.Typer(cls=_RunByDefault, no_args_is_help=True, rich_markup_mode=None)


@study_app.command()
def run(
    name: Name,
    overrides: Overrides = None,
    runs: Runs = "runs",
    seeds: Seeds = None,
    data_path: DataPath = None,
    launcher: Launcher = "local",
    workers: Workers = None,
    per_gpu: PerGpu = 1,
    slurm: Slurm = None,
    dry_run: DryRun = False,
    print_commands: PrintCommands = False,
    retry_failed: RetryFailed = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Run what is missing of a study; 'run' may be left out."""

    def command() -> int:
        from ssl_bench.study.run import study_main

        return study_main(
            name,
            runs=runs,
            overrides=overrides or [],
            seeds=_seeds(seeds),
            data_paths=_pairs("--data-path", data_path),
            launcher=launcher,
            workers=workers,
            per_gpu=per_gpu,
            slurm=_pairs("--slurm", slurm),
            dry_run=dry_run,
            print_commands=print_commands,
            retry_failed=retry_failed,
            trust=trust,
        )

    finish(command, debug)


@study_app.command()
def status(
    name: Name,
    overrides: Overrides = None,
    runs: Runs = "runs",
    seeds: Seeds = None,
    data_path: DataPath = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Show which cells of a study are done, running, failed, diverged or missing."""

    def command() -> int:
        from ssl_bench.study.run import status_main

        paths = _pairs("--data-path", data_path)
        seeds_given = _seeds(seeds)
        return status_main(name, runs=runs, overrides=overrides or [], seeds=seeds_given, data_paths=paths, trust=trust)

    finish(command, debug)


def tune(
    name: Annotated[
        str, typer.Argument(help="A shipped search's name, or the path of a YAML file.", callback=expanded)
    ],
    overrides: Overrides = None,
    runs: Runs = "runs",
    data_path: DataPath = None,
    workers: Workers = None,
    per_gpu: PerGpu = 1,
    retry_failed: RetryFailed = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Tune every optimizer with the same number of trials on held-out train images, then test once."""

    def command() -> int:
        from ssl_bench.study.tune import tune_main

        return tune_main(
            name,
            runs=runs,
            overrides=overrides or [],
            data_paths=_pairs("--data-path", data_path),
            workers=workers,
            per_gpu=per_gpu,
            retry_failed=retry_failed,
            trust=trust,
        )

    finish(command, debug)


def register(app: typer.Typer) -> None:
    """Adds the commands to ``ssl-bench``."""
    app.add_typer(study_app, name="study", help="Run a grid of recipes, or show its status.")
    app.command()(tune)


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--seeds must be integers with commas between them, e.g. 0,1,2, got {text!r}")
    return [int(part) for part in parts]


def _pairs(option: str, given: Sequence[str] | None) -> dict[str, str]:
    for text in given or ():
        if not all(text.partition("=")):
            raise ValueError(f"{option} must be KEY=VALUE, got {text!r}")
    return dict(text.split("=", 1) for text in given or ())
