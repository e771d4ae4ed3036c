"""The supervised classification track: ``accelerate launch ssl_bench/classify.py key=value ...``."""

import sys
from typing import TYPE_CHECKING

from ssl_bench.recipe.command import leave, run_command
from ssl_bench.runtime.callable_module import make_callable

if TYPE_CHECKING:
    from ssl_bench.recipe.schema import Recipe


def run(recipe: "Recipe") -> int:
    """Trains a classifier and measures it on the whole test set; returns the exit code."""
    from ssl_bench.training import build  # here, because --help must not wait for torch
    from ssl_bench.training.loop import Hook

    with build.session(recipe) as session:
        if session.results is not None:
            return session.already_ended()
        where = session.processes
        data = build.dataset(recipe, where)
        plan = build.plan(recipe, len(data.train))
        classifier = build.classifier(recipe, len(data.classes))
        batches = build.pipeline(recipe, data, build.views(recipe, data, classifier.views, where), where)
        evaluation = build.evaluation(recipe, data, where)

        def test(_step: int) -> dict[str, float]:
            metrics = evaluation.of_classifier(classifier)[0]["metrics"]
            return {f"test_{name}": value for name, value in metrics.items()}

        tests = Hook(plan.every(recipe.eval.test_every_epochs), test)
        trainer = build.trainer(recipe, plan, classifier, batches, [tests], session)
        about = {**build.provenance(recipe, plan, trainer, where), "images": build.about_images(recipe, data)}
        outcome = session.train(trainer, about)
        if outcome.status == "interrupted":
            return session.interrupted(outcome)

        results = []
        if outcome.status == "finished":
            session.save_backbone(classifier.backbone)
            untrained = (lambda: build.classifier(recipe, len(data.classes))) if recipe.eval.baseline else None
            results = evaluation.trained_and_untrained(evaluation.of_classifier, classifier, untrained)
        return session.finish(outcome, results)


def main(argv: list[str] | None = None) -> int:
    """The command: composes the recipe from ``argv`` and runs it."""
    return run_command("classify", run, sys.argv[1:] if argv is None else argv)


make_callable(__name__, "ssl_bench.cli.api:classify")

if __name__ == "__main__":
    leave(main())
