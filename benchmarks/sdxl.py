"""Full-size SDXL with random weights on a GPU: time by stage, and its share of the device's matrix rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ClassifierFreeGuidance
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from perflow_blocks import AttentionConfig, PeRFlowScheduler, PeRFlowSDXLAutoBlocks, compile_loops
from perflow_blocks.blocks.inputs import DENOISER_INPUT_FIELDS
from perflow_blocks.demo.models import SCHEDULE

from .attention import COMPILED, available
from .measure import Run, Setting, Timing, peak_bytes, time_in_turns
from .models import MAX_TOKENS, SDXL, TINY, Size, build_components, build_unet, make_pipeline, random_latents
from .report import Report, table
from .stages import split

DTYPE = torch.bfloat16
STEPS, GUIDANCE, ROUNDS = 4, 2.0, 11
PROMPT = "a red star on a white background"
SECONDS = 360.0
"""After these no further case begins; one that compiles takes about two minutes."""

TEXT = """SDXL's text encoders, UNet and VAE with random weights in bfloat16, {pixels} x {pixels} pixels, {steps}
steps, guidance {guidance:g}: a UNet call has two rows a picture. Medians and quartiles of {rounds} rounds; within a
case the stages take turns, the cases come one after another, and the first is run again at the end. Times as fast
compares the denoising with that of the plain case of as many pictures. A UNet call of two rows is {tflop:.3g} TFLOP
(matrix products, convolutions and attention, by torch's counter); a product of two {matrix} x {matrix} matrices ran at
{peak:.4g} TFLOP/s, which is the rate that shares refer to. Memory is the denoising's peak above what was live before,
such as the weights."""

LATE = "left out: {seconds:.0f} s had passed"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way of running the pipeline.

    Attributes:
        pictures: in one batch.
        channels_last: the layout of UNet and VAE.
        compiled: what `compile_loops` compiles of the UNet, beside the VAE's decoder: its transformer blocks or all of
            it; None compiles nothing.
        attention: a strategy for all modules, None for diffusers' own processors.
    """

    pictures: int
    channels_last: bool = False
    compiled: Literal["blocks", "full"] | None = None
    attention: str | None = None

    def __str__(self) -> str:
        parts = ["channels last"] * self.channels_last
        parts += [f"compiled ({self.compiled})"] if self.compiled else []
        return ", ".join([*parts, *([f"attention `{self.attention}`"] if self.attention else [])]) or "plain"


def why_not(setting: Setting) -> str | None:
    if setting.device.type == "cuda" or setting.quick:
        return None
    return "it needs a CUDA GPU; --quick runs its code with tiny models"


def run(setting: Setting) -> Report:
    began, size = time.monotonic(), TINY if setting.quick else SDXL
    matrix = 256 if setting.quick else 8192
    peak, flop = matrix_rate(matrix, setting.device), flop_of_call(size, rows=2)
    components = {
        **build_components(size, setting.device, DTYPE),
        "scheduler": PeRFlowScheduler(**SCHEDULE),
        "guider": ClassifierFreeGuidance(guidance_scale=GUIDANCE),
    }
    cases = make_cases(setting)
    rows: list[tuple[object, ...]] = []
    plain: dict[int, float] = {}
    for case in tqdm([*cases, cases[0]], desc="sdxl", unit="case", dynamic_ncols=True):
        is_repeat = len(rows) == len(cases)
        head = (f"{case}{', again' if is_repeat else ''}", case.pictures)
        if time.monotonic() - began > SECONDS and not is_repeat:
            rows.append((*head, LATE.format(seconds=SECONDS), *["-"] * 7))
            continue
        try:
            timings, memory = measure(case, components, size, setting)
        except RuntimeError as error:  # out of memory, or torch.compile: the other cases may go on
            rows.append((*head, f"failed: {type(error).__name__}", *["-"] * 7))
            continue
        rate = case.pictures * flop / timings["UNet call"].median
        base = plain.setdefault(case.pictures, timings["denoise"].median)
        rows.append(
            (
                *head,
                *(timing.milliseconds() for timing in timings.values()),
                f"{base / timings['denoise'].median:.3f}",
                f"{rate / 1e12:.4g}",
                f"{100 * rate / peak:.0f}",
                f"{memory / 1e9:.2f}",
            )
        )
    text = TEXT.format(
        pixels=size.pixels,
        steps=STEPS,
        guidance=GUIDANCE,
        rounds=setting.rounds(ROUNDS),
        tflop=flop / 1e12,
        matrix=matrix,
        peak=peak / 1e12,
    )
    stages = ("encode ms", "denoise ms", "decode ms", "UNet call ms")
    header = ("case", "pictures", *stages, "times as fast", "TFLOP/s", "share %", "peak GB")
    return Report(title="Full-size SDXL", parts=(text, table(header, rows)))


def make_cases(setting: Setting) -> list[Case]:
    """The plain cases first, those that compile last, as they take longest; in a dry run one of each kind."""
    if setting.quick:
        kinds: list[dict[str, Any]] = [{}, {"channels_last": True}, {"attention": "sliced"}, {"compiled": "blocks"}]
        return [Case(pictures=1, **kind) for kind in kinds]
    strategies, _ = available(setting.device, DTYPE)
    names = [strategy.name for strategy in strategies]
    return [
        Case(pictures=1),
        Case(pictures=4),
        Case(pictures=1, channels_last=True),
        Case(pictures=4, channels_last=True),
        *(Case(pictures=1, attention=name) for name in names if name not in COMPILED),
        Case(pictures=1, compiled="blocks"),
        Case(pictures=4, compiled="blocks"),
        Case(pictures=1, compiled="blocks", channels_last=True),
        *(Case(pictures=1, compiled="blocks", attention=name) for name in names if name in COMPILED),
        Case(pictures=1, compiled="full"),
    ]


def measure(case: Case, components: dict[str, Any], size: Size, setting: Setting) -> tuple[dict[str, Timing], int]:
    """The stages' times and the denoising's peak memory; the models are as before afterwards."""
    attention = AttentionConfig(case.attention)
    models = [components["unet"], components["vae"]]
    try:
        for model in models:
            model.to(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
        pipe = make_pipeline(PeRFlowSDXLAutoBlocks(), {**components, "attention": attention})
        if case.compiled:
            backend = "eager" if setting.quick else "inductor"
            compile_loops(pipe, full=case.compiled == "full", dynamic=False, backend=backend)
        with torch.no_grad():
            runs = dict(make_runs(pipe, case, size, setting))
            timings = time_in_turns(runs, setting, rounds=ROUNDS, label=f"sdxl {case}")
            return timings, peak_bytes(runs["denoise"], setting.device)
    finally:
        attention.detach()
        for model in models:
            model.to(memory_format=torch.contiguous_format)
            for module in model.modules():
                module._compiled_call_impl = None  # torch has no call that undoes `Module.compile`
        torch.compiler.reset()


def make_runs(pipe: Any, case: Case, size: Size, setting: Setting) -> Iterator[tuple[str, Run]]:
    """The stages by name, each on what the one before it returned, and one UNet call with the loop's tensors."""
    text, denoise, decode = split(pipe)
    latents = random_latents(size, case.pictures, setting.device, DTYPE)
    embeddings = text(prompt=[PROMPT] * case.pictures).get_by_kwargs(DENOISER_INPUT_FIELDS)
    request = {**embeddings, "latents": latents, "num_inference_steps": STEPS}
    request |= {"height": size.pixels, "width": size.pixels}
    state = denoise(**request)
    denoised = state.get("latents")

    def both(name: str) -> torch.Tensor:
        return torch.cat([state.get(name), state.get(f"negative_{name}")])

    conditions = {
        "encoder_hidden_states": both("prompt_embeds"),
        "added_cond_kwargs": {"text_embeds": both("pooled_prompt_embeds"), "time_ids": both("add_time_ids")},
    }
    twice, timestep = torch.cat([latents] * 2), state.get("timesteps")[0]
    yield "encode", lambda: text(prompt=[PROMPT] * case.pictures)
    yield "denoise", lambda: denoise(**request)
    yield "decode", lambda: decode(latents=denoised, output_type="pt")
    yield "UNet call", lambda: pipe.unet(twice, timestep, **conditions, return_dict=False)


def flop_of_call(size: Size, rows: int) -> int:
    """Floating-point operations of one UNet call, counted on tensors without data, so whatever kernels run later."""
    unet = build_unet(size, "meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(
            torch.empty(rows, 4, size.latents, size.latents),
            torch.empty(()),
            encoder_hidden_states=torch.empty(rows, MAX_TOKENS, sum(size.text)),
            added_cond_kwargs={"text_embeds": torch.empty(rows, size.text[1]), "time_ids": torch.empty(rows, 6)},
        )
    return counter.get_total_flops()


def matrix_rate(size: int, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product: a ceiling that a model can come near to."""
    a, b = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
    timer = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=1.0).median
