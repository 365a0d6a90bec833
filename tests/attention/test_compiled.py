"""An attention plan under torch.compile: one graph, compiled once, with a report that says what it cannot count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from perflow_blocks import AttentionConfig
from perflow_blocks.testing import tiny_sdxl_unet
from tests.attention.conftest import HALF, SAMPLE, Kernel, embeddings, kernel

__all__ = ["kernel"]  # a fixture

MakeKernel = Callable[..., Kernel]

pytestmark = pytest.mark.behaviour


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_unet_is_one_graph_and_is_not_compiled_again(backend: str) -> None:
    unet, attention = tiny_sdxl_unet(), AttentionConfig({"self": "native", "cross": "sliced"})
    with torch.no_grad():
        expected = unet(SAMPLE, 500, **embeddings())[0]
        compiled = torch.compile(unet, fullgraph=True, backend=backend)
        attention.attach({"unet": compiled})
        first = compiled(SAMPLE, 500, **embeddings())[0]
        report = attention.report()
        with torch._dynamo.config.patch(error_on_recompile=True):
            attention.attach({"unet": compiled})
            second = compiled(SAMPLE, 500, **embeddings())[0]
            unet(SAMPLE, 500, **embeddings())  # counts
            compiled(SAMPLE, 500, **embeddings())
    assert torch.equal(first, expected) and torch.equal(second, expected)
    for row in report.rows:
        assert row.calls == ()
        assert row.traced == (("native",) if row.kind == "self" else ("sliced",))
        assert row.in_compiled
    assert {row.calls for row in attention.report().rows} == {(("native", 1),), (("sliced", 1),)}
    assert "sliced (compiled)" in str(report)
    another = AttentionConfig({"self": "native", "cross": "sliced"})
    another.attach({"unet": compiled})
    assert [row.traced for row in another.report().rows] == [row.traced for row in report.rows]
    another.detach()
    another = AttentionConfig({"self": "native", "cross": "sliced"})
    another.attach({"unet": compiled})
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(SAMPLE, 500, **embeddings())
    assert {row.cells()[2] for row in another.report().rows} == {"not counted (compiled)"}


@pytest.mark.parametrize("regional", [False, True])
def test_a_unet_compiled_in_place_or_by_its_blocks(regional: bool) -> None:
    unet, attention, counter = tiny_sdxl_unet(), AttentionConfig("sliced"), CompileCounter()
    with torch.no_grad():
        expected = unet(SAMPLE, 500, **embeddings())[0]
        attention.attach({"unet": unet})
        (unet.compile_repeated_blocks if regional else unet.compile)(fullgraph=True, backend=counter)
        results = [unet(SAMPLE, 500, **embeddings())[0] for _ in range(2)]
    assert all(torch.equal(result, expected) for result in results)
    assert counter.frame_count == 1  # blocks that are alike share a graph, with a processor each
    shown = [row.cells()[2] for row in attention.report().rows]
    assert shown == ["sliced (compiled)"] * 2 + ([f"{'not counted' if regional else 'sliced'} (compiled)"] * 6)


def test_a_part_that_is_compiled_has_the_names_it_had() -> None:
    unet, attention = tiny_sdxl_unet(), AttentionConfig({"unet.mid_block.attentions.*": "sliced"})
    unet.mid_block = torch.compile(unet.mid_block, fullgraph=True, backend="eager")
    attention.attach({"unet": unet})
    with torch.no_grad():
        unet(SAMPLE, 500, **embeddings())
    rows = {row.module: row for row in attention.report().rows}
    middle = [rows[f"unet.mid_block.attentions.0.transformer_blocks.0.attn{number}"] for number in (1, 2)]
    assert [row.traced for row in middle] == [("sliced",)] * 2
    assert {module for module, row in rows.items() if row.in_compiled} == {row.module for row in middle}


def test_what_cannot_be_compiled_or_taken_runs_native_in_the_graph(
    kernel: MakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    opaque, half = kernel("opaque"), kernel("half", dtypes=HALF)
    half.compilable = True
    unet, attention = tiny_sdxl_unet(), AttentionConfig({"self": "opaque", "cross": "half"})
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = unet(SAMPLE, 500, **embeddings())[0]
        attention.attach({"unet": unet})
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        result = compiled(SAMPLE, 500, **embeddings())[0]
    assert torch.equal(result, expected)
    assert opaque.calls == half.calls == []
    for row in attention.report().rows:
        reason = "torch.compile cannot trace opaque" if row.kind == "self" else "half takes float16 or bfloat16"
        assert row.traced == ("native",)
        assert row.fallbacks[0][0].startswith(reason)
    assert len([record for record in caplog.records if "runs native attention" in record.message]) == 2
