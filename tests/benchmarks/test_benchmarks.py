"""The benchmarks measure what they say: the same work for all, in turns, rightly reckoned. No time is judged."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import attention, host, how_it_works, loop, report, sdxl, steps_figure
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
from benchmarks.measure import Setting, Timing, clock, peak_bytes, rounds_within, time_in_turns
from benchmarks.models import DEEP, SDXL, TINY, FreeUNet, Size, build_components, build_unet
from perflow_blocks import AttentionConfig

CPU = torch.device("cpu")
QUICK = Setting(device=CPU, quick=True)
STEPS = 4


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting the garbage of all tests before each measurement would take most of the time."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, dict[str, Any]]:
    unet = build_unet(TINY)
    return unet, make_contenders(unet, TINY, STEPS, CPU)


EXPECTED = {
    "command": ["`python -c pass` | ", "`perflow generate star --steps 0` | ", "`perflow --help` | "],
    "host": [host.CLASSIC, host.STOCK, host.OURS],
    "loop": [BARE, LOOP, STAGE, STOCK_LOOP, STOCK_STAGE, STOCK_PIPELINE],
    "stages": ["teacher DDIM 2 steps | 3 | 4", "student PeRFlow 4 steps | 1 | 4"],
    "attention": ["native", "native_math", "flex (compiled)", "sliced", "auto (here native)", "takes float16"],
    "merge": [
        "reading the file | ",
        *(f"{what} | " for what in ("merge", "rescale", "unmerge", "merge, base from disk", "merge without a base")),
    ],
    "training": ["lora | yes | ", "full | no | adamw8bit | ", "full | yes | sync | "],
    "sdxl": [
        *(f"{sdxl.DENOISE} | {how} | " for how in (BARE, "classic pipeline", "ours", "ours, channels last")),
        *(f"{sdxl.DENOISE} | ours, {how} | " for how in ("attention `native`", "compiled")),
        *(f"{sdxl.DENOISE} | ours, attention `{name}` | does not run: " for name in ("native_cudnn", "sage")),
        *(f"{sdxl.DECODE} | {how} | " for how in ("VAE", "VAE, compiled")),
        *(f"{sdxl.IMAGE} | {how} | " for how in ("classic pipeline", "ours", "ours, compiled")),
    ],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_writes_its_table(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([part, "--quick", "--device", "cpu", "--out", str(tmp_path)])
    text = (tmp_path / f"{part}.md").read_text()
    assert text in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [f"{part}.md"]
    assert all(f"| {cell}" in text for cell in EXPECTED[part])
    assert "nan" not in text
    assert text.count("does not run") == (2 if part == "sdxl" else 0)  # the strategies that want a GPU
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


def test_rounds_fit_into_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.clock", lambda run, device: run())
    runs = {"a": lambda: 0.25, "b": lambda: 0.5}
    found = [rounds_within(seconds, runs, CPU, fewest=3, most=9) for seconds in (0.0, 3.7, 100.0)]
    assert found == [3, 4, 9]


def test_any_clock_can_be_read() -> None:
    assert clock(lambda: None, CPU, iter([1.0, 3.5]).__next__) == 2.5


def test_medians_and_quartiles() -> None:
    timing = Timing((0.005, 0.001, 0.004, 0.002, 0.003))
    assert timing.median == 0.003
    assert timing.quartiles == (0.002, 0.004)
    assert timing.milliseconds() == "3.00 (2.00 to 4.00)"


def test_overheads_and_ratios() -> None:
    seconds = {BARE: 2.0, LOOP: 2.02, STAGE: 2.1, STOCK_LOOP: 2.222, STOCK_STAGE: 2.31, STOCK_PIPELINE: 2.05}
    timings = {name: _steady(value) for name, value in seconds.items()}
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


def test_the_reference_of_the_errors() -> None:
    layer = attention.TINY_LAYERS[1]
    query, key, value = layer.inputs(2, torch.float32, CPU)
    assert query.shape == (2, 48, 2, 64) and key.shape == value.shape == (2, 77, 2, 64)
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    expected = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(attention.attention_in_float64(query, key, value), expected)


def test_models_for_host_time_have_as_many_modules_as_sdxl() -> None:
    def modules(size: Size) -> list[int]:
        parts = build_components(size, "meta", torch.float32)
        return [len(list(parts[name].modules())) for name in ("unet", "vae", "text_encoder", "text_encoder_2")]

    assert modules(DEEP) == modules(SDXL)


@pytest.mark.parametrize("prompt", [None, host.PROMPT])
def test_host_time_is_of_the_same_latents(prompt: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "STEPS", 5)
    components = build_components(TINY, CPU, torch.float32, FreeUNet)
    calls = host.make_calls(components, TINY, QUICK, prompt)
    assert list(calls) == [host.CLASSIC, host.STOCK, host.OURS]
    assert all(isinstance(call(), torch.Tensor) for call in calls.values())


def test_a_copy_for_a_variant_shares_the_weights_only() -> None:
    unet = build_unet(TINY)
    processors = dict(unet.attn_processors)
    copy = sdxl.with_same_weights(unet)
    AttentionConfig("sliced").attach({"unet": copy})
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert all(one is other for one, other in zip(unet.parameters(), copy.parameters(), strict=True))


@pytest.mark.parametrize(("seconds", "tables"), [(1e9, 3), (100.0, 2), (0.0, 1)])
def test_what_does_not_fit_into_the_time_is_left_out(
    seconds: float, tables: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdxl, "measure", lambda makers, setting, label: f"| {len(makers)} rows |")
    reports = [report.markdown(QUICK) for report in sdxl.run(replace(QUICK, seconds=seconds))]
    assert len(reports) == 3 and all(later.startswith(report[:-1]) for report, later in itertools.pairwise(reports))
    assert reports[-1].count("rows |") == tables
    assert reports[-1].count("Left out: ") == 3 - tables


def test_what_was_measured_is_written_though_a_later_table_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(makers: Any, setting: Setting, label: str) -> str:
        if "Compiled" in label:
            raise torch.OutOfMemoryError("no room\nat all")
        return "| the table |"

    monkeypatch.setattr(sdxl, "measure", measure)
    main(["sdxl", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    text = (tmp_path / "sdxl.md").read_text()
    assert "| the table |" in text
    assert text.count("does not run: OutOfMemoryError: no room\n") == 2


def test_rows_that_fail_are_lines_and_ratios_are_to_the_first_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("no kernel | here")

    seconds = {sdxl.Task("a", "slow"): 0.02, sdxl.Task("a", "slower"): 0.05, sdxl.Task("b", "alone"): 0.03}
    monkeypatch.setattr(sdxl, "clock", lambda run, device: (run(), 1.5)[1])
    monkeypatch.setattr(sdxl, "time_in_turns", lambda runs, *_, **__: {task: _steady(seconds[task]) for task in runs})
    made: sdxl.Makers = {task: lambda: lambda: None for task in seconds}
    broken: sdxl.Makers = {sdxl.Task("a", "broken"): fails, sdxl.Task("a", "fails when called"): lambda: fails}
    rows = [line.strip("| ").split(" | ") for line in sdxl.measure(broken | made, QUICK, "rows").splitlines()[2:]]
    assert sdxl.measure(broken, QUICK, "no row runs").count("no kernel / here") == 2
    assert rows == [
        ["a", "broken", "does not run: RuntimeError: no kernel / here", "-", "-"],
        ["a", "fails when called", "does not run: RuntimeError: no kernel / here", "-", "-"],
        ["a", "slow", "20.0 (20.0 to 20.0)", "1.000", "1.5"],
        ["a", "slower", "50.0 (50.0 to 50.0)", "2.500", "1.5"],
        ["b", "alone", "30.0 (30.0 to 30.0)", "1.000", "1.5"],
    ]


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    monkeypatch.setattr(report, "CPU_INFO", info)
    assert report.cpu_model() == "Some CPU: 3 GHz"
    assert report.describe_machine(CPU).startswith("Some CPU: 3 GHz (")
    monkeypatch.setattr(report, "CPU_INFO", tmp_path / "none")
    assert report.cpu_model()
    assert not platform.node() or platform.node() not in report.describe_machine(CPU)


def _steady(seconds: float) -> Timing:
    return Timing((seconds, seconds))


def _fake_part() -> Part:
    return Part(about="", run=lambda setting: iter([report.Report(title="fake", parts=())]))


def test_the_figure_of_steps_has_a_line_for_each_way_of_drawing(tmp_path: Path) -> None:
    def row(name: str, scale: float, nfe: int, strict: float) -> dict[str, Any]:
        scores = {"strict %": {"mean": strict, "error": 1.0}}
        distances = {"Frechet": {"mean": 100.0 - strict, "error": None}}
        return {"name": name, "guidance_scale": scale, "nfe": nfe, "scores": scores, "distances": distances}

    rows = [{"name": "real renders", "scores": {}, "distances": {}}, row("teacher, DDIM", 3.0, 8, 50.0)]
    rows += [row("teacher, DDIM", 1.0, 4, 30.0), row("student, PeRFlow", 1.0, 4, 60.0)]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    found = steps_figure.lines(rows, "strict %")
    assert found["teacher, DDIM, without guidance"] == [(4, 30.0, 1.0)] and len(found) == 3
    steps_figure.main(tmp_path / "results.json", tmp_path / "steps.png")
    assert Image.open(tmp_path / "steps.png").width == 1650


def test_the_figures_of_how_it_works_are_drawn_and_small(tmp_path: Path) -> None:
    how_it_works.main(tmp_path)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == how_it_works.FIGURES.keys() and max(sizes.values()) < 100_000
