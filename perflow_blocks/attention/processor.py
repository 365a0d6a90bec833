"""The attention processors that call a strategy: they take the place of diffusers' plain ones, module by module."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn

from .registry import get_attention_strategy
from .report import AttentionRecord
from .strategy import AttentionStrategy

NATIVE = get_attention_strategy("native")
"""What runs where a strategy does not take a call."""


class StrategyAttnProcessor:
    """Attention of a transformer block by a strategy; with `native` bit for bit what `AttnProcessor2_0` computes.

    Where the strategy does not take a call, `native` does. All that undoes the replacement is here, in `replaced`. A
    copy, also a pickled one, keeps strategy and `replaced` and counts for itself. diffusers makes new processors by
    `type(processor)()` when IP-Adapters come and go: such a one computes natively.

    Attributes:
        stands_for: the class of diffusers whose place it takes.
        strategy: what it calls.
        replaced: the processor that it took the place of.
        record: where it counts.
    """

    stands_for: type = AttnProcessor2_0

    def __init__(
        self,
        strategy: AttentionStrategy = NATIVE,
        replaced: Any = None,
        record: AttentionRecord | None = None,
    ) -> None:
        self.strategy = strategy
        self.replaced = self.stands_for() if replaced is None else replaced
        self.record = AttentionRecord() if record is None else record

    def __getstate__(self) -> dict[str, Any]:
        return {"strategy": self.strategy.name, "replaced": self.replaced}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.strategy = get_attention_strategy(state["strategy"])
        self.replaced = state["replaced"]
        self.record = AttentionRecord()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            attn: the module, of the form that `why_kept` lets through.
            hidden_states: (batch, queries, channels).
            encoder_hidden_states: (batch, keys, channels of the prompt); None for self-attention.
            attention_mask: (batch or batch * heads, 1 or queries, keys), added to the scores.

        Returns:
            (batch, queries, channels).
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            batch, keys, _ = context.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.unflatten(0, (batch, attn.heads))  # (batch, heads, 1 or queries, keys)
        projected = self.project(attn, hidden_states, encoder_hidden_states)
        query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in projected)  # (..., heads, head_dim)
        attended = self._attend(attn, query, key, value, attention_mask)
        attended = attended.flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](attended))

    def project(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query (batch, queries, inner channels), key and value (batch, keys, inner channels)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)

    def _attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Calls the strategy, or `native` where it must; (batch, queries, heads, head_dim)."""
        asked, compiling = self.strategy, torch.compiler.is_compiling()
        call = (query.shape, key.shape, query.dtype, query.device, mask)
        if asked is NATIVE:
            reason = None
        elif _is_perturbed(attn):
            reason = "perturbed attention is made of PyTorch's own kernel"
        elif compiling and not asked.compilable:
            reason = f"torch.compile cannot trace {asked.name}"
        else:
            reason = asked.supports(*call)
        strategy = asked if reason is None else NATIVE
        ran = strategy.choice(*call)
        if compiling:
            self.record.trace(asked.name, ran, reason)
        else:
            self.record.count(asked.name, ran, reason)
        return strategy(query, key, value, mask)


class FusedStrategyAttnProcessor(StrategyAttnProcessor):
    """The same on fused projections: one matrix for query, key and value, or for key and value of the prompt."""

    stands_for = FusedAttnProcessor2_0

    def project(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if encoder_hidden_states is None:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            key, value = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        return query, key, value


PROCESSORS: dict[type, type[StrategyAttnProcessor]] = {
    AttnProcessor2_0: StrategyAttnProcessor,
    FusedAttnProcessor2_0: FusedStrategyAttnProcessor,
}
"""The processors of diffusers that are replaced, and what by."""

# Guiders that skip layers look a processor's class up here. diffusers has no entry for fused projections either.
AttentionProcessorRegistry.register(StrategyAttnProcessor, AttentionProcessorRegistry.get(AttnProcessor2_0))


def plain_processor(processor: Any) -> Any:
    """What a processor of this package took the place of; any other one as it is."""
    return processor.replaced if isinstance(processor, StrategyAttnProcessor) else processor


def strategies_of(model: nn.Module) -> set[AttentionStrategy]:
    """The strategies that attention modules of a model call."""
    processors = (module.processor for module in model.modules() if isinstance(module, Attention))
    return {processor.strategy for processor in processors if isinstance(processor, StrategyAttnProcessor)}


def why_kept(attn: Attention) -> str | None:
    """Why a module keeps the processor it has; None where a strategy may take its place.

    Exactly diffusers' plain processors are replaced, in modules that do no more than project and attend.
    """
    processor = plain_processor(attn.processor)
    if type(processor) not in PROCESSORS:
        return type(processor).__name__
    plain = (
        attn.group_norm is None
        and attn.spatial_norm is None
        and attn.norm_cross is None
        and attn.norm_q is None
        and attn.norm_k is None
        and attn.added_kv_proj_dim is None
        and attn.to_out is not None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
        and attn.inner_kv_dim == attn.inner_dim
    )
    return None if plain else "more than a transformer block's attention"


def _is_perturbed(attn: Attention) -> bool:
    """Whether a guider's hook hangs on the module that catches calls of scaled_dot_product_attention."""
    registry = getattr(attn, "_diffusers_hook", None)
    hooks = () if registry is None else registry.hooks.values()
    return any(isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores for hook in hooks)
