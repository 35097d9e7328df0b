# SPDX-License-Identifier: Apache-2.0
"""Fused pairwise sigmoid contrastive losses. Start at :func:`mio_loss`; the maths is in ``reference``."""

from . import analysis, distributed, reference
from .backends import available_backends
from .losses import mio_loss, siglip_loss
from .micro_batches import backward_in_micro_batches
from .modules import MIOLoss, SigLIPLoss
from .reference import PairStats
from .version import __version__ as __version__

__all__ = [
    "MIOLoss",
    "PairStats",
    "SigLIPLoss",
    "analysis",
    "available_backends",
    "backward_in_micro_batches",
    "distributed",
    "mio_loss",
    "reference",
    "siglip_loss",
]
