"""``ssl-bench ...``: thin commands, each importing what it needs only when it runs."""

import sys
from typing import Annotated

import typer

from ssl_bench import report_cli, study_cli

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Which optimizer for this method, data set and batch size, and how sure are we?",
)

# The tracks parse their own words (key=value, --help, --debug), the same as under accelerate launch.
_VERBATIM = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command(context_settings=_VERBATIM)
def pretrain(context: typer.Context) -> None:
    """Pretrain a backbone, then evaluate it."""
    from ssl_bench.pretrain import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=_VERBATIM)
def classify(context: typer.Context) -> None:
    """Train a classifier, supervised."""
    from ssl_bench.classify import main

    raise typer.Exit(main(context.args))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A finished run's folder.")],
    words: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. eval.protocols=[linear-aug-v1]")] = None,
    debug: Debug = False,
) -> None:
    """Evaluate a saved run, add to its record."""
    from ssl_bench.command import guarded
    from ssl_bench.evaluate import main

    raise typer.Exit(guarded(lambda: main(run, words or []), debug=debug))


@app.command()
def demo(
    folder: Annotated[str, typer.Option("--output", "-o", help="Folder for the runs and the plot.")] = "runs/demo",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.", min=1)] = 40,
    debug: Debug = False,
) -> None:
    """See it work: three optimizers on digits.

    Barlow Twins under LARS, LAMB and TVLARS on embedded data: no download, no GPU, under three minutes on two cores.
    """
    from ssl_bench.command import guarded
    from ssl_bench.demo import main

    raise typer.Exit(guarded(lambda: main(folder, steps), debug=debug))


study_cli.register(app)
report_cli.register(app)


def main() -> None:
    """The console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
