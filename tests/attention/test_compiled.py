"""An attention plan under torch.compile: one graph, compiled once, with a report that says what it cannot count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from perflow_blocks import AttentionConfig
from perflow_blocks.testing import tiny_sdxl_unet
from tests.attention.conftest import HALF, SAMPLE, Kernel, embeddings

MakeKernel = Callable[..., Kernel]

pytestmark = pytest.mark.behaviour


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_unet_is_one_graph_and_is_not_compiled_again() -> None:
    unet, attention = tiny_sdxl_unet(), AttentionConfig({"self": "native", "cross": "sliced"})
    with torch.no_grad():
        expected = unet(SAMPLE, 500, **embeddings())[0]
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        attention.attach({"unet": compiled})
        first = compiled(SAMPLE, 500, **embeddings())[0]
        report = attention.report()
        with torch._dynamo.config.patch(error_on_recompile=True):
            attention.attach({"unet": compiled})
            second = compiled(SAMPLE, 500, **embeddings())[0]
            unet(SAMPLE, 500, **embeddings())  # counts
            compiled(SAMPLE, 500, **embeddings())
            attention.detach()
            AttentionConfig({"self": "native", "cross": "sliced"}).attach({"unet": compiled})
            compiled(SAMPLE, 500, **embeddings())
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert all(row.compiled and row.calls == {} for row in report.rows)
    assert {row.cells()[2] for row in report.rows} == {"compiled"}
    ran = [row.calls for row in attention.report().rows]
    assert ran == [{"native" if row.kind == "self" else "sliced": 1} for row in report.rows]


@pytest.mark.parametrize("regional", [False, True])
def test_a_unet_compiled_in_place_or_by_its_blocks(regional: bool) -> None:
    unet, attention, counter = tiny_sdxl_unet(), AttentionConfig("sliced"), CompileCounter()
    with torch.no_grad():
        expected = unet(SAMPLE, 500, **embeddings())[0]
        attention.attach({"unet": unet})
        (unet.compile_repeated_blocks if regional else unet.compile)(fullgraph=True, backend=counter)
        results = [unet(SAMPLE, 500, **embeddings())[0] for _ in range(2)]
    assert all(torch.allclose(result, expected, atol=1e-5) for result in results)
    assert counter.frame_count == 1  # blocks that are alike share a graph, with a processor each
    assert {row.cells()[1:3] for row in attention.report().rows} == {("sliced", "compiled")}


def test_other_kernels_compile_by_blocks() -> None:
    unet, attention = tiny_sdxl_unet(), AttentionConfig("flex")
    with torch.no_grad():
        expected = unet(SAMPLE, 500, **embeddings())[0]
        attention.attach({"unet": unet})
        unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        result = unet(SAMPLE, 500, **embeddings())[0]
    assert (result - expected).norm() < 2e-2 * expected.norm()
    assert not any(row.fallbacks for row in attention.report().rows)


def test_a_part_that_is_compiled_has_the_names_it_had() -> None:
    unet, attention = tiny_sdxl_unet(), AttentionConfig({"unet.mid_block.attentions.*": "sliced"})
    unet.mid_block = torch.compile(unet.mid_block, fullgraph=True, backend="eager")
    attention.attach({"unet": unet})
    with torch.no_grad():
        unet(SAMPLE, 500, **embeddings())
    middle = {f"unet.mid_block.attentions.0.transformer_blocks.0.attn{number}" for number in (1, 2)}
    assert {row.module for row in attention.report().rows if row.asked} == middle
    assert {row.module for row in attention.report().rows if row.compiled} == middle


def test_what_cannot_be_compiled_or_taken_runs_native_in_the_graph(
    kernel: MakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    opaque, half = kernel("opaque"), kernel("half", dtypes=HALF, compilable=True)
    unet, attention = tiny_sdxl_unet(), AttentionConfig({"self": "opaque", "cross": "half"})
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = unet(SAMPLE, 500, **embeddings())[0]
        attention.attach({"unet": unet})
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        result = compiled(SAMPLE, 500, **embeddings())[0]
    assert torch.equal(result, expected)
    assert opaque.calls == half.calls == []
    for row in attention.report().rows:
        reason = "torch.compile cannot trace" if row.kind == "self" else "takes float16 or bfloat16, not float32"
        assert row.fallbacks == {reason: 0}
    assert len([record for record in caplog.records if "runs native attention" in record.message]) == 2
