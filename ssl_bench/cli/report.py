"""The commands ``ssl-bench report``, ``ssl-bench leaderboard`` and ``ssl-bench export``."""

from enum import StrEnum
from typing import Annotated

import typer

from ssl_bench.cli.paths import expanded


class Figures(StrEnum):
    """How many figures a report draws."""

    auto = "auto"
    all = "all"
    none = "none"


Runs = Annotated[str, typer.Argument(help="Folder of runs, at any depth.", callback=expanded)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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
        Figures, typer.Option(help="all, none, or auto: all of them, or of more than 200 runs the first eight.")
    ] = Figures.auto,
    debug: Debug = False,
) -> None:
    """Write the report of a folder of runs.

    Tables, figures, checked claims and one web page, from the runs' records alone.
    """
    from ssl_bench.recipe.command import guarded

    def write() -> int:
        from ssl_bench.report.build import write_report

        print(write_report(runs, output, study=study, figures=figures.value))
        return 0

    raise typer.Exit(guarded(write, debug=debug))


def leaderboard(runs: Runs, debug: Debug = False) -> None:
    """Print the ranking of the optimizers."""
    from ssl_bench.recipe.command import guarded

    def show() -> int:
        from ssl_bench.report.build import print_leaderboard

        print_leaderboard(runs)
        return 0

    raise typer.Exit(guarded(show, debug=debug))


def export(
    runs: Runs,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the copies.", callback=expanded)],
    debug: Debug = False,
) -> None:
    """Copy the runs' records, without weights.

    Small enough to commit or to send, with local paths shortened; report and leaderboard read the copies like the runs.
    """
    from ssl_bench.recipe.command import guarded

    def copy() -> int:
        from ssl_bench.records.export import export_records

        print(f"{len(export_records(runs, output))} records in {output}")
        return 0

    raise typer.Exit(guarded(copy, debug=debug))
