"""``ssl-bench ...``: thin commands, each importing what it needs only when it runs."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ssl_bench.cli import data, report, study
from ssl_bench.cli.options import Debug, expanded, finish

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)

# The tracks parse their own arguments (key=value, --help, --debug), so that they work under accelerate launch too.
_VERBATIM = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

Trust = Annotated[
    bool, typer.Option("--trust", help="The record may name code to import (package.module:Name) and paths to read.")
]


def _version(asked: bool) -> None:
    if asked:
        from ssl_bench import __version__

        print(f"ssl_bench {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Which optimizer for this method, data set and batch size, and how sure are we?"""


@app.command(name="list")
def list_(
    what: Annotated[
        str | None,
        typer.Argument(help="methods, optimizers, schedules, evaluators, data, models or studies; all if left out."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show what can be named: built in, in configs/, or installed."""

    from ssl_bench.cli.listing import main

    finish(lambda: main(what), debug)


@app.command(context_settings=_VERBATIM)
def pretrain(context: typer.Context) -> None:
    """Pretrain a backbone, then evaluate it; --processes N|auto runs it on several processes of this machine."""
    from ssl_bench.pretrain import main

    raise typer.Exit(_track("pretrain", main, context.args))


@app.command(context_settings=_VERBATIM)
def classify(context: typer.Context) -> None:
    """Train a classifier, supervised; --processes N|auto runs it on several processes of this machine."""
    from ssl_bench.classify import main

    raise typer.Exit(_track("classify", main, context.args))


def _track(track: str, main: Callable[[list[str]], int], words: Sequence[str]) -> int:
    """Runs a track's command in this process, or in as many as ``--processes`` says."""
    from ssl_bench.recipe.command import guarded

    def several() -> int:
        own, count = _processes(words)
        if count == 1 or {"--help", "-h"} & set(own):
            return main(own)
        from ssl_bench.recipe.compose import compose
        from ssl_bench.runtime.launcher import launch

        compose(track, [word for word in own if word != "--debug"])  # one line, and nothing started, if it is wrong
        return launch([sys.executable, "-m", f"ssl_bench.{track}", *own], count)

    return guarded(several, debug="--debug" in words)


def _processes(words: Sequence[str]) -> tuple[list[str], int]:
    """The words without ``--processes N|auto``, and its number: auto is one for each GPU that can be seen."""
    rest, given = [], "1"
    remaining = iter(words)
    for word in remaining:
        name, sign, value = word.partition("=")
        if name == "--processes":
            given = value if sign else next(remaining, "")
        else:
            rest.append(word)
    if given == "auto" and "device=cpu" not in rest:
        import torch

        return rest, max(1, torch.cuda.device_count())
    if given != "auto" and not (given.isdecimal() and int(given) > 0):
        raise ValueError(f"--processes must be auto or a number of at least 1, got {given!r}")
    return rest, 1 if given == "auto" else int(given)


@app.command()
def evaluate(
    run: Annotated[
        str,
        typer.Argument(help="A finished run's folder; left out, the backbone is that of model.*.", callback=expanded),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. eval.protocols=[linear-aug-v1]")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Without a run: folder for the record of the evaluation.")
    ] = "evaluations",
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Evaluate a saved run, add to its record; or any backbone.

    A backbone is a timm name, with weights of timm's or of a file:
    ssl-bench evaluate data=cifar10 model.name=resnet50 model.stem=imagenet model.checkpoint=FILE
    """
    from ssl_bench.cli.evaluate import evaluate_backbone, evaluate_run

    def command() -> int:
        given = overrides or []
        if "=" in run and not Path(run).is_dir():
            evaluate_backbone([run, *given], output)
        else:
            evaluate_run(run, given, trust=trust)
        return 0

    finish(command, debug)


Named = Annotated[str, typer.Argument(help="A run's folder, or the start of its name or identity.", callback=expanded)]
RunsFolder = Annotated[str, typer.Option(help="Where names are looked up, at any depth.", callback=expanded)]


@app.command()
def show(run: Named, runs: RunsFolder = "runs", debug: Debug = False) -> None:
    """Show a run: how far it came, the recipe that matters, results and files."""
    from ssl_bench.cli.runs import show as main

    finish(lambda: main(run, runs), debug)


@app.command()
def compare(
    run: Annotated[list[str], typer.Argument(help="Two or more, as for show.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="FILE.png, .svg or .pdf: the curves in one figure.")
    ] = None,
    y: Annotated[str, typer.Option(help="The metric that is drawn, e.g. loss or online_top1.")] = "loss",
    runs: RunsFolder = "runs",
    debug: Debug = False,
) -> None:
    """Show where runs' recipes differ, and their results side by side."""
    from ssl_bench.cli.runs import compare as main

    finish(lambda: main(run, output, runs, y), debug)


@app.command()
def resume(
    run: Named,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="steps=N or epochs=N for a longer run; data.path=FOLDER, device=cpu, ...")
    ] = None,
    processes: Annotated[str, typer.Option(help="N or auto: one for each GPU.")] = "1",
    runs: RunsFolder = "runs",
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Go on with a run from its last checkpoint; nothing has to be retyped.

    With steps= or epochs= a longer run is made of it in a folder beside it, where that is what a start with this length
    would have given: a learning rate that is constant after its warm-up, and nothing else that depends on the length.
    """

    def command() -> int:
        from ssl_bench.cli.resume import main

        _, count = _processes([f"--processes={processes}", *(overrides or [])])
        return main(run, overrides or [], processes=count, runs=runs, trust=trust)

    finish(command, debug)


@app.command()
def doctor(
    runs: Annotated[str, typer.Option(help="Where runs will go.", callback=expanded)] = "runs", debug: Debug = False
) -> None:
    """Check this machine, and say what to do about each fault.

    GPUs, driver, torch and torchvision, faiss, memory, disks, the cache, Accelerate's configuration; the exit code is 1
    if something is at fault.
    """
    from ssl_bench.cli.doctor import main

    finish(lambda: main(runs), debug)


@app.command()
def estimate(
    track: Annotated[str, typer.Argument(help="pretrain or classify.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="The recipe: group=choice, key=value.")] = None,
    debug: Debug = False,
) -> None:
    """Estimate the time and memory of a recipe, from a few steps that are run now.

    The exit code is 1 if it needs more memory than is free.
    """
    from ssl_bench.cli.estimate import main

    finish(lambda: main(track, overrides or []), debug)


@app.command()
def check_method(
    method: Annotated[str, typer.Argument(help="A known name, an entry point, or package.module:Name.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="method.key=value")] = None,
    debug: Debug = False,
) -> None:
    """Try whether a method keeps its contract.

    Outputs, gradients, chunks, two processes and a resume, in float64 on a small network; under a minute on two cores.
    """
    from ssl_bench.cli.check_method import main

    finish(lambda: main(method, overrides or []), debug)


@app.command()
def analyze(
    run: Annotated[str, typer.Argument(help="The folder of a run that had checkpoint.snapshots.", callback=expanded)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.path=FOLDER device=cpu")] = None,
    images: Annotated[int, typer.Option(help="Images of the fixed augmented batch.")] = 512,
    batch_norm: Annotated[str, typer.Option(help="train = by the batch, eval = by the running statistics.")] = "train",
    iterations: Annotated[int, typer.Option(help="Lanczos steps for the top eigenvalue, at most.")] = 20,
    samples: Annotated[int, typer.Option(help="Random vectors for the trace.")] = 10,
    rho: Annotated[float, typer.Option(help="Length of SAM's step.")] = 0.05,
    noise_batch_sizes: Annotated[
        str, typer.Option(help="Batch sizes for the gradient's noise, with commas; '' = leave it out.")
    ] = "64,256,1024",
    noise_images: Annotated[int, typer.Option(help="Images for each of these, in batches.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the images, their augmentation and the random vectors.", min=0)] = 0,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure sharpness and gradient noise along a run.

    At every snapshot of the run: the Hessian's top eigenvalue and trace, SAM's sharpness, and E|g_B - E g_B|^2 for
    several batch sizes. They go to the run's analysis.json, where the report finds them.
    """

    def command() -> int:
        from ssl_bench.cli.analyze import Settings, main

        return main(
            run,
            Settings(images, batch_norm, iterations, samples, rho, _sizes(noise_batch_sizes), noise_images, seed),
            overrides or [],
            trust=trust,
        )

    finish(command, debug)


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--noise-batch-sizes must be whole numbers with commas, e.g. 64,256, got {text!r}")
    return tuple(map(int, parts))


@app.command()
def demo(
    folder: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the runs and the plot.", callback=expanded)
    ] = "runs/demo",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.", min=1)] = 150,
    debug: Debug = False,
) -> None:
    """See it work: three optimizers on digits.

    SimCLR under LARS, LAMB and TVLARS on embedded data, beside random features, in two minutes on two cores: no
    download, no GPU.
    """
    from ssl_bench.cli.demo import main

    finish(lambda: main(folder, steps), debug)


data.register(app)
study.register(app)
report.register(app)


def main() -> None:
    """The console script."""
    sys.exit(app())
