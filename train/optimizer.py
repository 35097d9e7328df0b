# SPDX-License-Identifier: Apache-2.0
"""Optimizers and the learning rate over the steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from train.config import Config
from train.errors import UserError

CRITIC = ("log_temperature", "learnt_bias")  #: of train.objective.Objective


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Weight decay (and LARS's trust ratio) on matrices and filters only, none on biases and batch norm.

    ``--decay-shortcuts`` also decays what the paper's code missed by going by names: the batch norm of the
    shortcuts, which torchvision calls ``downsample.1``. With ``--scale-learning-rate`` the temperature and bias of
    the objective are a group of their own; ``share`` of the peak learning rate is each group's.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    critic: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        missed = config.decay_shortcuts and "downsample" in name
        if config.scale_learning_rate is not None and name.endswith(CRITIC):
            critic.append(parameter)
            continue
        (decayed if parameter.ndim > 1 or missed else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    if config.scale_learning_rate is not None:
        groups.append(
            {"params": critic, "weight_decay": 0.0, "share": config.scale_learning_rate / config.learning_rate}
        )
    return groups


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(config.momentum, 0.999))
    try:
        from timm.optim.lars import Lars
    except ImportError as error:
        raise UserError("--optimizer lars needs timm: pip install timm") from error
    return Lars(groups, lr=0.0, momentum=config.momentum, trust_coeff=1e-3)  # no trust ratio without decay


def learning_rate(step: int, total: float, warmup: float, peak: float) -> float:
    """Linear warm-up, then half a cosine that reaches 0 after ``total`` steps; steps (or epochs) count from 0."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
