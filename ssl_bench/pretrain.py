"""Self-supervised pretraining, then evaluation: ``accelerate launch ssl_bench/pretrain.py key=value ...``."""

import sys
from typing import Any

from torch import nn

from ssl_bench import sampling
from ssl_bench.command import leave, run_command
from ssl_bench.recipe import Recipe


def build(recipe: Recipe) -> tuple[nn.Module, int, nn.Module]:
    """The untrained backbone, its feature dimension, and the method around it; the same for equal seeds."""
    from ssl_bench import plugins
    from ssl_bench.backbone import create_backbone, seeded

    seed = sampling.derive_seed(recipe.seed, sampling.INIT)
    backbone, feature_dim = create_backbone(
        recipe.model.name, stem=recipe.model.stem, init=recipe.model.init, seed=seed
    )
    make = plugins.resolve("method", recipe.method.target)
    with seeded(sampling.derive_seed(recipe.seed, sampling.PROJECTOR)):
        method = make(backbone, feature_dim, **recipe.method.options)
    return backbone, feature_dim, method


def run(recipe: Recipe) -> int:
    """Pretrains and evaluates; returns the exit code."""
    from ssl_bench import views
    from ssl_bench.plan import make_plan
    from ssl_bench.probes import evaluate_backbone, online_monitor
    from ssl_bench.session import Session, step_gradient
    from ssl_bench.train import Hook

    with Session(recipe) as session:
        if session.run.results is not None:
            return session.already_finished()
        backbone, _, method = build(recipe)
        dataset = session.dataset()
        plan = make_plan(recipe, len(dataset.train))
        pipeline = session.pipeline(
            dataset,
            views.pretraining_views(recipe, dataset, compiled=session.compiles_views, graphed=session.graphs_views),
            (sampling.VIEW1, sampling.VIEW2),
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
