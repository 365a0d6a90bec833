"""The optimizer and its learning rate over the training."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from .config import OptimizerConfig


def optimizer_problem(config: OptimizerConfig) -> str | None:
    """Why the optimizer cannot be used here, if so."""
    if config.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        return "optimizer.name='adamw8bit' needs bitsandbytes, which is not installed; install it, or pass adamw."
    return None


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    match config.name:
        case "adamw":
            return torch.optim.AdamW(list(parameters), **settings)
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(list(parameters), **settings)


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> Any:
    """The learning rate's course over the updates; to be stepped once after each."""
    return get_scheduler(
        config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )


def set_learning_rate(optimizer: Any, schedule: Any, learning_rate: float) -> None:
    """Goes on with another base rate where the schedule is: a loaded state brings that of the earlier run.

    Args:
        optimizer: accelerate's or torch's.
        schedule: torch's own `LambdaLR`.
        learning_rate: the base rate from here on.
    """
    schedule.base_lrs = [learning_rate] * len(schedule.base_lrs)
    rates = [learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["initial_lr"], group["lr"] = learning_rate, rate
    schedule._last_lr = rates
