"""The student, the teacher's UNet with all weights free or with low-rank factors beside frozen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from .config import ModelConfig, OptimizerConfig
from .teacher import TeacherSource

ADAPTER = "default"
_BLOCKS = ("down_blocks.*", "mid_block.*", "up_blocks.*")


def build_student(
    source: TeacherSource, model: ModelConfig, optimizer: OptimizerConfig, base_dtype: torch.dtype
) -> Any:
    """The student on the CPU; its trainable weights are float32, a LoRA's frozen ones `base_dtype`."""
    if model.student == "full":
        student = source.load_unet(torch.float32).train().requires_grad_(True)
        for name in frozen_weights(student, model.frozen):
            student.get_parameter(name).requires_grad_(False)
        if model.frozen:
            student.register_forward_pre_hook(_require_input_gradient)
    else:
        from peft import LoraConfig

        student = source.load_unet(base_dtype).requires_grad_(False)
        modules = lora_modules(student, model.lora_targets)
        config = LoraConfig(r=model.lora_rank, lora_alpha=model.lora_rank, target_modules=modules)
        with torch.random.fork_rng(devices=[]):  # the same factors for the same seed
            torch.manual_seed(optimizer.seed)
            student.add_adapter(config, adapter_name=ADAPTER)
        cast_training_params(student, dtype=torch.float32)
        student.train()
    if optimizer.channels_last:
        student.to(memory_format=torch.channels_last)
    if optimizer.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if optimizer.compile:
        student.compile_repeated_blocks()
    return student


def frozen_weights(unet: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the weights that are not trained. Raises ValueError for a pattern that no weight or every one has."""
    names = [name for name, _ in unet.named_parameters()]
    missing = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if missing:
        raise ValueError(
            f"model.frozen: the UNet has no weight {', '.join(missing)}; name others, such as *transformer_blocks*."
        )
    frozen = frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    if len(frozen) == len(names):
        raise ValueError("model.frozen leaves no weight to train; name fewer.")
    return frozen


def lora_modules(unet: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Full names of the layers that get factors. Raises ValueError for a target that is not Linear or Conv2d."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if targets is None:
        return [name for name in layers if any(fnmatchcase(name, blocks) for blocks in _BLOCKS)]
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if missing:
        raise ValueError(
            f"model.lora_targets: the UNet has no linear layer or convolution {', '.join(missing)}; name others, such "
            "as to_q, to_k, to_v and to_out.0."
        )
    return [name for name in layers if f".{name}".endswith(tuple(f".{target}" for target in targets))]


def trainable(student: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def set_learning_rate(optimizer: Any, schedule: Any, learning_rate: float) -> None:
    """Goes on with another base rate where torch's `schedule` is: a loaded state brings that of the earlier run."""
    schedule.base_lrs = [learning_rate] * len(schedule.base_lrs)
    schedule._last_lr = [learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["initial_lr"], group["lr"] = learning_rate, rate


def lora_factors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors in a student's state: `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    return {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in state.items() if ".lora_" in name}


def lora_delta(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the factors add to the weights, by the weights' names, float32 on the CPU."""
    delta = {}
    for name, down in factors.items():
        module, found, _ = name.partition(".lora_A.")
        if found:
            up = factors[f"{module}.lora_B.weight"].float().cpu()
            product = up.flatten(1) @ down.float().cpu().flatten(1)
            delta[f"{module}.weight"] = product.reshape(len(up), *down.shape[1:])
    return delta


def _require_input_gradient(unet: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lets gradients reach the sample on a CPU: torch 2.13's GroupNorm in channels-last crashes in its backward pass
    there if its input needs none, as behind frozen layers."""
    sample, *rest = args
    needed = torch.is_grad_enabled() and sample.device.type == "cpu"
    return (sample.detach().requires_grad_(needed), *rest)
