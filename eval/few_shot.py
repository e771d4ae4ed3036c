"""Logistic regression on the features of a few labelled images (`few-shot-v1`)."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_bench.eval.linear import Standardize
from ssl_bench.eval.probe import Metrics, Probe

DRAW_SEED = 20231116  # fixed: every run labels the same images
DRAWS = 5
FRACTIONS = {"1pct": 0.01, "10pct": 0.1}
STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # C, the inverse of the L2 factor, of the summed loss
FOLDS = 5
MAX_ITERATIONS = 500


def draw(labels: Tensor, fraction: float, number: int) -> Tensor:
    """The sorted indices of one of the fixed draws: the same share of every class, at least one image of each.

    Args:
        labels: (N,) int64 labels.
        fraction: the share of each class, rounded, in (0, 1].
        number: which draw, >= 0.
    """
    generator = torch.Generator().manual_seed(DRAW_SEED + number)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    members = [order[shuffled == label] for label in shuffled.unique()]
    return torch.cat([own[: max(1, round(fraction * len(own)))] for own in members]).sort().values


def fitted(x: NDArray[np.float64], y: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Multinomial logistic regression whose L2 strength is chosen by 5-fold cross-validation.

    The folds hold equal shares of every class; there are fewer where a class has fewer images, and where one has a
    single image nothing can be held out and C is 1.

    Returns:
        (D, C) weights, (C,) biases, and the (C,) classes.
    """
    from sklearn.linear_model import LogisticRegression  # here, because importing it takes time
    from sklearn.model_selection import StratifiedKFold

    folds = min(FOLDS, int(np.unique(y, return_counts=True)[1].min()))
    best = 1.0
    if folds > 1:
        hits = np.zeros(len(STRENGTHS))
        for train, held in StratifiedKFold(folds).split(x, y):
            # From strong to weak, each starting at the one before: the same optimum, sooner.
            model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
            for i, strength in enumerate(STRENGTHS):
                _fit(model.set_params(C=strength), x[train], y[train])
                hits[i] += (model.predict(x[held]) == y[held]).sum()
        best = STRENGTHS[int(hits.argmax())]  # the strongest of equal ones
    model = _fit(LogisticRegression(max_iter=MAX_ITERATIONS, C=best), x, y)
    weight, bias = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
    if weight.shape[1] == 1:  # two classes have one score
        weight, bias = torch.cat([-weight, weight], 1), torch.cat([-bias, bias])
    return weight, bias, torch.from_numpy(model.classes_)


def _fit(model: Any, x: NDArray[np.float64], y: NDArray[np.int64]) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # The weakest strengths on separable data have their optimum far away; what 500 iterations reach counts.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, y)


class FewShot:
    """`few-shot-v1`: 1% and 10% of the train labels, five fixed draws each, logistic regression on cached features.

    The features are standardised by those of the draw.
    """

    name = "few-shot-v1"
    tabulated = True

    def __call__(self, probe: Probe) -> Metrics:
        """Fits on each draw and tests on the whole test set.

        Returns:
            "top1_1pct" and "top1_10pct" (mean over the draws, percent), "top1_1pct_sd" and "top1_10pct_sd" (sample
            deviation), "n_1pct" and "n_10pct" (labelled images), "top1" (that of 10%, the headline), and "n_test".
        """
        train_x, test_x = probe.features("train"), probe.features("test")
        train_y, test_y = probe.labels("train").cpu(), probe.labels("test").cpu()
        if not probe.main:
            return {}
        result: Metrics = {}
        for name, fraction in FRACTIONS.items():
            top1 = []
            for number in range(DRAWS):
                chosen = draw(train_y, fraction, number)
                x = train_x[chosen.to(train_x.device)]
                standardize = Standardize(x)
                weight, bias, classes = fitted(standardize(x).double().cpu().numpy(), train_y[chosen].numpy())
                scores = standardize(test_x).double().cpu() @ weight + bias
                top1.append(100 * (classes[scores.argmax(dim=1)] == test_y).double().mean())
                if probe.on_progress is not None:
                    probe.on_progress(f"{self.name} {name}", number + 1, DRAWS)
            mean = torch.stack(top1)
            result |= {f"top1_{name}": mean.mean().item(), f"top1_{name}_sd": mean.std().item()}
            result[f"n_{name}"] = len(chosen)
        return {"top1": result["top1_10pct"], **result, "n_test": len(test_y)}
