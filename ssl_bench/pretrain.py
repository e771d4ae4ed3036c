"""Self-supervised pretraining, then evaluation: ``accelerate launch ssl_bench/pretrain.py key=value ...``."""

import sys
from typing import Any

from torch import nn

from ssl_bench.recipe.command import leave, run_command
from ssl_bench.recipe.schema import Recipe
from ssl_bench.runtime import seeds


def build(recipe: Recipe) -> tuple[nn.Module, int, nn.Module]:
    """The untrained backbone, its feature dimension, and the method around it; the same for equal seeds."""
    from ssl_bench.models.backbone import create_backbone, seeded
    from ssl_bench.recipe import registry

    seed = seeds.derive_seed(recipe.seed, seeds.INIT)
    backbone, feature_dim = create_backbone(
        recipe.model.name, stem=recipe.model.stem, init=recipe.model.init, seed=seed
    )
    make = registry.resolve("method", recipe.method.target)
    with seeded(seeds.derive_seed(recipe.seed, seeds.PROJECTOR)):
        method = make(backbone, feature_dim, **recipe.method.options)
    return backbone, feature_dim, method


def run(recipe: Recipe) -> int:
    """Pretrains and evaluates; returns the exit code."""
    from ssl_bench.training import build as views
    from ssl_bench.training.evaluation import evaluate_backbone, online_monitor
    from ssl_bench.training.loop import Hook
    from ssl_bench.training.plan import make_plan
    from ssl_bench.training.session import Session, step_gradient

    with Session(recipe) as session:
        if session.run.results is not None:
            return session.already_finished()
        backbone, _, method = build(recipe)
        dataset = session.dataset()
        plan = make_plan(recipe, len(dataset.train))
        pipeline = session.pipeline(
            dataset,
            views.pretraining_views(recipe, dataset, compiled=session.compiles_views, graphed=session.graphs_views),
            (seeds.VIEW1, seeds.VIEW2),
        )
        online = Hook(plan.every(recipe.eval.online_every_epochs), online_monitor(session, dataset, backbone))
        outcome = session.train(method, pipeline, plan, step_gradient(recipe, session.accelerator), [online])

        def evaluate(model: nn.Module) -> list[dict[str, Any]]:
            return evaluate_backbone(session, dataset, model)

        return session.finish(outcome, backbone, evaluate, trained=backbone, untrained=lambda: build(recipe)[0])


def main(argv: list[str] | None = None) -> int:
    """The command: composes the recipe from ``argv`` and runs it."""
    return run_command("pretrain", run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    leave(main())
