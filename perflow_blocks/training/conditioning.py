"""Prompts to what the UNets are told of them, for every family, with embeddings kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedulers.pfode_solver import Conditioning, sdxl_conditioning
from .buckets import Size, TrainingBatch


class TextRow(NamedTuple):
    """One prompt's embeddings: (tokens, width), and for SDXL pooled (width,)."""

    prompt_embeds: Tensor
    pooled: Tensor | None


class TextCache:
    """The embeddings of the prompts that were used last, up to `max_entries`; 0 keeps none."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._rows: OrderedDict[str, TextRow] = OrderedDict()

    def get(self, prompt: str) -> TextRow | None:
        row = self._rows.get(prompt)
        if row is not None:
            self._rows.move_to_end(prompt)
        return row

    def put(self, prompt: str, row: TextRow) -> None:
        if self._max_entries:
            self._rows[prompt] = row
            if len(self._rows) > self._max_entries:
                self._rows.popitem(last=False)


class PromptEncoder:
    """Encodes prompts as the teacher's pipeline does.

    Args:
        pipeline: with the text encoders, on their device or offloaded from it.
        device: where the embeddings go.
        added_conditions: whether the UNet takes pooled embeddings and time ids (SDXL).
        cache: prompts to keep.
        offload: called when prompts were encoded, to take the text encoders back to the host.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        *,
        added_conditions: bool,
        cache: int,
        offload: Callable[[], Any] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._device = device
        self._added_conditions = added_conditions
        self._cache = TextCache(cache)
        self._offload = offload
        self.empty: TextRow = self._encode("", negative=True)
        """The prompt of nothing, as the pipeline takes it for guidance: of SDXL mostly zeros."""
        self._take_back()

    def rows(self, prompts: Sequence[str]) -> list[TextRow]:
        """A row for each prompt. Each is encoded by itself, as its rounding depends on what else is in a batch, and a
        run that is resumed, with nothing kept, has to get the same.
        """
        rows, encoded = [], False
        for prompt in prompts:
            row = self._cache.get(prompt)
            if row is None:
                row = self._encode(prompt)
                self._cache.put(prompt, row)
                encoded = True
            rows.append(row)
        if encoded:
            self._take_back()
        return rows

    def _take_back(self) -> None:
        if self._offload is not None:
            self._offload()

    def conditioning(self, rows: Sequence[TextRow], time_ids: Tensor) -> Conditioning:
        """Conditions (batch, ...) from a row for each prompt; `time_ids` (batch, 6) count for SDXL."""
        prompt_embeds = torch.stack([row.prompt_embeds for row in rows])
        if not self._added_conditions:
            return Conditioning(prompt_embeds=prompt_embeds)
        pooled = torch.stack([row.pooled for row in rows if row.pooled is not None])
        return sdxl_conditioning(prompt_embeds, pooled, time_ids)

    def dropped(self, rows: Sequence[TextRow], drop: Sequence[bool]) -> list[TextRow]:
        """The rows with the empty prompt where `drop` says so."""
        return [self.empty if left_out else row for row, left_out in zip(rows, drop, strict=True)]

    def time_ids(self, originals: Sequence[Size], corners: Sequence[Size], targets: Sequence[Size]) -> Tensor:
        """SDXL's time ids (batch, 6): sizes before and after cutting, and where it was cut, each (height, width)."""
        rows = [
            [*original, *corner, *target] for original, corner, target in zip(originals, corners, targets, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float32).to(self._device, non_blocking=True)

    @torch.no_grad()
    def _encode(self, prompt: str, *, negative: bool = False) -> TextRow:
        """A prompt, or what guidance leads away from when there is no negative prompt."""
        found = self._pipeline.encode_prompt(
            prompt=[prompt], device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=negative
        )
        # Positive and negative embeddings, and for SDXL then the same pooled.
        own = found[int(negative) :: 2]
        return TextRow(own[0][0], own[1][0] if self._added_conditions else None)


def batch_time_ids(encoder: PromptEncoder, batch: TrainingBatch) -> Tensor:
    return encoder.time_ids(batch.original_sizes, batch.crop_tops_lefts, batch.target_sizes)


def cast(conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """The conditions in a type; time ids, which half precision would round, stay as they are."""
    return Conditioning(
        prompt_embeds=conditioning.prompt_embeds.to(dtype),
        added={name: value if name == "time_ids" else value.to(dtype) for name, value in conditioning.added.items()},
    )
