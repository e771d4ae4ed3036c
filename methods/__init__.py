"""Self-supervised methods, one class in one file each."""

from ssl_bench.methods.barlow_twins import BarlowTwins
from ssl_bench.methods.base import Method
from ssl_bench.methods.byol import BYOL
from ssl_bench.methods.classifier import Classifier
from ssl_bench.methods.corinfomax import CorInfoMax
from ssl_bench.methods.dino import DINO
from ssl_bench.methods.mae import MAE
from ssl_bench.methods.mmcr import MMCR
from ssl_bench.methods.moco_v2 import MoCoV2
from ssl_bench.methods.moco_v3 import MoCoV3
from ssl_bench.methods.nnclr import NNCLR
from ssl_bench.methods.simclr import SimCLR
from ssl_bench.methods.simsiam import SimSiam
from ssl_bench.methods.supcon import SupCon
from ssl_bench.methods.swav import SwAV
from ssl_bench.methods.tico import TiCo
from ssl_bench.methods.vicreg import VICReg
from ssl_bench.methods.views import Crop, Labels, Noise, PaddedCrop
from ssl_bench.methods.w_mse import WMSE

METHODS: dict[str, type[Method]] = {
    "barlow_twins": BarlowTwins,
    "byol": BYOL,
    "corinfomax": CorInfoMax,
    "dino": DINO,
    "mae": MAE,
    "mmcr": MMCR,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "nnclr": NNCLR,
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "supcon": SupCon,
    "swav": SwAV,
    "tico": TiCo,
    "vicreg": VICReg,
    "w_mse": WMSE,
}

__all__ = [
    "BYOL",
    "DINO",
    "MAE",
    "METHODS",
    "MMCR",
    "NNCLR",
    "WMSE",
    "BarlowTwins",
    "Classifier",
    "CorInfoMax",
    "Crop",
    "Labels",
    "Method",
    "MoCoV2",
    "MoCoV3",
    "Noise",
    "PaddedCrop",
    "SimCLR",
    "SimSiam",
    "SupCon",
    "SwAV",
    "TiCo",
    "VICReg",
]
