"""Whether embeddings have collapsed: to one point, or to one direction."""

from torch import Tensor
from torch.nn import functional as F

from ssl_bench.eval.rankme import effective_rank, singular_values

# An untrained ResNet-18's embeddings have a z_std of 0.18 / sqrt(D) and an effective rank of 170, an untrained ViT's of
# 0.18 / sqrt(D) and 49 (355 images of digits).
LOWEST_STD, LOWEST_RANK = 0.01, 2.0


def spread(z: Tensor) -> dict[str, float]:
    """How embeddings are spread.

    Args:
        z: (N, D) embeddings of different images, N >= 2.

    Returns:
        "z_std": the mean over dimensions of the standard deviation of z / |z|, 1 / sqrt(D) if they spread evenly and 0
        if they are one point; "effective_rank": `effective_rank` of the centred embeddings, between 1 and D;
        "dimensions": D; "n_images": N. NaN where an embedding is not finite.
    """
    about = {"dimensions": z.shape[1], "n_images": len(z)}
    if not bool(z.isfinite().all()):
        return {"z_std": float("nan"), "effective_rank": float("nan"), **about}
    rank = effective_rank(singular_values(z.double() - z.double().mean(dim=0)))
    return {"z_std": F.normalize(z.double()).std(dim=0).mean().item(), "effective_rank": rank, **about}


def collapsed(found: dict[str, float]) -> bool:
    """Whether what `spread` found is a collapse: z_std below 0.01 / sqrt(D), or an effective rank below 2."""
    return found["z_std"] * found["dimensions"] ** 0.5 < LOWEST_STD or found["effective_rank"] < LOWEST_RANK
