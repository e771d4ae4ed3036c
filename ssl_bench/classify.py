"""The supervised classification track: ``accelerate launch ssl_bench/classify.py key=value ...``."""

import sys
from typing import TYPE_CHECKING, cast

from ssl_bench.recipe.command import leave, run_command
from ssl_bench.recipe.schema import Recipe
from ssl_bench.runtime import seeds

if TYPE_CHECKING:
    from ssl_bench.models.classifier import Classifier


def build(recipe: Recipe, num_classes: int) -> "Classifier":
    """The untrained classifier; the same for equal seeds."""
    from ssl_bench.models.classifier import Classifier

    model, seed = recipe.model, seeds.derive_seed(recipe.seed, seeds.INIT)
    return Classifier.create(model.name, num_classes, stem=model.stem, init=model.init, seed=seed)


def run(recipe: Recipe) -> int:
    """Trains a classifier and measures it on the whole test set; returns the exit code."""
    from ssl_bench.training import build as views
    from ssl_bench.training.evaluation import evaluate_classifier
    from ssl_bench.training.loop import Hook
    from ssl_bench.training.plan import make_plan
    from ssl_bench.training.session import Session, step_gradient

    with Session(recipe) as session:
        if session.run.results is not None:
            return session.already_finished()
        dataset = session.dataset()
        plan = make_plan(recipe, len(dataset.train))

        classifier = build(recipe, len(dataset.classes))
        pipeline = session.pipeline(
            dataset,
            [views.classification_view(recipe, dataset, compiled=session.compiles_views, graphed=session.graphs_views)],
            (seeds.VIEW1,),
            with_labels=True,
        )

        def test(_step: int) -> dict[str, float]:
            metrics = evaluate_classifier(session, dataset, classifier)[0]["metrics"]
            return {f"test_{name}": value for name, value in metrics.items()}

        hook = Hook(plan.every(recipe.eval.test_every_epochs), test)
        outcome = session.train(classifier, pipeline, plan, step_gradient(recipe, session.accelerator), [hook])
        return session.finish(
            outcome,
            classifier.backbone,
            lambda model: evaluate_classifier(session, dataset, cast("Classifier", model)),
            trained=classifier,
            untrained=lambda: build(recipe, len(dataset.classes)),
        )


def main(argv: list[str] | None = None) -> int:
    """The command: composes the recipe from ``argv`` and runs it."""
    return run_command("classify", run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    leave(main())
