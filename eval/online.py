"""A monitor for training: cheap numbers from a fixed part of the data, never for a table of results (`online`)."""

from typing import Literal

import torch
from torch import Tensor

from ssl_bench.eval.base import Metrics, check_features, count_correct
from ssl_bench.eval.knn import HEADLINE_K, knn_predict
from ssl_bench.eval.linear import Standardize

SUBSET_SEED = 20231115  # fixed: every epoch of every run looks at the same images


def subset(n: int, limit: int) -> Tensor:
    """(min(n, limit),) sorted indices of the images that a monitor looks at; always the same for one n."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SUBSET_SEED))[:limit].sort().values


class Online:
    """`online`: a ridge classifier in closed form and a kNN vote, on at most 4,096 train and 2,048 test images.

    It has no optimizer state and draws nothing from any generator that training uses, so watching a run does not
    change it. Its numbers are of a part of the test set: `tabulated` is False, and reports must leave them out.
    """

    name = "online"
    inputs: Literal["features"] = "features"
    tabulated = False
    limits = (4096, 2048)  # train and test images
    ridge = 1e-2  # of the mean diagonal of the Gram matrix; 0 would be least squares

    def __call__(
        self,
        train_x: Tensor,
        train_y: Tensor,
        test_x: Tensor,
        test_y: Tensor,
        *,
        seed: int = 0,  # noqa: ARG002 (every evaluator takes it)
    ) -> Metrics:
        """Classifies the test features; `evaluate` passes features of the fixed subsets only.

        Args:
            train_x: (N, D) train features.
            train_y: (N,) int64 labels.
            test_x: (M, D) test features.
            test_y: (M,) int64 labels.
            seed: unused; nothing here is random.

        Returns:
            "top1" (ridge) and "knn_top1" (k = 20, or N if fewer) in percent, and "n_test".

        Raises:
            ValueError: as `check_features`.
        """
        check_features(self.name, train_x, train_y, test_x, test_y)
        standardize = Standardize.fit(train_x)
        x, labels = standardize(train_x).double(), train_y.to(train_x.device)
        targets = torch.nn.functional.one_hot(labels).double()
        mean = targets.mean(dim=0)
        gram = x.T @ x
        gram.diagonal().add_(self.ridge * gram.diagonal().mean().clamp_min(1e-12))
        weight = torch.linalg.solve(gram, x.T @ (targets - mean))
        logits = standardize(test_x).double() @ weight + mean
        correct = count_correct(logits, test_y.to(logits.device), 1)
        neighbours = knn_predict(train_x, train_y, test_x, (HEADLINE_K,))[HEADLINE_K]
        return {
            "top1": 100 * correct.item() / len(test_y),
            "knn_top1": 100 * (neighbours == test_y.cpu()).double().mean().item(),
            "n_test": len(test_y),
        }
