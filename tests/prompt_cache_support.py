"""A pipeline that only encodes prompts, and how its encodings are compared and counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from perflow_blocks.blocks.encode import PeRFlowAutoTextEncoderStep
from perflow_blocks.testing.tiny import tiny_sdxl_components

from .loop_support import EMBEDS

TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
BOTH = ["text_encoder", "text_encoder_2"]
Result = dict[str, Tensor | None]


def text_pipeline(block: Any, **components: Any) -> Any:
    pipe = block.init_pipeline()
    tiny = tiny_sdxl_components()
    pipe.update_components(**{**{name: tiny[name] for name in TEXT}, **components})
    return pipe


def encode(pipe: Any, prompt: Any = "a red star", **inputs: Any) -> Result:
    state = pipe(prompt=prompt, **inputs)
    return {name: state.get(name) for name in EMBEDS}


def same(one: Result, other: Result) -> bool:
    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)

    return all(equal(one[name], other[name]) for name in EMBEDS)


def uncached(pipe: Any, **inputs: Any) -> Result:
    """What the block without a cache gives with the very same components."""
    parts = {name: getattr(pipe, name) for name in (*TEXT, "guider")}
    return encode(text_pipeline(PeRFlowAutoTextEncoderStep(), **parts), **inputs)


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the encoders that ran, appended to as they run; unlike hooks this leaves no trace on them."""
    ran: list[str] = []
    for kind in (CLIPTextModel, CLIPTextModelWithProjection):

        def forward(self: Any, *args: Any, _own: Any = kind.forward, _kind: Any = kind, **kwargs: Any) -> Any:
            ran.append(_kind.__name__)
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    return ran


def embedding(pipe: Any) -> nn.Embedding:
    return pipe.text_encoder_2.get_input_embeddings()


def write(pipe: Any) -> None:
    with torch.no_grad():
        embedding(pipe).weight.mul_(1.5)
