"""The attention processors that call a strategy in place of diffusers' plain ones, and the record of what they ran."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.utils import logging
from torch import Tensor

from .strategies import AttentionStrategy, get_attention_strategy

logger = logging.get_logger(__name__)

NATIVE = get_attention_strategy("native")
"""What runs where a strategy does not take a call."""


@dataclass(kw_only=True, eq=False)
class AttentionRecord:
    """What one attention module was asked to run, and ran.

    `counts` holds calls by (strategy that ran, why it was not the one asked for). `told` are the (strategy, reason)
    pairs warned of so far, shared by all modules of an `AttentionConfig`.
    """

    module: str = "an attention module"  # its name, with the model's in front
    kind: str = "self"
    asked: str | None = None  # the strategy of the plan; None if the plan says nothing of this module
    kept: str | None = None  # why the module keeps a processor of its own
    compiled: bool = False  # whether it is inside compiled code, where calls are not counted; set in a report
    counts: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    told: set[tuple[str, str]] = field(default_factory=set, repr=False)

    @property
    def calls(self) -> dict[str, int]:
        """By the strategy that ran, the number of calls."""
        totals = Counter[str]()
        for (name, _), count in self.counts.items():
            totals[name] += count
        return dict(+totals)

    @property
    def fallbacks(self) -> dict[str, int]:
        """By the reason why `native` ran instead, the number of calls; 0 for calls inside compiled code."""
        return {reason: count for (_, reason), count in self.counts.items() if reason is not None}

    def cells(self) -> tuple[str, str, str, str]:
        """What a table shows after the module's name: kind, asked for, ran, why."""
        ran = [f"{name} {count}" for name, count in self.calls.items()] + ["compiled"] * self.compiled
        why = [f"{reason} ({count} native)" if count else reason for reason, count in self.fallbacks.items()]
        kept = [] if self.kept is None else [f"kept: {self.kept}"]
        return self.kind, self.asked or "-", ", ".join(ran) or "-", "; ".join(kept + why)

    def count(self, ran: str, asked: str, reason: str | None, calls: int = 1) -> None:
        """Counts calls, and warns once for each strategy that was asked for and reason why it did not run."""
        self.counts[ran, reason] += calls
        if reason is not None and (asked, reason) not in self.told:
            self.told.add((asked, reason))
            logger.warning("%s runs native attention instead of %s, which %s.", self.module, asked, reason)

    @torch.compiler.assume_constant_result  # runs while the call is traced, and leaves nothing in the graph
    def count_traced(self, asked: str, reason: str) -> None:
        self.count("native", asked, reason, calls=0)


class StrategyAttnProcessor:
    """Attention of a transformer block by a strategy; with `native` bit for bit what diffusers' processor computes.

    Where the strategy does not take a call, `native` does. Without arguments, as diffusers makes processors when
    IP-Adapters come and go, it is `native`. `replaced` is the processor to give back when the plan is taken out.
    """

    def __init__(
        self, strategy: AttentionStrategy = NATIVE, replaced: Any = None, record: AttentionRecord | None = None
    ) -> None:
        self.strategy = strategy
        self.replaced = AttnProcessor2_0() if replaced is None else replaced
        self.fused = isinstance(self.replaced, FusedAttnProcessor2_0)
        self.record = AttentionRecord() if record is None else record

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention (batch, queries, channels) of a transformer block's module.

        `hidden_states` are (batch, queries, channels), `encoder_hidden_states` (batch, keys, channels of the prompt).
        The mask (batch or batch * heads, 1 or queries, keys) is added to the scores.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, keys, _ = context.shape
        heads = attn.heads
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, heads, -1, keys)  # (batch, heads, 1 or queries, keys)
        if self.fused and encoder_hidden_states is None:  # one matrix for query, key and value
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            key, value = (
                attn.to_kv(context).chunk(2, dim=-1) if self.fused else (attn.to_k(context), attn.to_v(context))
            )
        query = query.view(batch, -1, heads, query.shape[-1] // heads)  # (batch, queries, heads, head_dim)
        key = key.view(batch, keys, heads, -1)
        value = value.view(batch, keys, heads, -1)

        strategy, reason = self.strategy, None
        if strategy is not NATIVE:
            reason = _why_native(strategy, attn, query, key, attention_mask)
            strategy = strategy if reason is None else NATIVE
        if not torch.compiler.is_compiling():
            self.record.count(strategy.name, self.strategy.name, reason)
        elif reason is not None:
            self.record.count_traced(self.strategy.name, reason)
        attended = strategy(query, key, value, attention_mask).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](attended))


PLAIN = (AttnProcessor2_0, FusedAttnProcessor2_0)
"""The processors of diffusers that are replaced."""

# Guiders that skip layers look a processor's class up here.
AttentionProcessorRegistry.register(StrategyAttnProcessor, AttentionProcessorRegistry.get(AttnProcessor2_0))


def _why_native(
    strategy: AttentionStrategy, attn: Attention, query: Tensor, key: Tensor, mask: Tensor | None
) -> str | None:
    """Why `native` must compute this call; None if the strategy can."""
    if torch.compiler.is_compiling() and not strategy.compilable:
        return "torch.compile cannot trace"
    hooks = getattr(attn, "_diffusers_hook", None)
    if hooks is not None and any(getattr(hook, "skip_attention_scores", False) for hook in hooks.hooks.values()):
        return "cannot be perturbed by a guider"  # which intercepts scaled_dot_product_attention
    return strategy.refuses(query, key, mask)
