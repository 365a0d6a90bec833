"""`perflow evaluate`: how good a few-step model's images are, beside those of its teacher."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..batches import parse_size, save_image
from . import options

TEACHER, PERFLOW = "teacher", "perflow"
SAMPLERS = "perflow:4,perflow:8,ddim:8,dpm:8"
DEMO_SAMPLERS = (
    "dpm:50,ddim:8,dpm:8,ddim:4,dpm:4,ddim:2,dpm:2,ddim:8@1,dpm:8@1,ddim:4@1,dpm:4@1,perflow:4,perflow:6,perflow:8"
)
SDXL_GUIDANCE, SD_GUIDANCE = 5.0, 7.5  # the defaults of diffusers' classic pipelines
REPORT, RESULTS, SHEET = "report.md", "results.json", "sheet.png"
_SAMPLER = re.compile(r"(perflow|stock|ddim|dpm|euler):([1-9]\d*)(?:@(\d+(?:\.\d+)?))?")

Spec = tuple[str, int, float | None]
"""Solver, steps, guidance."""
TeacherGuidance = Annotated[
    float | None,
    typer.Option(min=0, help="Of the teacher's samplers. By default 5; of SD 7.5; of the embedded model 3."),
]


def evaluate(
    prompts: Annotated[Path | None, options.file("Text file with one prompt a line.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The demo's prompts and judge of shapes and colours.")] = False,
    model: options.Model = None,
    delta: options.Delta = None,
    unet: options.Unet = None,
    base: Annotated[
        str | None, typer.Option(help="Repository or directory of the teacher, where --model is few-step already.")
    ] = None,
    samplers: Annotated[
        str | None,
        typer.Option(
            help="SOLVER:STEPS or SOLVER:STEPS@GUIDANCE, with commas between; perflow, or of the teacher ddim, dpm, "
            f"euler and stock, its own scheduler. By default {SAMPLERS}."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The sampler that PSNR and SSIM are measured to. By default stock:50.")
    ] = None,
    guidance: TeacherGuidance = None,
    reference: Annotated[str, typer.Option(help="The images of FID and KID: a folder, or teacher.")] = TEACHER,
    features: Annotated[
        str | None, typer.Option(help="Network for FID and KID: inception, or a CLIP model. By default neither.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP model for the CLIP score, a repository or directory. By default none.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many prompts, at least 2. By default the whole file; 512 with --demo.")
    ] = None,
    seed: options.Seed = 0,
    size: options.Size = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once: 1, or 32 with --demo.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Directory for table, JSON file and sheet.")] = Path("outputs/evaluate"),
) -> None:
    """Compare samplers on the same prompts and noise: closeness to the teacher, speed, FID, KID and CLIP score."""
    from ..atomic_files import require_writable_directory
    from .pipeline import find_model, model_location, vae_factor

    if find_spec("torchmetrics") is None:
        raise ValueError('evaluate needs torchmetrics; install it with pip install "perflow-blocks[eval]".')
    if features == "inception" and find_spec("torch_fidelity") is None:
        raise ValueError("--features inception needs torch-fidelity; install it, or name a CLIP model.")
    if demo == (prompts is not None):
        raise ValueError("pass one of --prompts FILE and --demo.")
    if demo and (features or size):
        raise ValueError("--features and --size cannot be combined with --demo, which has a distance of its own.")
    if count is not None and count < 2:
        raise ValueError(f"--count {count} gives no standard error; pass at least 2.")
    if reference != TEACHER and not features:
        raise ValueError("--reference needs --features, the network for FID and KID; --demo has neither.")
    lines = prompts.read_text(encoding="utf-8-sig").splitlines() if prompts else []
    texts = [line.strip() for line in lines if line.strip()][:count] if prompts else [""] * (count or 512)
    if len(texts) < 2:
        raise ValueError(f"{prompts} holds {len(texts)} prompts, which give no standard error; write at least 2.")
    first = parse_samplers(teacher or ("ddim:50" if demo else "stock:50"))
    specs = parse_samplers(samplers or (DEMO_SAMPLERS if demo else SAMPLERS))
    if len(first) > 1 or first[0][0] == PERFLOW:
        raise ValueError(f"--teacher {teacher} must be one sampler of the base, such as stock:50.")
    require_writable_directory(out)
    location, unet = find_model(model, unet)
    pixels = parse_size(size, vae_factor(location))
    if base:
        model_location(base)
    place = options.choose_device(device or ("cpu" if demo else None))
    few_step, classic = open_pipelines(location, delta, unet, base, place, options.choose_dtype(dtype, place))
    from ..demo.judge import make_demo_set
    from ..evaluation.measure import evaluate_samplers
    from ..evaluation.metrics import clip_scorer, evaluation_set
    from ..evaluation.samplers import seeded_latents

    embedded = demo or model is None
    (target,) = open_samplers(few_step, classic, first, delta, guidance, embedded=embedded)
    others = open_samplers(few_step, classic, specs, delta, guidance, embedded=embedded)
    if demo:
        data = make_demo_set(len(texts), vae=classic.vae)
    else:
        folder = None if reference == TEACHER else Path(reference)
        latents = seeded_latents(classic, range(seed, seed + len(texts)), pixels)
        data = evaluation_set(texts, latents, features=features, reference=folder, device=place)
    if clip:
        data.scorers.append(clip_scorer(clip, data.prompts, place))
    for name in ("diffusers.pipelines", "diffusers.modular_pipelines.stable_diffusion_xl.encoders"):
        logging.getLogger(name).setLevel(logging.ERROR)  # that a prompt is cut would be told for each sampler
    rows = evaluate_samplers(others, data, teacher=target, batch_size=batch_size or (32 if demo else 1))
    settings = {"model": model or "embedded", "delta": delta and delta.name, "teacher": target.label, "seed": seed}
    settings |= {"reference": reference, "features": features, "clip": clip, "perflow_blocks": __version__}
    _write(out, rows, data.prompts, settings)


def parse_samplers(text: str) -> list[Spec]:
    """The samplers of a list such as "perflow:4,ddim:50@7.5"."""
    matches = [_SAMPLER.fullmatch(part.strip()) for part in text.split(",")]
    if not all(matches):
        raise ValueError(
            f"samplers {text!r} must be SOLVER:STEPS or SOLVER:STEPS@GUIDANCE with commas between, such as "
            "perflow:4,ddim:50@7.5; solvers are perflow, stock, ddim, dpm and euler."
        )
    return [(m[1], int(m[2]), float(m[3]) if m[3] else None) for m in matches if m]


def open_pipelines(
    model: str | None, delta: Path | None, unet: Path | None, base: str | None, place: Any, precision: Any
) -> tuple[Any, Any]:
    """The few-step pipeline, and the teacher as a classic one; they share all that they can."""
    from diffusers import UNet2DConditionModel

    from ..evaluation.samplers import classic_pipeline
    from .pipeline import load_pipeline, model_location

    few_step = load_pipeline(model_location(model), device=place, dtype=precision)
    few_step.set_progress_bar_config(disable=True)
    if (delta or unet or base or few_step.config.delta) is None:
        raise ValueError(f"--model {model} has no delta; pass --delta, --unet, or its teacher as --base.")
    teacher = few_step if base is None else load_pipeline(model_location(base), device=place, dtype=precision)
    classic = classic_pipeline(teacher)
    if unet is not None:  # it is few-step without the delta that the pipeline may name
        merged = UNet2DConditionModel.from_pretrained(unet, dtype=precision).to(place)
        few_step.update_components(unet=merged, delta=None)
    return few_step, classic


def open_samplers(
    few_step: Any, classic: Any, specs: list[Spec], delta: Path | None, guidance: float | None, *, embedded: bool
) -> list[Any]:
    """Those of the teacher come first: PeRFlow's first image merges the delta into the UNet that they may share.

    The teacher's guidance is by default `usual_guidance`.
    """
    from ..delta.recipe import require_guidance
    from ..evaluation.samplers import perflow_sampler, teacher_sampler

    guidance = usual_guidance(classic, embedded) if guidance is None else guidance
    require_guidance(guidance)
    return [
        perflow_sampler(few_step, steps, delta=delta, guidance_scale=scale)
        if solver == PERFLOW
        else teacher_sampler(classic, solver, steps, guidance if scale is None else scale)
        for solver, steps, scale in sorted(specs, key=lambda spec: spec[0] == PERFLOW)
    ]


def usual_guidance(classic: Any, embedded: bool) -> float:
    """What the embedded model was distilled with; for any other teacher that of the classic pipeline."""
    from ..demo.models import GUIDANCE_SCALE

    usual = SDXL_GUIDANCE if "tokenizer_2" in classic.components else SD_GUIDANCE
    return GUIDANCE_SCALE if embedded else usual


def _write(out: Path, rows: list[Any], prompts: Sequence[str], settings: dict[str, Any]) -> None:
    from ..atomic_files import atomic_path
    from ..evaluation.measure import as_tree, comparison_sheet, markdown

    text = (
        f"{markdown(rows)}\n\n{len(prompts)} prompts, the same noise in every row; ± is one standard error, with KID "
        "the deviation over its subsets. The second table compares image by image. NFE counts rows of the UNet per "
        f"image, so guidance counts double. PSNR and SSIM are to the images of: {settings['teacher']}."
    )
    results = {"settings": settings, "prompts": list(prompts), "rows": as_tree(rows)}
    for name, content in ((REPORT, text), (RESULTS, json.dumps(results, indent=2, ensure_ascii=False))):
        with atomic_path(out / name) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
    save_image(comparison_sheet(rows, prompts), out / SHEET)
    typer.echo(text)
