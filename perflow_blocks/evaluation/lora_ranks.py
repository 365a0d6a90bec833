"""What the embedded model's delta loses as a LoRA: pictures and UNet outputs against those of the full delta."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline
from torch import Tensor

from ..blocks.merge_delta import delta_path
from ..delta.files import read_recipe
from ..delta.lora import DeltaLora, Layout, delta_to_lora, save_lora, save_residual
from ..demo import perflow_pipeline
from .classifier import ShapeClassifier
from .comparison import EvaluationSet, Row, evaluate_samplers, markdown_differences, markdown_table
from .samplers import Sampler, perflow_sampler

FULL, RESIDUAL_ALONE, NOTHING = "full delta", "residual alone", "no delta"
_ERROR_PROMPTS = 32


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """How far a UNet's outputs are from those with the full delta, on the inputs of the full delta's own runs.

    Attributes:
        relative: norm of the difference over the norm of the full delta's outputs, at least 0.
        of_effect: the same difference over the norm of what the full delta changes in the base's outputs; 1 with no
            delta.
    """

    relative: float
    of_effect: float


@dataclass(frozen=True, kw_only=True)
class LoraRanks:
    """The measurements, by the name of the form that the delta is in.

    Attributes:
        rows: quality of the pictures, one row for each form; the full delta's first.
        errors: of the UNet's outputs.
        conversions: of each rank.
    """

    rows: list[Row]
    errors: dict[str, OutputError]
    conversions: dict[int, DeltaLora]


def evaluate_lora_ranks(
    ranks: Sequence[int], data: EvaluationSet, classifier: ShapeClassifier, *, steps: int = 4, layout: Layout = "peft"
) -> LoraRanks:
    """Draws every prompt with the full delta, with LoRAs of the given ranks, with the residual alone and with nothing.

    Each LoRA is used as a user would use it: written to a file, loaded by diffusers, its residual merged below it; the
    last rank also without the residual.

    Raises:
        ValueError: no ranks, one below 1 or one twice.
    """
    if not ranks or len(set(ranks)) < len(ranks):
        raise ValueError(f"ranks={list(ranks)} names none or one twice; pass different ranks, 8,32,64 for instance.")
    source = perflow_pipeline()
    delta = delta_path(None, source)
    assert delta is not None  # the embedded model's index names one
    guidance = read_recipe(delta).guidance_scale or 1.0
    conversions = {rank: delta_to_lora(delta, rank=rank) for rank in ranks}
    with tempfile.TemporaryDirectory() as folder:
        forms: dict[str, tuple[Path | None, Path | None]] = {FULL: (delta, None)}
        for rank, converted in conversions.items():
            lora, rest = (Path(folder) / f"{rank}-{kind}.safetensors" for kind in ("lora", "rest"))
            save_lora(converted, lora, layout)
            save_residual(converted, rest)
            forms[_name(rank)] = (rest, lora)
        # Of the last rank; the residual is the same for all.
        forms |= {f"LoRA of rank {rank} alone": (None, lora), RESIDUAL_ALONE: (rest, None), NOTHING: (None, None)}
        pipes = {name: _pipeline(lora, guidance) for name, (_, lora) in forms.items()}
        samplers = [_sampler(name, pipes[name], forms[name][0], steps) for name in forms]
        rows = evaluate_samplers(samplers, data, classifier)
    texts = [prompt.text for prompt in data.prompts[:_ERROR_PROMPTS]]
    with recorded_inputs(pipes[FULL].unet) as calls:
        samplers[0].draw(texts, data.latents[: len(texts)])
    outputs = {name: _outputs(pipe.unet, calls) for name, pipe in pipes.items()}
    full, base = outputs[FULL], outputs[NOTHING]
    errors = {name: output_error(output, full, base) for name, output in outputs.items()}
    return LoraRanks(rows=rows, errors=errors, conversions=conversions)


def output_error(output: Tensor, full: Tensor, base: Tensor) -> OutputError:
    """Compares outputs of one shape, of a UNet, of that with the full delta, and of that with none."""
    difference = float((output - full).double().norm())
    return OutputError(
        relative=difference / float(full.double().norm()), of_effect=difference / float((base - full).double().norm())
    )


@contextmanager
def recorded_inputs(unet: Any) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of every call of the UNet inside the block, appended as they come."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def ranks_report(measured: LoraRanks) -> str:
    """The tables as Markdown: sizes and errors, pictures, paired differences, the layers that lose most."""
    parts = [
        _sizes_table(measured),
        markdown_table(measured.rows),
        markdown_differences(measured.rows, measured.rows[0]),
    ]
    for rank, converted in measured.conversions.items():
        parts.append(f"Rank {rank}: {converted.report}")
    return "\n\n".join(parts)


def _sizes_table(measured: LoraRanks) -> str:
    lines = [
        "| form | numbers in LoRA + residual | share of the delta % | energy kept % | error of dW | "
        "error of the UNet's output | of the delta's effect |",
        "|---|---|---|---|---|---|---|",
    ]
    reports = {_name(rank): converted.report for rank, converted in measured.conversions.items()}
    total = next(iter(reports.values())).delta_parameters
    for name, error in measured.errors.items():
        cells = [f"{total:,}", "100.0", "100.00", "0.000"] if name == FULL else ["-"] * 4
        if name in reports:
            report = reports[name]
            held = report.parameters + report.residual_parameters
            cells = [
                f"{report.parameters:,} + {report.residual_parameters:,}",
                f"{100 * held / total:.1f}",
                f"{100 * report.energy:.2f}",
                f"{report.relative_error:.3f}",
            ]
        lines.append(f"| {' | '.join([name, *cells, f'{error.relative:.4f}', f'{error.of_effect:.3f}'])} |")
    return "\n".join(lines)


def _name(rank: int) -> str:
    return f"LoRA of rank {rank} and residual"


def _pipeline(lora: Path | None, guidance: float) -> ModularPipeline:
    """A fresh pipeline with that LoRA. Every form has the delta's guidance, also those that merge no recipe."""
    pipe = perflow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance))
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    return pipe


def _sampler(name: str, pipe: ModularPipeline, delta: Path | None, steps: int) -> Sampler:
    sampler = perflow_sampler(pipe, steps, delta=delta)
    if delta is not None:
        return replace(sampler, model=name)

    def draw(prompts: Sequence[str], latents: Tensor) -> Tensor:
        return pipe(
            prompt=list(prompts),
            latents=latents,
            num_inference_steps=steps,
            output_type="pt",
            output="images",
            delta=False,
        )

    return replace(sampler, model=name, draw=draw)


@torch.no_grad()
def _outputs(unet: Any, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> Tensor:
    outputs = [unet(*args, **{**kwargs, "return_dict": False})[0] for args, kwargs in calls]
    return torch.cat(outputs)
