"""A monitor for training: cheap numbers from a fixed part of the data, never for a table of results (`online`)."""

import torch

from ssl_bench.eval.knn import HEADLINE_K, knn_predict
from ssl_bench.eval.linear import Standardize, count_correct
from ssl_bench.eval.probe import Metrics, Probe


class Online:
    """`online`: a ridge classifier in closed form and a kNN vote, on at most 4,096 train and 2,048 test images.

    It has no optimizer state and draws from no generator that training uses, so watching a run does not change it.
    """

    name = "online"
    tabulated = False  # its numbers are of a part of the test set
    train_images, test_images = 4096, 2048
    ridge = 1e-2  # times the mean diagonal of the Gram matrix; 0 would be least squares

    def __call__(self, probe: Probe) -> Metrics:
        """Classifies the test features of the fixed subset.

        Returns:
            "top1" (ridge) and "knn_top1" (k = 20, or all if there are fewer) in percent, and "n_test".
        """
        probe = probe.subset(train=self.train_images, test=self.test_images)
        train_x, test_x = probe.features("train"), probe.features("test")
        train_y, test_y, classes = probe.labels("train"), probe.labels("test"), probe.classes
        if not probe.main:
            return {}
        standardize = Standardize(train_x)
        x, targets = standardize(train_x).double(), torch.nn.functional.one_hot(train_y, classes).double()
        mean = targets.mean(dim=0)  # the bias: the features are centred
        gram = x.T @ x
        gram.diagonal().add_(self.ridge * gram.diagonal().mean().clamp_min(1e-12))  # collapsed features: gram is 0
        weight = torch.linalg.solve(gram, x.T @ (targets - mean))
        logits = standardize(test_x).double() @ weight + mean
        neighbours = knn_predict(train_x, train_y, test_x, (HEADLINE_K,))[HEADLINE_K]
        return {
            "top1": 100 * count_correct(logits, test_y, 1).item() / len(test_y),
            "knn_top1": 100 * (neighbours == test_y.cpu()).double().mean().item(),
            "n_test": len(test_y),
        }
