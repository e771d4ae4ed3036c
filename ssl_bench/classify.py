"""The supervised classification track: ``accelerate launch ssl_bench/classify.py key=value ...``."""

import sys
from typing import cast

from ssl_bench import sampling
from ssl_bench.command import leave, run_command
from ssl_bench.recipe import Recipe


def run(recipe: Recipe) -> int:
    """Trains a classifier and measures it on the whole test set; returns the exit code."""
    from ssl_bench import views
    from ssl_bench.classifier import Classifier
    from ssl_bench.probes import evaluate_classifier
    from ssl_bench.session import Session, step_gradient
    from ssl_bench.train import Hook

    with Session(recipe) as session:
        if session.run.results is not None:
            return session.already_finished()
        dataset = session.dataset()
        plan = session.plan(len(dataset.train))

        def build() -> Classifier:
            return Classifier.create(
                recipe.model.name,
                len(dataset.classes),
                stem=recipe.model.stem,
                init=recipe.model.init,
                seed=sampling.derive_seed(recipe.seed, sampling.INIT),
            )

        classifier = build()
        pipeline = session.pipeline(
            dataset, [views.classification_view(recipe, dataset)], (sampling.VIEW1,), with_labels=True
        )

        def test(_step: int) -> dict[str, float]:
            metrics = evaluate_classifier(session, dataset, classifier)[0]["metrics"]
            return {f"test_{name}": value for name, value in metrics.items()}

        hook = Hook(plan.every(recipe.eval.test_every_epochs), test)
        outcome = session.train(classifier, pipeline, plan, step_gradient(recipe, session.accelerator), [hook])
        return session.finish(
            outcome,
            classifier.backbone,
            lambda model: evaluate_classifier(session, dataset, cast(Classifier, model)),
            trained=classifier,
            untrained=build,
        )


def main(argv: list[str] | None = None) -> int:
    """The command: composes the recipe from ``argv`` and runs it."""
    return run_command("classify", run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    leave(main())
