"""Self-supervised pretraining, then evaluation: ``accelerate launch ssl_bench/pretrain.py key=value ...``."""

import sys
from typing import TYPE_CHECKING

from ssl_bench.recipe.command import leave, run_command
from ssl_bench.runtime.callable_module import make_callable

if TYPE_CHECKING:
    from ssl_bench.recipe.schema import Recipe


def run(recipe: "Recipe") -> int:
    """Pretrains and evaluates; returns the exit code."""
    from ssl_bench.runtime.seeds import ONLINE, derive_seed  # here, because --help must not wait for torch
    from ssl_bench.training import build
    from ssl_bench.training.loop import Hook

    with build.session(recipe) as session:
        if session.results is not None:
            return session.already_ended()
        where = session.processes
        method = build.method(recipe)  # before the data: it may refuse its settings
        data = build.dataset(recipe, where)
        plan = build.plan(recipe, len(data.train))
        batches = build.pipeline(recipe, data, build.views(recipe, data, method.views, where), where)
        evaluation = build.evaluation(recipe, data, where)

        def watch(step: int) -> dict[str, float]:
            return evaluation.online(method.get_submodule(method.evaluated), derive_seed(recipe.seed, ONLINE, step))

        online = Hook(plan.every(recipe.eval.online_every_epochs), watch)
        trainer = build.trainer(recipe, plan, method, batches, [online], session)
        about = {**build.provenance(recipe, plan, trainer, where), "images": build.about_images(recipe, data)}
        outcome = session.train(trainer, about)
        if outcome.status == "interrupted":
            return session.interrupted(outcome)

        results, embeddings = [], None
        if outcome.status == "finished":
            session.save_backbone(method.get_submodule(method.evaluated))
            untrained = (lambda: build.method(recipe)) if recipe.eval.baseline else None
            embeddings = evaluation.spread(method)
            results = evaluation.trained_and_untrained(evaluation.of_method, method, untrained)
        return session.finish(outcome, results, embeddings)


def main(argv: list[str] | None = None) -> int:
    """The command: composes the recipe from ``argv`` and runs it."""
    return run_command("pretrain", run, sys.argv[1:] if argv is None else argv)


make_callable(__name__, "ssl_bench.cli.api:pretrain")

if __name__ == "__main__":
    leave(main())
