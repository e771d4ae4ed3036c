"""The paper's claims, each with an estimate, its interval, a threshold and a verdict; and the errata of its text."""

from ssl_bench.report.aggregate import Collection
from ssl_bench.report.claims.accuracy import check_ahead, check_lambda, check_speed, check_warmup
from ssl_bench.report.claims.evidence import Claim, Load
from ssl_bench.report.claims.ratio import check_start
from ssl_bench.report.claims.sharpness import check_gradient_noise, check_sharpness

ERRATA = (
    "Equations 5, 12 and 13 leave out the + gamma_min that equation 4 adds to phi.",
    "With alpha = 1, phi(0) = 1 / (1 + exp(-lambda d_e)) lies in (0.5, 1): the learning rate starts reduced, not "
    "unchanged as section 4 says.",
    "gamma_target, which the experiments vary as the learning rate, appears nowhere in Algorithm 1.",
    "With weight decay in the norm the ratio |w| / |g + beta w| tends to 1 / beta as the gradient vanishes, and times "
    "eta to eta / beta (2 at the paper's 1e-3 and 5e-4), not to infinity (section 5.1, appendix D). This is algebra: "
    "no run can show otherwise.",
    "phi anneals the learning rate only as far as lambda x steps goes: over 100 epochs at Table 1's lambda = 1e-4 it "
    "falls by 44% at B = 512 and by 1.5% at B = 16,384, where TVLARS is LARS at half a constant learning rate.",
    "Theorem 1 bounds E[g_B - g], which is 0; E|g_B - g|^2 is meant.",
    "Figure 65's caption repeats lambda = 0.01; judging by its position it is 0.005.",
    "Every Tiny ImageNet classification accuracy in Table 1 is a multiple of 0.04, so it was measured on 2,500 test "
    "images, a quarter of the set.",
)


def check_claims(collection: Collection, load: Load) -> list[Claim]:
    """Checks every claim on what the runs recorded.

    Args:
        collection: the runs.
        load: a run's curves.
    """
    return [
        check_ahead(collection),
        check_warmup(collection),
        check_speed(collection, load),
        check_lambda(collection),
        check_start(collection, load),
        check_sharpness(collection),
        check_gradient_noise(collection),
    ]
