"""A picture of the features: their two main directions, which need no label (`pca-2d-v1`)."""

import torch
from torch import Tensor

from ssl_bench.eval.probe import Metrics, Points, Probe, WithPoints

IMAGES = 1000  # of the test set, fixed, or all if there are fewer
STEPS = 1000  # of the largest coordinate: finer than a pixel of any panel, and three digits in the record


def main_plane(x: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of features in the plane of their largest variance, and the share of it along each axis.

    Args:
        x: (N, D) features, N >= 2.

    Returns:
        (N, 2) coordinates in float64 about the mean, each axis turned so that its largest coordinate is positive; zeros
        where there are fewer directions. And (2,) shares of the variance in [0, 1]; 0 where all features are equal.
    """
    centred = x.double() - x.double().mean(dim=0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    count = min(2, len(s))
    plane, shares = centred.new_zeros(len(x), 2), centred.new_zeros(2)
    plane[:, :count] = u[:, :count] * s[:count]
    shares[:count] = s[:count].square() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    largest = plane.gather(0, plane.abs().argmax(dim=0, keepdim=True))  # (1, 2): a singular vector's sign is arbitrary
    return torch.where(largest < 0, -plane, plane), shares


class PCA2D:
    """`pca-2d-v1`: principal components 1 and 2 of at most 1,000 fixed test images, drawn in the report."""

    name = "pca-2d-v1"
    tabulated = True
    needs_labels = False

    def __call__(self, probe: Probe) -> Metrics:
        """Measures the features.

        Returns:
            "explained", the share of the variance in the plane in percent, that of each axis as "explained_1" and
            "explained_2", and "n_test", with the points: "x" and "y" in thousandths of the largest coordinate, which
            is "scale", and "label" where the images have labels; see `WithPoints`.
        """
        probe = probe.subset(train=0, test=IMAGES)
        x = probe.features("test")
        if not probe.main:
            return {}
        plane, shares = main_plane(x)
        scale = plane.abs().max().clamp_min(torch.finfo(plane.dtype).tiny).item()
        steps = (plane / scale * STEPS).round().long()
        columns = {"x": steps[:, 0], "y": steps[:, 1]}
        labels = probe.images("test").labels
        if int(labels.min()) >= 0:
            columns["label"] = labels
        points: Points = {name: " ".join(map(str, column.tolist())) for name, column in columns.items()}
        points["scale"] = float(f"{scale:.4g}")
        one, two = (100 * shares).tolist()
        return WithPoints(
            {"explained": one + two, "explained_1": one, "explained_2": two, "n_test": len(x)}, points=points
        )
