"""The benchmarks measure what they say: the same work for all, in turns, rightly reckoned. No time is judged."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention, loop, report, sdxl
from benchmarks.__main__ import PARTS, Part, main
from benchmarks.contenders import (
    BARE,
    LOOP,
    STAGE,
    STOCK_LOOP,
    STOCK_PIPELINE,
    STOCK_STAGE,
    make_contenders,
    verify,
)
from benchmarks.measure import Setting, Timing, peak_bytes, time_in_turns
from benchmarks.models import MAX_TOKENS, TINY, FreeUNet, build_components, build_unet
from perflow_blocks import PeRFlowScheduler
from perflow_blocks.demo.models import SCHEDULE

CPU = torch.device("cpu")
QUICK = Setting(device=CPU, quick=True)
STEPS = 4


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, dict[str, Any]]:
    unet = build_unet(TINY)
    return unet, make_contenders(unet, TINY, STEPS, CPU)


EXPECTED = {
    "loop": [BARE, LOOP, STAGE, STOCK_LOOP, STOCK_STAGE, STOCK_PIPELINE],
    "stages": ["teacher DDIM 2 steps | 3 | 4", "student PeRFlow 4 steps | 1 | 4"],
    "attention": ["native", "native_math", "flex (compiled)", "sliced", "auto (here native)", "takes float16"],
    "merge": [
        "reading the file | ",
        *(f"{what} | " for what in ("merge", "rescale", "unmerge", "merge, base from disk", "merge without a base")),
    ],
    "training": ["lora | yes | ", "full | no | adamw8bit | ", "full | yes | sync | "],
    "sdxl": ["plain", "channels last", "attention `sliced`", "compiled", "plain, again"],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_writes_its_table(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([part, "--quick", "--device", "cpu", "--out", str(tmp_path)])
    text = (tmp_path / f"{part}.md").read_text()
    assert text in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [f"{part}.md"]
    assert all(f"| {cell}" in text for cell in EXPECTED[part])
    assert "failed" not in text and "nan" not in text
    assert f"torch {torch.__version__}, diffusers" in text


def test_what_needs_a_gpu_is_left_out_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sdxl", "--device", "cpu", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("sdxl was left out: it needs a CUDA GPU")
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["loop", "--device", "cuda"])
    assert "torch finds no CUDA GPU; pass --device cpu" in capsys.readouterr().err


def test_a_dry_run_leaves_the_results_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.__main__.PARTS", {"loop": _fake_part()})
    main(["loop", "--quick", "--device", "cpu"])
    assert not list(tmp_path.iterdir())
    main(["loop", "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["loop.md"]


def test_all_contenders_do_the_same_work(tiny: tuple[Any, dict[str, Any]]) -> None:
    unet, contenders = tiny
    calls = verify(contenders, unet, STEPS)
    assert calls == {BARE: 4, LOOP: 4, STAGE: 4, STOCK_LOOP: 8, STOCK_STAGE: 8, STOCK_PIPELINE: 4}


@pytest.mark.parametrize("name", [LOOP, STAGE, STOCK_STAGE, STOCK_PIPELINE])
@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda unet, run: lambda: run() * 1.01, "Mismatched"),
        (lambda unet, run: lambda: (run(), run())[1], "rows"),
        (lambda unet, run: lambda: torch.zeros(1, 4, 16, 16), "0 rows"),
    ],
)
def test_other_work_is_refused(
    tiny: tuple[Any, dict[str, Any]], name: str, spoil: Callable[..., Any], complaint: str
) -> None:
    unet, contenders = tiny
    with pytest.raises(AssertionError, match=complaint) as error:
        verify({**contenders, name: spoil(unet, contenders[name])}, unet, STEPS)
    assert name in str(error.value)


def test_the_free_unet_runs_the_same_loop() -> None:
    unet = build_unet(TINY, kind=FreeUNet)
    contenders = make_contenders(unet, TINY, STEPS, CPU)
    verify(contenders, unet, STEPS)
    sample = torch.randn(2, 4, 16, 16)
    assert unet(sample, 1, encoder_hidden_states=None, return_dict=False)[0] is sample


def test_contenders_take_turns_and_each_begins_a_round() -> None:
    ran: list[str] = []
    setting = Setting(device=CPU)
    runs = {name: lambda name=name: ran.append(name) for name in "abc"}
    timings = time_in_turns(runs, setting, rounds=3, label="turns", warm_up=1)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_medians_and_quartiles() -> None:
    timing = Timing((0.005, 0.001, 0.004, 0.002, 0.003))
    assert timing.median == 0.003
    assert timing.quartiles == (0.002, 0.004)
    assert timing.milliseconds() == "3.00 (2.00 to 4.00)"


def test_overheads_and_ratios() -> None:
    seconds = {BARE: 2.0, LOOP: 2.02, STAGE: 2.1, STOCK_LOOP: 2.222, STOCK_STAGE: 2.31, STOCK_PIPELINE: 2.05}
    timings = {name: Timing((value, value)) for name, value in seconds.items()}
    overheads = loop.overheads(timings, dict.fromkeys(seconds, 4), steps=4).splitlines()
    assert overheads[3].split(" | ")[-2:] == ["+1.00", "+5.00 |"]
    ratios = [line.rstrip(" |").split(" | ")[-1] for line in loop.comparisons(timings).splitlines()[2:]]
    assert ratios == ["1.100", "1.015", "1.100", "0.976"]


def test_peak_memory_counts_what_lives_at_once() -> None:
    mebi = 2**20
    given = torch.zeros(mebi // 4)

    def run() -> tuple[torch.Tensor, ...]:
        large = torch.empty(8 * mebi // 4)
        del large
        small = [given + 1 for _ in range(3)]
        return torch.empty(6 * mebi // 4), *small

    assert abs(peak_bytes(run, CPU) - 9 * mebi) < mebi // 100


def test_peak_memory_sees_inside_an_operator() -> None:
    query = torch.randn(1, 2, 256, 16)
    with sdpa_kernel(SDPBackend.MATH):
        peak = peak_bytes(lambda: functional.scaled_dot_product_attention(query, query, query), CPU)
    assert peak >= 2 * 256 * 256 * 4  # the scores, which no output holds


def test_operations_are_those_of_a_real_call_with_its_attention() -> None:
    size, rows = TINY, 2
    unet = build_unet(size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(
            torch.randn(rows, 4, size.latents, size.latents),
            torch.tensor(500),
            encoder_hidden_states=torch.randn(rows, MAX_TOKENS, sum(size.text)),
            added_cond_kwargs={"text_embeds": torch.randn(rows, size.text[1]), "time_ids": torch.ones(rows, 6)},
        )
    assert sdxl.flop_of_call(size, rows) == counter.get_total_flops()


def test_the_reference_of_the_errors() -> None:
    layer = attention.TINY_LAYERS[1]
    query, key, value = layer.inputs(2, torch.float32, CPU)
    assert query.shape == (2, 48, 2, 64) and key.shape == value.shape == (2, 77, 2, 64)
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    expected = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(attention.attention_in_float64(query, key, value), expected)


def test_a_case_leaves_the_models_as_they_were() -> None:
    components = _components()
    unet = components["unet"]
    processors = dict(unet.attn_processors)
    case = sdxl.Case(pictures=1, channels_last=True, attention="sliced")
    timings, memory = sdxl.measure(case, components, TINY, QUICK)
    assert list(timings) == ["encode", "denoise", "decode", "UNet call"] and memory > 0
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert all(weight.is_contiguous() for weight in unet.parameters())


def test_a_case_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: sdxl.Case, *_: Any) -> Any:
        if case.compiled:
            raise torch.OutOfMemoryError("no room")
        return dict.fromkeys(("encode", "denoise", "decode", "UNet call"), Timing((0.5, 0.5))), 10**9

    monkeypatch.setattr(sdxl, "measure", measure)
    text = sdxl.run(QUICK).markdown(QUICK)
    assert "| compiled (blocks) | 1 | failed: OutOfMemoryError |" in text
    assert "| plain, again | 1 | 500.0 (500.0 to 500.0) |" in text


def test_late_cases_are_left_out_but_not_the_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def measure(case: sdxl.Case, *_: Any) -> Any:
        ran.append(str(case))
        return dict.fromkeys(("encode", "denoise", "decode", "UNet call"), Timing((0.5, 0.5))), 10**9

    monkeypatch.setattr(sdxl, "measure", measure)
    monkeypatch.setattr(sdxl, "SECONDS", -1.0)
    text = sdxl.run(QUICK).markdown(QUICK)
    assert ran == ["plain"]
    assert text.count("left out") == 4


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    monkeypatch.setattr(report, "CPU_INFO", info)
    assert report.cpu_model() == "Some CPU: 3 GHz"
    assert report.describe_machine(CPU).startswith("Some CPU: 3 GHz (")
    monkeypatch.setattr(report, "CPU_INFO", tmp_path / "none")
    assert report.cpu_model()
    assert not platform.node() or platform.node() not in report.describe_machine(CPU)


def _components() -> dict[str, Any]:
    return {
        **build_components(TINY, CPU, sdxl.DTYPE),
        "scheduler": PeRFlowScheduler(**SCHEDULE),
        "guider": ClassifierFreeGuidance(guidance_scale=2.0),
    }


def _fake_part() -> Part:
    return Part(about="", run=lambda setting: report.Report(title="fake", parts=()))
