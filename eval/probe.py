"""What an evaluator is given: one object with the features, images and labels of a frozen backbone's data set."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ssl_bench.eval.features import ImageSource, Precision, Progress, Transform, eval_mode, extract_features

SUBSET_SEED = 20231115  # fixed: every epoch of every run looks at the same images

Metrics = dict[str, float]
Points = dict[str, str | float | list[str]]


class WithPoints(Metrics):
    """Metrics with a picture, which the record keeps beside them and the report draws.

    Args:
        metrics: numbers by name.
        points: "x" and "y", for each image a whole number from -1000 to 1000, and perhaps "label", each as one text
            with spaces between (a line of the record, where a list would be a thousand); "scale", what 1000 stands for.
    """

    def __init__(self, metrics: Metrics, *, points: Points) -> None:
        super().__init__(metrics)
        self.points = points


Split = Literal["train", "test"]


class ImageDataset(Protocol):
    """A train and a test split."""

    @property
    def train(self) -> ImageSource: ...

    @property
    def test(self) -> ImageSource: ...


class Augment(Protocol):
    """A random augmentation that draws its parameters separately from applying them."""

    def draw(self, n: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Parameters of n images, each (n, ...), on the CPU."""

    def __call__(self, images: Tensor, params: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Probe:
    """A frozen backbone and a data set to measure it on.

    Every process holds a probe, and `evaluate` calls every evaluator on every process, because `features` is
    collective. Only the result of the main process is kept: an evaluator that has its features can save the others the
    work by `if not probe.main: return {}`, but need not.

    Args:
        backbone: normalised images (n, 3, H, W) to features (n, D); the bare module, not a DistributedDataParallel
            wrapper.
        dataset: its `train` and `test` splits must already be on the device.
        transform: the test transform, uint8 images to normalised ones.
        seed: of the evaluators' own generators.
        device: where the backbone is, and where features and labels are returned.
        precision: of the backbone's passes, "fp32" or "bf16"; what follows them is fp32.
        batch_size: images per pass of one process, >= 1; it changes no result except by rounding.
        augment: the training augmentation (random resized crop and flip) of evaluators that train on images.
        projector: features (n, D) to embeddings (n, E), what the loss saw; None where there is none.
        rank: of this process.
        world_size: number of processes; above 1 needs an initialised process group.
        on_progress: called with (what is being done, done, total): "features" by batches, an evaluator by its epochs.
        limits: the largest number of images of a split; see `subset`.
    """

    backbone: nn.Module
    dataset: ImageDataset
    transform: Transform
    _: KW_ONLY
    seed: int = 0
    device: torch.device | str = "cpu"
    precision: Precision = "fp32"
    batch_size: int = 512
    augment: Augment | None = None
    projector: nn.Module | None = None
    rank: int = 0
    world_size: int = 1
    on_progress: Progress | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    # Shared with subsets, by split and number of images: the features and the seconds they took, and which of them
    # have been asked for, so that `evaluate` can say what each evaluator cost.
    extracted: dict[tuple[str, int], tuple[Tensor, float]] = field(default_factory=dict, repr=False)
    used: set[tuple[str, int]] = field(default_factory=set, repr=False)

    @classmethod
    def from_features(
        cls, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, seed: int = 0
    ) -> "Probe":
        """A probe of features computed elsewhere, for evaluators that use features only.

        Args:
            train_x: (N, D) features of the train set.
            train_y: (N,) int64 labels.
            test_x: (M, D) features of the test set.
            test_y: (M,) int64 labels.
            seed: of the evaluators' own generators.

        Raises:
            ValueError: if the features do not have these shapes.
        """
        for split, x in (("train", train_x), ("test", test_x)):
            if x.ndim != 2 or len(x) == 0:
                raise ValueError(f"{split} features must be (N, D) with N >= 1, got {tuple(x.shape)}")
        if test_x.shape[1] != train_x.shape[1]:
            raise ValueError(f"test features must have {train_x.shape[1]} dimensions as train, got {test_x.shape[1]}")
        dataset = _Splits(_Rows(train_x, train_y), _Rows(test_x, test_y))
        return cls(nn.Flatten(), dataset, lambda rows: rows, seed=seed, device=train_x.device)

    @property
    def main(self) -> bool:
        """Whether this is the process whose results count (rank 0)."""
        return self.rank == 0

    @property
    def classes(self) -> int:
        """The number of classes, C: the largest train label + 1."""
        return int(self.labels("train").max()) + 1

    def images(self, split: Split) -> ImageSource:
        """The images of a split.

        Raises:
            ValueError: if the split is not "train" or "test".
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        source: ImageSource = getattr(self.dataset, split)
        limit = self.limits.get(split, len(source))
        return _Part(source, limit) if limit < len(source) else source

    def labels(self, split: Split) -> Tensor:
        """(N,) int64 labels of a split, on the probe's device.

        Raises:
            ValueError: if they are not one integer >= 0 for each image, or the train labels are all of one class.
        """
        size, labels = len(self.images(split)), self.images(split).labels
        if labels.shape != (size,):
            raise ValueError(f"{split} labels must be ({size},) as there are {size} images, got {tuple(labels.shape)}")
        if labels.is_floating_point() or (size and int(labels.min()) < 0):
            raise ValueError(f"{split} labels must be integers >= 0, got {labels.dtype} from {labels.min().item()}")
        if split == "train" and len(labels.unique()) < 2:
            raise ValueError(f"train labels must be of at least 2 classes, got {labels.unique().tolist()}")
        return labels.to(self.device)

    def features(self, split: Split) -> Tensor:
        """(N, D) float32 features of a split, on the probe's device; extracted once, by all processes together.

        Raises:
            ValueError: on every process, if there are none or one is not finite (a diverged model has no accuracy).
        """
        key = split, len(self.images(split))
        if key not in self.extracted:
            started = time.perf_counter()
            features = self.extract(split)
            if len(features) == 0:
                raise ValueError(f"{split} features must be (N, D) with N >= 1, got {tuple(features.shape)}")
            bad = int((~torch.isfinite(features)).any(dim=1).sum())
            if bad:
                got = f"{bad} of {len(features)} that are not (the model has diverged)"
                raise ValueError(f"{split} features must be finite, got {got}")
            self.extracted[key] = features, time.perf_counter() - started
        self.used.add(key)
        return self.extracted[key][0]

    def extract(self, split: Split) -> Tensor:
        """The features of a split as they are, finite or not; by all processes together, and not kept."""
        return extract_features(
            self.backbone,
            self.images(split),
            self.transform,
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
            rank=self.rank,
            world_size=self.world_size,
            output_device=self.device,
            on_progress=self.on_progress,
        )

    def project(self, features: Tensor) -> Tensor:
        """(n, E) float32 embeddings of (n, D) features: the projector's, in eval mode."""
        assert self.projector is not None
        with eval_mode(self.projector), torch.no_grad():
            return torch.cat([self.projector(part).float() for part in features.split(self.batch_size)])

    def spaces(self, split: Split) -> dict[str, Tensor]:
        """What label-free measures look at: the features by "", the embeddings by "_embeddings" if there are any."""
        features = self.features(split)
        return {"": features} if self.projector is None else {"": features, "_embeddings": self.project(features)}

    def subset(self, *, train: int, test: int) -> "Probe":
        """A probe of at most so many train and test images, drawn once and for all: the same in every run."""
        return replace(self, limits={"train": train, "test": test})


class _Splits(NamedTuple):
    train: ImageSource
    test: ImageSource


class _Part:
    """A fixed random part of a source, in its order."""

    def __init__(self, whole: ImageSource, size: int) -> None:
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(SUBSET_SEED))
        self.whole, self.indices = whole, order[:size].sort().values
        self.labels = whole.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.whole.batches(self.indices[rows] for rows in indices)


class _Rows:
    """Feature vectors as a source of (n, D, 1, 1) images, which the backbone of `Probe.from_features` flattens."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.x[rows, :, None, None] for rows in indices)
