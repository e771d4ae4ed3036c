"""The commands ``ssl-bench report``, ``ssl-bench leaderboard`` and ``ssl-bench export``."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssl_bench.cli.options import Debug, expanded, finish

if TYPE_CHECKING:
    from ssl_bench.records.reader import RunRecord


class Figures(StrEnum):
    """How many figures a report draws."""

    auto = "auto"
    all = "all"
    none = "none"


Runs = Annotated[str, typer.Argument(help="Folder of runs, at any depth.", callback=expanded)]


def register(app: typer.Typer) -> None:
    """Adds the report's commands."""
    app.command()(report)
    app.command()(leaderboard)
    app.command()(export)


def report(
    runs: Runs,
    study: Annotated[
        str | None,
        typer.Option(help="Only the runs of this study (a name or a YAML file); lists missing ones."),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the report.", callback=expanded)] = "report",
    figures: Annotated[
        Figures, typer.Option(help="all, none, or auto: all of them, or of more than 200 runs the first six.")
    ] = Figures.auto,
    debug: Debug = False,
) -> None:
    """Write the report of a folder of runs.

    Tables, figures, checked claims and one web page, from the runs' records alone.
    """

    def write() -> int:
        from ssl_bench.report.build import write_report

        print(write_report(runs, output, study=study, figures=figures.value))
        return 0

    finish(write, debug)


def leaderboard(runs: Runs, debug: Debug = False) -> None:
    """Print the ranking of the optimizers."""

    def show() -> int:
        from ssl_bench.report.leaderboard import print_leaderboard

        print_leaderboard(runs)
        return 0

    finish(show, debug)


def export(
    runs: Runs,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the copies of the records.", callback=expanded)
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", help="Instead: folder for one run's backbone, as timm and the hub load it.", callback=expanded
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", help="With --to: upload the folder to the Hugging Face hub as OWNER/NAME too."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="With --output: with the layers' statistics, or without.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Copy the runs' records, without weights; or a run's backbone.

    The records are small enough to commit or to send, with local paths shortened; report and leaderboard read the
    copies like the runs. With --to: weights, timm's configuration with this run's mean, std and size, and a model card.
    With --push the hub gets these three files, in a private repository where there is none yet.
    """

    def copy() -> int:
        if (output is None) == (to is None):
            raise ValueError("export: give one of --output (records) and --to (a backbone)")
        if to is not None:
            from ssl_bench.records import publish

            folder = publish.publish(runs, to, _images_of, repo=push)
            print(folder if push is None else publish.push(folder, push))
            return 0
        if push is not None:
            raise ValueError("export: --push needs --to, the folder to upload")
        from ssl_bench.records.export import export_records

        assert output is not None
        print(f"{len(export_records(runs, output, layers=layers))} records in {output}")
        return 0

    finish(copy, debug)


def _images_of(record: "RunRecord") -> dict[str, Any]:
    """The images' mean, std and size from the data itself, for records of before they said it."""
    from ssl_bench.recipe.compose import build
    from ssl_bench.training import build as training

    recipe = build(record.recipe["track"], record.recipe)
    return training.about_images(recipe, training.dataset(recipe, training.processes(recipe)))
