"""`perflow evaluate --lora-ranks`: each form of the delta is what it is called, and measured against the full one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perflow_blocks.evaluation import comparison, lora_ranks
from perflow_blocks.evaluation.classifier import load_classifier
from perflow_blocks.evaluation.comparison import EvaluationSet, make_evaluation_set
from perflow_blocks.evaluation.lora_ranks import (
    FULL,
    NOTHING,
    RESIDUAL_ALONE,
    LoraRanks,
    evaluate_lora_ranks,
    output_error,
    ranks_report,
)
from perflow_blocks.testing.tiny import tiny_sdxl_unet

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data() -> EvaluationSet:
    data = make_evaluation_set(2)
    return replace(data, reference=data.reference[:32])  # each row's distance is measured to all of them


@pytest.fixture(scope="module")
def measured(data: EvaluationSet) -> LoraRanks:
    return evaluate_lora_ranks([2, 128], data, load_classifier(), steps=4)


def test_errors_go_from_none_with_the_full_delta_to_all_without(measured: LoraRanks) -> None:
    small, large = "LoRA of rank 2 and residual", "LoRA of rank 128 and residual"
    alone = "LoRA of rank 128 alone"
    assert list(measured.errors) == [FULL, small, large, alone, RESIDUAL_ALONE, NOTHING]
    errors = {name: error.of_effect for name, error in measured.errors.items()}
    assert errors[FULL] == 0.0 and errors[NOTHING] == pytest.approx(1.0)
    assert errors[large] < 5e-3  # every layer at its full rank: rounding to half precision is left
    assert errors[large] < errors[alone] < errors[RESIDUAL_ALONE]
    assert 0.7 < errors[RESIDUAL_ALONE] < 1.3  # next to nothing, which need not be a step in the right direction
    assert 0.3 < errors[small] and errors[large] < errors[small]
    ratios = {error.relative / error.of_effect for name, error in measured.errors.items() if name != FULL}
    assert max(ratios) == pytest.approx(min(ratios)) and max(ratios) < 0.5


def test_the_rows_are_drawn_with_the_same_settings(measured: LoraRanks) -> None:
    assert [row.name for row in measured.rows] == [f"{name}, PeRFlow" for name in measured.errors]
    assert {(row.steps, row.guidance_scale, row.nfe) for row in measured.rows} == {(4, 1.0, 4)}


def test_the_report_has_every_form_in_every_table(measured: LoraRanks) -> None:
    report = ranks_report(measured)
    for name in measured.errors:
        assert report.count(f"| {name} |") == 1 and report.count(f"| {name}, PeRFlow |") == 1
    assert report.count(", PeRFlow, 4 steps | 4 |") == len(measured.errors) - 1
    held = measured.conversions[2].report
    assert f"| {held.parameters:,} + {held.residual_parameters:,} |" in report
    assert f"{100 * held.energy:.2f} | {held.relative_error:.3f} |" in report
    assert f"Rank 2: {held}" in report


def test_output_errors_are_of_the_difference() -> None:
    full, base = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0])
    error = output_error(torch.tensor([3.0, 3.0]), full, base)
    assert (error.relative, error.of_effect) == (pytest.approx(1 / 5), pytest.approx(1 / 2))


def test_recorded_inputs_are_those_of_the_block_alone() -> None:
    unet = tiny_sdxl_unet()
    conditions = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    inputs = (torch.zeros(1, 4, 16, 16), 500, torch.zeros(1, 3, 32))
    with lora_ranks.recorded_inputs(unet) as calls, torch.no_grad():
        unet(*inputs, added_cond_kwargs=conditions)
    unet(*inputs, added_cond_kwargs=conditions)
    assert calls == [(inputs, {"added_cond_kwargs": conditions})]


@pytest.mark.parametrize("ranks", [[], [4, 4]])
def test_ranks_that_are_refused(data: EvaluationSet, ranks: list[int]) -> None:
    with pytest.raises(ValueError, match="names none or one twice"):
        evaluate_lora_ranks(ranks, data, load_classifier())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora-ranks", "8,many"), "8,many"),
        (("--lora-ranks", "8,0"), "below 1"),
        (("--lora-ranks", "8,8"), "twice"),
        (("--lora-ranks", "8", "--quick"), "--quick"),
        (("--lora-ranks", "8", "--editing"), "--editing"),
        (("--lora-ranks", "8", "--prompts", "1"), "prompts=1"),
    ],
)
def test_a_mistake_is_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run("evaluate", *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


def test_the_command_writes_the_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: EvaluationSet, measured: LoraRanks
) -> None:
    asked: list[tuple[object, ...]] = []

    def make(count: int) -> EvaluationSet:
        asked.append((count,))
        return data

    def evaluate(ranks: list[int], given: EvaluationSet, _: object) -> LoraRanks:
        asked.append((ranks, given))
        return measured

    monkeypatch.setattr(comparison, "make_evaluation_set", make)
    monkeypatch.setattr(lora_ranks, "evaluate_lora_ranks", evaluate)
    path = tmp_path / "lora.md"
    status, out, _ = run("evaluate", "--prompts", 7, "--lora-ranks", "2,128", "--out", path)
    assert status == 0 and asked == [(7,), ([2, 128], data)]
    assert path.read_text().strip() == out.strip() == ranks_report(measured)
