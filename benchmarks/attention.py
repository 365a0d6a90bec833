"""Attention strategies at the sizes of SDXL's layers: time, error against float64, peak scratch memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from perflow_blocks.attention.strategies import (
    AttentionStrategy,
    attention_strategy_names,
    get_attention_strategy,
)

from .measure import Setting, peak_bytes, rounds_within, time_in_turns
from .report import Report, megabytes, table

BASE = "native"
HEAD_DIM = 64
COMPILED = {"flex"}
"""What is meant to be called under torch.compile: without it, all scores are computed and stored."""

SECONDS_A_SIZE, FEWEST_ROUNDS, MOST_ROUNDS = 10.0, 3, 40

TEXT = """Layers of SDXL at 1024 x 1024 pixels, {batch} rows, heads of {head_dim} channels, random normal queries,
keys and values. As many rounds in turns as fit into {seconds:g} s a size, {fewest} to {most}; medians and quartiles.
Times as fast is the median of `{base}` over that of the strategy. Errors are those of the output against attention
computed in float64 from the same inputs, in units of that output's root mean square. Memory is the peak above the
inputs, the output included, in a run apart from the timed ones."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The sizes of an attention layer."""

    kind: str
    queries: int
    keys: int
    heads: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.queries} x {self.keys}, {self.heads} heads"

    def inputs(self, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, sequence, heads, head_dim)."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(batch, length, self.heads, HEAD_DIM, generator=generator).to(device, dtype)
            for length in (self.queries, self.keys, self.keys)
        )
        return query, key, value


LAYERS = (
    Layer(kind="self", queries=4096, keys=4096, heads=10),
    Layer(kind="self", queries=1024, keys=1024, heads=20),
    Layer(kind="cross", queries=4096, keys=77, heads=10),
    Layer(kind="cross", queries=1024, keys=77, heads=20),
)
TINY_LAYERS = (Layer(kind="self", queries=64, keys=64, heads=2), Layer(kind="cross", queries=48, keys=77, heads=2))


def run(setting: Setting) -> Iterator[Report]:
    batch = 2 if setting.device.type == "cuda" else 1
    layers = TINY_LAYERS if setting.quick else LAYERS
    text = TEXT.format(
        batch=batch,
        head_dim=HEAD_DIM,
        seconds=SECONDS_A_SIZE,
        fewest=setting.rounds(FEWEST_ROUNDS),
        most=setting.rounds(MOST_ROUNDS),
        base=BASE,
    )
    parts = [text]
    missing: dict[str, str] = {}
    for dtype in _dtypes(setting.device):
        strategies, missing = available(setting.device, dtype)
        name = str(dtype).removeprefix("torch.")
        rows = [row for layer in layers for row in measure(strategies, layer, batch, dtype, setting)]
        header = (
            "layer",
            "strategy",
            "rounds",
            "ms (quartiles)",
            "times as fast",
            "max error",
            "RMS error",
            "peak MB",
        )
        parts += [f"## {name}", table(header, rows)]
    if missing:
        parts += ["## Not run here", "\n".join(f"- `{name}`: {reason}" for name, reason in missing.items())]
    yield Report(title="Attention strategies", parts=tuple(parts))


def available(device: torch.device, dtype: torch.dtype) -> tuple[list[AttentionStrategy], dict[str, str]]:
    """The strategies that run on the device, and for the others what they say is missing."""
    strategies, missing = [], {}
    for name in attention_strategy_names():
        strategy = get_attention_strategy(name)
        try:
            strategy.resolve(device, dtype, HEAD_DIM)
        except (ImportError, ValueError) as error:
            missing[name] = str(error)
        else:
            strategies.append(strategy)
    return strategies, missing


def measure(
    strategies: list[AttentionStrategy], layer: Layer, batch: int, dtype: torch.dtype, setting: Setting
) -> Iterator[tuple[object, ...]]:
    """The table's rows for one layer."""
    query, key, value = layer.inputs(batch, dtype, setting.device)
    exact = attention_in_float64(query, key, value)
    runs: dict[str, Callable[[], Tensor]] = {}
    errors: dict[str, Tensor] = {}
    labels, declined = {}, []
    with torch.inference_mode():
        for strategy in strategies:
            reason = strategy.refuses(query, key, None)
            if reason is not None:
                declined.append((layer, strategy.name, "-", reason, "-", "-", "-", "-"))
                continue
            labels[strategy.name], attend, output = prepare(strategy, (query, key, value))
            errors[strategy.name] = (output.double() - exact) / exact.square().mean().sqrt()
            runs[strategy.name] = partial(attend, query, key, value)
        rounds = rounds_within(SECONDS_A_SIZE, runs, setting.device, fewest=FEWEST_ROUNDS, most=MOST_ROUNDS)
        timings = time_in_turns(runs, setting, rounds=rounds, label=f"attention {layer}", warm_up=0)
        for name, call in runs.items():
            yield (
                layer,
                labels[name],
                setting.rounds(rounds),
                timings[name].milliseconds(),
                f"{timings[BASE].median / timings[name].median:.2f}",
                f"{float(errors[name].abs().max()):.1e}",
                f"{float(errors[name].square().mean().sqrt()):.1e}",
                megabytes(peak_bytes(call, setting.device)),
            )
    yield from declined


def prepare(
    strategy: AttentionStrategy, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[str, Callable[..., Tensor], Tensor]:
    """What to call it in the table, the function to time, and what its first call returned."""
    label, strategy = strategy.name, strategy.resolve(inputs[0].device, inputs[0].dtype, HEAD_DIM)
    if strategy.name != label:
        label += f" (here {strategy.name})"
    if strategy.name in COMPILED:
        compiled = torch.compile(lambda query, key, value: strategy(query, key, value), fullgraph=True, dynamic=False)
        try:
            return f"{label} (compiled)", compiled, compiled(*inputs)
        except RuntimeError as error:  # such as a machine without a C++ compiler
            label += f" (not compiled: {type(error).__name__})"
    return label, strategy, strategy(*inputs)


def attention_in_float64(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v by the formula, (batch, queries, heads, head_dim), a head at a time."""
    heads = []
    for index in range(query.shape[2]):
        q, k, v = (tensor[:, :, index].double() for tensor in (query, key, value))
        heads.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v)
    return torch.stack(heads, dim=2)


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32, torch.bfloat16)
