"""Evaluates a run's models: the evaluators of ``ssl_bench.eval`` on this run's data, device and processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ssl_bench.augment.views import Augmentation, Normalize
from ssl_bench.data.dataset import Dataset
from ssl_bench.eval import Evaluator, evaluate
from ssl_bench.eval.collapse import spread
from ssl_bench.eval.features import Precision, extract_features
from ssl_bench.eval.probe import Probe
from ssl_bench.methods.base import Method
from ssl_bench.methods.classifier import Classifier
from ssl_bench.runtime.console import Ticker
from ssl_bench.training.memory.out_of_memory import evaluating
from ssl_bench.training.processes import Processes

SPREAD_IMAGES = 256  # enough to tell a collapse, and quick

Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """How a run's models are evaluated.

    Attributes:
        processes: every method is called on all of them.
        dataset: on the device.
        evaluators: of backbones.
        transform: the test transform.
        augment: what augmented probes train on.
        seed: of the probes.
        precision: of the network's passes.
        batch_size: images per pass, on each process.
        elsewhere: the data set's name where it is not the one trained on; it becomes a part of the protocol's name, so
            that no table mixes the two.
        own_statistics: whether each process has running statistics of its own, so that the first one's must be shared.
    """

    processes: Processes
    dataset: Dataset
    evaluators: Sequence[Evaluator]
    transform: Normalize
    augment: Augmentation
    seed: int
    precision: Precision
    batch_size: int
    elsewhere: str = ""
    own_statistics: bool = False

    def of_method(self, method: Method) -> Results:
        """Runs the evaluators on what the method says is evaluated, and the projector behind it; see `of_backbone`."""
        return self.of_backbone(*_evaluated(method))

    def of_backbone(self, backbone: nn.Module, projector: nn.Module | None = None) -> Results:
        """Runs the evaluators on a frozen backbone.

        Args:
            backbone: the bare module.
            projector: from features to embeddings, where there is one.

        Returns:
            on the main process, for each protocol its name and version, metrics and chance (percent), seconds, and the
            number of test images; nothing on the others.
        """
        progress = Ticker(enabled=self.processes.main)
        results = self._evaluate(backbone, self.evaluators, self.seed, progress, projector)
        about: dict[str, Any] = {"seed": self.seed}
        if self.dataset.classes:
            about["chance"] = 100 / len(self.dataset.classes)
        for result in results:
            if "points" in result:  # a picture's legend
                result["points"] |= {"classes": list(self.dataset.classes)}
        on = f"@{self.elsewhere}" if self.elsewhere else ""
        return [{**result, "protocol": result["protocol"] + on, **about} for result in results]

    def online(self, backbone: nn.Module, seed: int) -> dict[str, float]:
        """A cheap look during pretraining, with randomness of its own; for the metrics, never for a table."""
        results = self._evaluate(backbone, ["online"], seed)
        return {"online_top1": results[0]["metrics"]["top1"]} if results else {}

    def spread(self, method: Method) -> dict[str, float] | None:
        """How the embeddings of a fixed part of the train set are spread, on the main process; None on the others."""
        network = nn.Sequential(*_evaluated(method))
        if self.own_statistics:
            share_statistics(network)
        where = self.processes
        probe = Probe(
            network,
            self.dataset,
            self.transform,
            device=where.device,
            precision=self.precision,
            batch_size=self.batch_size,
            rank=where.rank,
            world_size=where.world_size,
        ).subset(train=SPREAD_IMAGES, test=0)
        z = probe.extract("train")
        return spread(z) if where.main else None

    def of_classifier(self, classifier: Classifier) -> Results:
        """Top-1, top-5 and cross entropy on the whole test set, every image once over all processes."""
        if self.own_statistics:
            share_statistics(classifier)
        was_training = classifier.training
        with evaluating(self.batch_size):
            logits = extract_features(
                _Logits(classifier),
                self.dataset.test,
                self.transform,
                batch_size=self.batch_size,
                device=self.processes.device,
                precision=self.precision,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
            )
        classifier.train(was_training)
        labels = self.dataset.test.labels
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        metrics = {
            "top1": 100 * ranked[:, 0].double().mean().item(),
            "top5": 100 * ranked.any(1).double().mean().item(),
            "loss": nn.functional.cross_entropy(logits.double(), labels).item(),
        }
        about = {"n_test": len(labels), "seed": None, "chance": 100 / len(self.dataset.classes)}
        return [{"protocol": "test-v1", "metrics": metrics, **about}]

    def trained_and_untrained(
        self, evaluate: Callable[[Any], Results], trained: nn.Module, untrained: Callable[[], nn.Module] | None
    ) -> Results:
        """Evaluates what was trained, beside what it started from.

        Args:
            evaluate: `of_backbone` or `of_classifier`.
            trained: the model.
            untrained: builds the model as it was before the first step; None leaves it out.
        """
        results = [{"model": "trained", **result} for result in evaluate(trained)]
        if untrained is not None:
            start = untrained().to(self.processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            results += [{"model": "untrained", **result} for result in evaluate(start)]
        return results

    def _evaluate(
        self,
        backbone: nn.Module,
        evaluators: Sequence[Evaluator | str],
        seed: int,
        on_progress: Any = None,
        projector: nn.Module | None = None,
    ) -> Results:
        if self.own_statistics:
            for part in (backbone, projector):
                if part is not None:
                    share_statistics(part)
        with evaluating(self.batch_size):
            return evaluate(  # type: ignore[return-value]
                backbone,
                self.dataset,
                evaluators,
                self.transform,
                seed=seed,
                device=self.processes.device,
                precision=self.precision,
                batch_size=self.batch_size,
                augment=self.augment,
                projector=projector,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
                on_progress=on_progress,
            )


def share_statistics(model: nn.Module) -> None:
    """Gives every process the first one's running statistics, so that all measure their share of one model."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def _evaluated(method: Method) -> tuple[nn.Module, nn.Module]:
    """The backbone that the method says is evaluated, and the projector of the same network (a teacher's its own)."""
    owner = method.get_submodule(method.evaluated.rpartition(".")[0])
    return method.get_submodule(method.evaluated), owner.get_submodule("projector")


class _Logits(nn.Module):
    """A classifier as the feature extractor wants it: images in, one row of logits out."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier.logits(x)
