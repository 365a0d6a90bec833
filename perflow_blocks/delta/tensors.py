"""The accelerator as a difference of weights, dW = W_student - W_base (arXiv 2405.07510), added to other weights.

Differences are taken and added in float32 or better and rounded once to the weight's type: summing in half precision
would round the small dW to the spacing of the large W before the sum as well as after it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

INPUT_WEIGHT = "conv_in.weight"
"""Key of the one UNet weight, (output channels, input channels, k, k), whose shape depends on what the UNet is fed."""

LATENT_CHANNELS = 4
"""Input channels of a UNet that is fed noisy latents only. A UNet that is fed more takes the noisy latents first: for
inpainting 9 channels, of which the last 5 are the mask and the latents of the masked picture."""


def subtract(student: Tensor, base: Tensor) -> Tensor:
    """`student - base` in float32, a new tensor of their common shape on the student's device."""
    return student.detach().float() - base.detach().to(student.device).float()


def floating_entries(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point parameters and buffers by state-dict key: those a delta speaks of. Nothing is copied."""
    state = weights.state_dict(keep_vars=True) if isinstance(weights, nn.Module) else weights
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def extract_delta(
    student: nn.Module | Mapping[str, Tensor], base: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """dW of two models of one architecture, each a module or its state dict: float32 by state-dict key.

    Integer buffers are no part of a delta. Shapes are those of the weights. Added to the base in float32, the
    difference gives the student's very bits where both are within a factor of 2 of each other (Sterbenz' lemma), as
    almost all weights of a fine-tune are; elsewhere it is off by at most one unit in the last place of the larger.

    Raises:
        ValueError: the two differ in keys or shapes, or hold weights without values ("meta" device).
    """
    student_entries, base_entries = floating_entries(student), floating_entries(base)
    mismatch = describe_mismatch(
        {name: tuple(tensor.shape) for name, tensor in student_entries.items()},
        {name: tuple(tensor.shape) for name, tensor in base_entries.items()},
        given="the student",
        expected="the base",
    )
    if mismatch:
        raise ValueError(f"student and base are no pair: {mismatch}. Pass two models of the same architecture.")
    empty = [name for name, tensor in (*student_entries.items(), *base_entries.items()) if tensor.is_meta]
    if empty:
        raise ValueError(f"{listed(empty)} hold no values (device 'meta'); load both models before extracting.")
    return {name: subtract(tensor, base_entries[name]) for name, tensor in student_entries.items()}


def extra_input_channels(
    delta_shapes: Mapping[str, tuple[int, ...]], weight_shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """How many input channels the model has more than the delta, where one of them has those of the latents alone.

    So 5 for the delta of a plain UNet and an inpainting UNet, -5 the other way round. 0 where `conv_in.weight` has one
    shape, is not in both, or differs in more than its input channels.
    """
    delta_shape, weight_shape = delta_shapes.get(INPUT_WEIGHT, ()), weight_shapes.get(INPUT_WEIGHT, ())
    if not len(delta_shape) == len(weight_shape) == 4:
        return 0
    of_delta, of_model = delta_shape[1], weight_shape[1]
    alike = (delta_shape[0], *delta_shape[2:]) == (weight_shape[0], *weight_shape[2:])
    return of_model - of_delta if alike and min(of_delta, of_model) == LATENT_CHANNELS else 0


def describe_mismatch(
    given_shapes: Mapping[str, tuple[int, ...]],
    expected_shapes: Mapping[str, tuple[int, ...]],
    *,
    given: str,
    expected: str,
    partial: bool = False,
) -> str:
    """In which keys and shapes `given` differs from `expected`, as one line; empty where it does not.

    With `partial` given may leave keys out.
    """
    missing = [] if partial else [name for name in expected_shapes if name not in given_shapes]
    unexpected = [name for name in given_shapes if name not in expected_shapes]
    misshapen = [
        f"{name} is {list(shape)} instead of {list(expected_shapes[name])}"
        for name, shape in given_shapes.items()
        if name in expected_shapes and shape != expected_shapes[name]
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing from {given} ({listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected, not in {expected} ({listed(unexpected)})")
    if misshapen:
        parts.append(f"{len(misshapen)} of another shape ({listed(misshapen, separator='; ')})")
    return "; ".join(parts)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN; waits for the device."""
    known = tensor if tensor.element_size() > 1 else tensor.half()  # of 8-bit floats torch cannot tell
    return bool(torch.isfinite(known).all())


def listed(names: list[str], *, limit: int = 5, separator: str = ", ") -> str:
    """The first `limit` names, and how many more there are."""
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
