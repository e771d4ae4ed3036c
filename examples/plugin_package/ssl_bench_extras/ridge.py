"""`ridge-v1`: ridge regression of the classes on the features, in closed form."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Ridge:
    """Top-1 of the classifier argmax_k (x - m)' W_k + b_k that minimises the squared error plus 1e-3 N |W|^2.

    Features are divided by the root of their mean variance first, so the penalty does not depend on their scale.
    """

    name = "ridge-v1"
    penalty = 1e-3

    def __call__(self, probe) -> dict[str, float]:
        """`probe` is a `ssl_bench.eval.probe.Probe`: features and labels of a frozen backbone."""
        x, y = probe.features("train").double(), F.one_hot(probe.labels("train"), probe.classes).double()
        mean, scale = x.mean(dim=0), x.var(dim=0).mean().sqrt().clamp(min=1e-12)
        x = (x - mean) / scale
        gram = x.T @ x / len(x) + self.penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)) / len(x))  # (D, classes)
        scores: Tensor = (probe.features("test").double() - mean) / scale @ weight + y.mean(dim=0)
        return {"top1": 100 * (scores.argmax(dim=1) == probe.labels("test")).double().mean().item()}
