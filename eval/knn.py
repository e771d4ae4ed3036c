"""Exact weighted k-nearest-neighbour classification by cosine, with ties broken by rule (`knn-v1`).

The weights are those of Wu et al. 2018 (arXiv 1805.01978): a neighbour at cosine s votes with exp(s / 0.07).
"""

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_bench.eval.probe import Metrics, Probe

TEMPERATURE = 0.07
KS = (1, 10, 20, 200)
HEADLINE_K = 20


def _ranked(bank: Tensor, queries: Tensor, k: int, rows: int = 256) -> tuple[Tensor, Tensor]:
    """The k nearest by (cosine descending, index ascending), by a plain matrix product.

    The bits of a float32, read as an integer, have the order of the floats (that of the negative ones reversed), so
    cosine and index fit into one int64 key, and no two keys are equal.
    """
    cosines, indices = [], []
    last_first = torch.arange(len(bank) - 1, -1, -1, device=bank.device)
    for chunk in queries.split(rows):
        similarity = chunk @ bank.T  # (rows, N)
        bits = similarity.view(torch.int32).long()
        order = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        index = len(bank) - 1 - (order * len(bank) + last_first).topk(k, dim=1).values % len(bank)
        cosines.append(similarity.gather(1, index))
        indices.append(index)
    return torch.cat(cosines), torch.cat(indices)


def _search(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """faiss' exact inner-product search, on the features' device; the order of equal ones is arbitrary.

    Where faiss cannot be imported or fails (it allocates beside torch, on a GPU that training has filled), torch
    searches as exactly, and a warning says so.
    """
    try:
        import faiss  # here, because importing it takes time that `--help` should not spend

        index: faiss.Index = faiss.IndexFlatIP(bank.shape[1])  # exact: an approximate index would add its own noise
        # Only on the GPU that the run has: device=cpu on a machine with GPUs must not take the first one.
        if queries.is_cuda and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
            torch.cuda.empty_cache()  # faiss does not allocate through torch
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), queries.device.index or 0, index)
        index.add(np.ascontiguousarray(bank.cpu().numpy()))
        cosines, indices = index.search(np.ascontiguousarray(queries.cpu().numpy()), k)
    except (ImportError, RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"knn-v1: faiss failed ({reason}); searched by torch instead", RuntimeWarning, stacklevel=2)
        ranked = _ranked(bank, queries, k)
        return ranked[0].cpu(), ranked[1].cpu()
    return torch.from_numpy(cosines), torch.from_numpy(indices)


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows of each query by inner product, equal ones by lower index first.

    The search asks for one neighbour more than needed: if neighbours k and k + 1 are equally near, faiss has chosen
    among the tied ones in its own order, and the query is searched again by rule.

    Args:
        bank: (N, D) float32, L2-normalised.
        queries: (M, D) float32, L2-normalised.
        k: neighbours, in [1, N].

    Returns:
        (M, k) float32 cosines, descending, and (M, k) int64 indices into the bank, both on the CPU.
    """
    cosines, indices = _search(bank, queries, min(k + 1, len(bank)))
    tied = (cosines[:, 1:] == cosines[:, :-1]).any(dim=1).nonzero().flatten()
    by_index = indices[tied].argsort(dim=1)
    by_cosine = cosines[tied].gather(1, by_index).argsort(dim=1, descending=True, stable=True)
    indices[tied] = indices[tied].gather(1, by_index.gather(1, by_cosine))  # the cosines are sorted already
    if k < len(bank):
        cut = (cosines[:, k - 1] == cosines[:, k]).nonzero().flatten()
        cosines, indices = cosines[:, :k].contiguous(), indices[:, :k].contiguous()
        if len(cut):
            ranked = _ranked(bank, queries[cut.to(queries.device)], k)
            cosines[cut], indices[cut] = ranked[0].cpu(), ranked[1].cpu()
    return cosines, indices


def knn_predict(bank: Tensor, bank_labels: Tensor, queries: Tensor, ks: tuple[int, ...] = KS) -> dict[int, Tensor]:
    """The class of each query by weighted vote of its k nearest bank features, for several k from one search.

    Ties: of neighbours with equal cosine the lower bank index comes first, of classes with equal votes the lower
    class wins. Votes are summed in float64, nearest first, on the CPU, so that the result does not depend on the order
    of a parallel sum.

    Args:
        bank: (N, D) features; normalised here.
        bank_labels: (N,) int64 labels.
        queries: (M, D) features; normalised here.
        ks: numbers of neighbours; a k above N means N.

    Returns:
        for each k the (M,) int64 predicted classes, on the CPU.
    """
    limits = {k: min(k, len(bank)) for k in ks}
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    cosines, indices = nearest(bank, queries, max(limits.values()))
    votes = bank_labels.cpu()[indices]  # (M, k)
    weights = (cosines.double() / TEMPERATURE).exp()
    scores = torch.zeros(len(queries), int(bank_labels.max()) + 1, dtype=torch.float64)
    predictions, counted = {}, 0
    for k, limit in sorted(limits.items()):
        scores.scatter_add_(1, votes[:, counted:limit], weights[:, counted:limit])
        predictions[k], counted = scores.argmax(dim=1), limit
    return predictions


class KNN:
    """`knn-v1`: the whole train set as bank, k in {1, 10, 20, 200}, headline k = 20, weights exp(cos / 0.07)."""

    name = "knn-v1"
    tabulated = True

    def __call__(self, probe: Probe) -> Metrics:
        """Classifies the test features by the train features, of which there must be at least 20.

        Returns:
            "top1" (k = 20), "top1_k1", "top1_k10", "top1_k20", "top1_k200" in percent, and "n_test". With fewer than
            200 train images the k = 200 vote is one of all.
        """
        bank, queries = probe.features("train"), probe.features("test")
        bank_labels, labels = probe.labels("train"), probe.labels("test").cpu()
        if len(bank) < HEADLINE_K:
            raise ValueError(f"the train set must have at least {HEADLINE_K} images, got {len(bank)}")
        if not probe.main:
            return {}
        predictions = knn_predict(bank, bank_labels, queries)
        accuracy = {k: 100 * (predicted == labels).double().mean().item() for k, predicted in predictions.items()}
        return {
            "top1": accuracy[HEADLINE_K],
            **{f"top1_k{k}": accuracy[k] for k in KS},
            "n_test": len(labels),
        }
