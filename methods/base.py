"""What all methods share: the contract with the training engine, and the projector."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ssl_bench.methods.views import Crop, View


def check(method: str, allowed: Literal["> 0", ">= 0", "in [0, 1]"], **values: float) -> None:
    """Refuses (ValueError) the first keyword that is not a number as allowed; NaN is none.

    Args:
        method: the name that errors begin with.
        allowed: the range.
        values: keywords and their values.
    """
    for name, value in values.items():
        if not {"> 0": value > 0, ">= 0": value >= 0, "in [0, 1]": 0 <= value <= 1}[allowed]:
            raise ValueError(f"{method}: {name} must be {allowed}, got {value}")


def check_scales(method: str, **scales: Sequence[float]) -> None:
    """Refuses (ValueError) the first range of a crop's share of the image's area that is not within (0, 1]."""
    for name, scale in scales.items():
        if not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(f"{method}: {name} must be 0 < low <= high <= 1, got {tuple(scale)}")


def build_projector(
    feature_dim: int,
    widths: tuple[int, ...],
    *,
    hidden_bias: bool = False,
    hidden_norm: bool = True,
    last_bias: bool = False,
    last_norm: bool = False,
    name: str = "projector",
) -> nn.Sequential:
    """Builds Linear, BatchNorm and ReLU for each hidden width, then a Linear.

    Args:
        feature_dim: the number of the backbone's features, > 0.
        widths: the width of each Linear layer, all > 0; the last is the embedding's D.
        hidden_bias: give the hidden Linear layers a bias, although batch norm follows (the official VICReg does).
        hidden_norm: False leaves out the batch norms after the hidden layers (MoCo v2 and SupCon do), whose Linear
            layers then have a bias.
        last_bias: give the last Linear layer a bias.
        last_norm: add a batch norm with scale but without shift after the last layer (SimCLR does).
        name: what errors call it.

    Raises:
        ValueError: if ``feature_dim`` or a width is not positive, or there is no width.
    """
    if feature_dim < 1:
        raise ValueError(f"{name}: feature_dim must be > 0, got {feature_dim}")
    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"{name}: widths must be one or more numbers > 0, got {tuple(widths)}")
    layers: list[nn.Module] = []
    size = feature_dim
    for width in widths[:-1]:
        layers.append(nn.Linear(size, width, bias=hidden_bias or not hidden_norm))
        layers += [nn.BatchNorm1d(width)] if hidden_norm else []
        layers.append(nn.ReLU(inplace=True))
        size = width
    layers.append(nn.Linear(size, widths[-1], bias=last_bias))
    if last_norm:
        norm = nn.BatchNorm1d(widths[-1])
        norm.bias.requires_grad_(False)  # stays 0: torch has no batch norm with a scale alone
        layers.append(norm)
    return nn.Sequential(*layers)


class Method(nn.Module):
    """A network and a loss, written for one process and the whole batch; the engine does the rest.

    A method is a subclass whose typed keywords are its hyper-parameters. Each step the engine calls ``begin_step``,
    ``forward`` on this process's rows, and ``loss`` once on the rows of all processes; it back-propagates the loss to
    the outputs and those through ``forward``. So whole or in chunks, on one process or several, plainly or as a CUDA
    graph, the gradient is that of the global batch's loss, if

    - every trainable parameter is used in ``forward`` alone, and an output's row depends on its own image alone (batch
      norm excepted);
    - ``loss`` uses no trainable parameter. It may write buffers (a queue, a centre), in place;
    - what changes from step to step is kept in buffers and written in ``begin_step`` (or ``loss``).

    ``ssl-bench check-method package.module:Name`` tries all of it.

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: maps features to embeddings (n, D); see ``build_projector``.

    Attributes:
        views: what ``forward`` gets, drawn for the global batch; an instance may set its own.
        per_sample: the loss is a mean over rows, none of which needs the others: ``loss`` then gets this process's
            rows of one chunk, nothing is gathered, and chunks are accumulated.
        evaluated: the submodule that is evaluated and saved as the trained backbone.
        spread_of: the output whose spread is logged as ``z_std``, if the method has it.
        sharded_loss: optional, ``(share, **outputs)``: ``loss`` of the global batch again, from this process's rows
            (n, ...) and a `ssl_bench.methods.parts.share.Share`. Where a class has it beside its ``loss``, several
            processes call it instead, so that each computes its share of what would else run whole on every one.

    Raises:
        ValueError: if ``feature_dim`` differs from the backbone's own ``num_features`` (timm sets it).
    """

    views: Sequence[View] = (Crop(), Crop())
    per_sample = False
    evaluated = "backbone"
    spread_of = "z1"
    sharded_loss: Callable[..., dict[str, Tensor]]

    def __init__(self, backbone: nn.Module, feature_dim: int, projector: nn.Module) -> None:
        super().__init__()
        features = getattr(backbone, "num_features", feature_dim)
        if features != feature_dim:
            raise ValueError(f"method: feature_dim must be the backbone's {features}, got {feature_dim}")
        self.backbone = backbone
        self.projector = projector

    def begin_step(self, progress: float) -> None:
        """Updates what follows the training from outside the gradient: EMA teachers, temperatures, momenta.

        Called without a graph and before every step, so that a teacher follows the weights of the step before.

        Args:
            progress: the share of the run that is done, in [0, 1).
        """

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # noqa: ARG002 (for subclasses to name them)
        """Maps this process's views to its outputs; here two views to embeddings, each view in a pass of its own.

        (Batch norm sees one view at a time, as in the official codes of Barlow Twins, SimCLR and VICReg.)

        Args:
            args: what ``views`` declares, each (n, ...); a subclass names them.
            kwargs: none.

        Returns:
            tensors (n, ...) by name, the arguments of ``loss``.
        """
        x1, x2 = args
        return {"z1": self.embed(x1), "z2": self.embed(x2)}

    def loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Computes the loss of the global batch, which must not depend on the order of the rows.

        Args:
            args: none; a subclass names its outputs, which come by name.
            kwargs: (N, ...) ``forward``'s outputs of the global batch, in float32 where they are floating-point
                numbers, without a graph to the network; not to be changed in place.

        Returns:
            "loss", a scalar to differentiate, and scalars to log.
        """
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """Embeds one view: (n, 3, H, W) to (n, D)."""
        return self.projector(self.backbone(x))
