"""Full-size SDXL with random weights on a GPU, from bare UNet calls to the finished image, within a time budget."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from perflow_blocks import AttentionConfig, PeRFlowSDXLAutoBlocks, compile_loops

from .contenders import BARE, GUIDANCE, bare_calls, classic_pipeline, make_request, modular_pipeline
from .measure import Run, Setting, clock, rounds_within, time_in_turns
from .models import SDXL, TINY, build_components
from .report import Report, table

DTYPE, STEPS = torch.bfloat16, 4
PROMPT = "a red star on a white background"
SECONDS_A_TABLE, FEWEST_ROUNDS, MOST_ROUNDS = 16.0, 2, 11

DENOISE, DECODE, IMAGE = "embeddings to latents", "latents to pixels", "prompt to PIL image"
CLASSIC, OURS, EAGER, COMPILED = "classic pipeline", "ours", "VAE", "VAE, compiled"
ATTENTION = ("native", "native_cudnn", "sage")

TEXT = """SDXL's text encoders, UNet and VAE with random weights in bfloat16, one image of {pixels} x {pixels} pixels,
{steps} steps, guidance {guidance:g}: {steps} UNet calls of two rows. Classic is `StableDiffusionXLPipeline`, ours
`PeRFlowSDXLAutoBlocks`, both with `PeRFlowScheduler`. Where no attention strategy is named, diffusers' own attention
processors are used; calls that a strategy does not take go to `native`. The goal is 250 ms from a prompt to the image,
and for ours from embeddings to latents at most 1.05 times the bare calls.

All rows of a table take turns; medians and quartiles. A ratio compares with the first row of the same task in the same
table. The first call includes compiling, and downloading or checking a kernel. The compiled VAE of both tables is the
same. Making the models took {made:.0f} s of the time budget of {budget:.0f} s."""

LATE = (
    "Left out: {left:.0f} s of the time budget were left, and this takes about {needed:.0f} s. Pass more `--seconds`."
)


class Task(NamedTuple):
    """What is done, and by what: a row of a table."""

    what: str
    how: str


Makers = dict[Task, Callable[[], Run]]
"""By row, what makes the function that is timed. It may raise, which is a line in the table."""


class Section(NamedTuple):
    """A table: its heading, the seconds that it takes on an H100, and its rows."""

    title: str
    seconds: float
    rows: Callable[[], Makers]


def why_not(setting: Setting) -> str | None:
    if setting.device.type == "cuda" or setting.quick:
        return None
    return "it needs a CUDA GPU; --quick runs its code with tiny models"


def run(setting: Setting) -> Iterator[Report]:
    """The report after each of its tables, so that what is measured is kept if a later one takes too long."""
    began = time.monotonic()
    subjects = Subjects(setting)
    pixels, made = subjects.latents["height"], time.monotonic() - began
    text = TEXT.format(pixels=pixels, steps=STEPS, guidance=GUIDANCE, made=made, budget=setting.seconds)
    parts = [text]
    for section in (
        Section("Eager", 0.0, subjects.eager),
        Section("Compiled: the transformer blocks", 75.0, partial(subjects.compiled, full=False)),
        Section('Compiled: the whole UNet, `mode="reduce-overhead"`', 130.0, partial(subjects.compiled, full=True)),
    ):
        left = max(began + setting.seconds - time.monotonic(), 0.0)
        if left < section.seconds:
            found = LATE.format(left=left, needed=section.seconds)
        else:
            try:
                found = measure(section.rows(), setting, section.title)
            except Exception as error:  # a GPU raises errors of every kind; what was measured before stays
                found = failure(error)
        parts += [f"## {section.title}", found]
        yield Report(title="Full-size SDXL", parts=tuple(parts))


class Subjects:
    """The models, which all pipelines share, and what is timed of them."""

    def __init__(self, setting: Setting) -> None:
        size = TINY if setting.quick else SDXL
        self._components = build_components(size, setting.device, DTYPE)
        request = partial(make_request, size, STEPS, setting.device, DTYPE)
        self.latents = {**request(), "output_type": "latent"}
        self.image = {**request(prompt=PROMPT), "output_type": "pil"}
        self._compiled_vae = with_same_weights(self._components["vae"])

    def eager(self) -> Makers:
        unet, classic, ours = self._components["unet"], classic_pipeline(self._components), self._ours()
        classic_call = partial(classic, guidance_scale=GUIDANCE)
        makers: Makers = {
            Task(DENOISE, BARE): self._bare,
            Task(DENOISE, CLASSIC): lambda: partial(classic_call, **self.latents),
            Task(DENOISE, OURS): lambda: self._denoise(ours),
        }
        for name in ATTENTION:
            makers[Task(DENOISE, f"{OURS}, attention `{name}`")] = partial(self._with_attention, name)
        return makers | {
            Task(DENOISE, f"{OURS}, channels last"): lambda: self._denoise(
                self._ours(unet=copy.deepcopy(unet).to(memory_format=torch.channels_last))
            ),
            Task(DECODE, EAGER): lambda: self._decode(self._components["vae"]),
            Task(IMAGE, CLASSIC): lambda: partial(classic_call, **self.image),
            Task(IMAGE, OURS): lambda: partial(ours, **self.image, output="images"),
        }

    def compiled(self, full: bool) -> Makers:
        """The VAE's decoder is compiled once, in the table of the transformer blocks, to save time."""
        plain = self._ours()
        pipe = self._ours(unet=with_same_weights(self._components["unet"]), vae=self._compiled_vae)
        options: dict[str, Any] = {"mode": "reduce-overhead"} if full else {}
        compile_loops(pipe, full=full, vae=not full, dynamic=False, **options)
        name = f"{OURS}, compiled"
        return {
            Task(DENOISE, BARE): self._bare,
            Task(DENOISE, OURS): lambda: self._denoise(plain),
            Task(DENOISE, name): lambda: self._denoise(pipe),
            Task(DECODE, EAGER): lambda: self._decode(self._components["vae"]),
            Task(DECODE, COMPILED): lambda: self._decode(self._compiled_vae),
            Task(IMAGE, OURS): lambda: partial(plain, **self.image, output="images"),
            Task(IMAGE, name): lambda: partial(pipe, **self.image, output="images"),
        }

    def _ours(self, **changes: Any) -> Any:
        return modular_pipeline(PeRFlowSDXLAutoBlocks(), {**self._components, **changes})

    def _with_attention(self, name: str) -> Run:
        unet = with_same_weights(self._components["unet"])
        attention = AttentionConfig(name)
        attention.attach({"unet": unet})  # fails here if the strategy does not run on this machine
        return self._denoise(self._ours(unet=unet, attention=attention))

    def _denoise(self, pipe: Any) -> Run:
        return partial(pipe, **self.latents, output="images")

    def _bare(self) -> Run:
        state = self._ours()(**self.latents)
        return bare_calls(self._components["unet"], {**state.values, "latents": self.latents["latents"]})

    def _decode(self, vae: Any) -> Run:
        return torch.no_grad()(partial(vae.decode, self.latents["latents"] / vae.config.scaling_factor))


def with_same_weights(model: nn.Module) -> Any:
    """A copy that shares the tensors, for attention processors or compiled code of its own."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def measure(makers: Mapping[Task, Callable[[], Run]], setting: Setting, label: str) -> str:
    """The table of those that run, in turns, and of why others do not."""
    runs: dict[Task, Run] = {}
    first: dict[Task, float] = {}
    failures: dict[Task, str] = {}
    for task, make in makers.items():
        try:
            call = make()
            first[task] = clock(call, setting.device)
        except Exception as error:  # the other rows may go on
            failures[task] = failure(error)
        else:
            runs[task] = call
    rounds = rounds_within(SECONDS_A_TABLE, runs, setting.device, fewest=FEWEST_ROUNDS, most=MOST_ROUNDS)
    timings = time_in_turns(runs, setting, rounds=rounds, label=label, warm_up=0)
    base: dict[str, float] = {}
    rows: list[tuple[object, ...]] = []
    for task in makers:
        if task in failures:
            rows.append((*task, failures[task], "-", "-"))
            continue
        median = timings[task].median
        ratio = median / base.setdefault(task.what, median)
        rows.append((*task, timings[task].milliseconds(), f"{ratio:.3f}", f"{first[task]:.1f}"))
    return table(("task", "by", f"ms, {setting.rounds(rounds)} rounds", "ratio", "first call, s"), rows)


def failure(error: Exception) -> str:
    """A line that says what went wrong."""
    message = next(iter(str(error).splitlines()), "").replace("|", "/")
    return f"does not run: {type(error).__name__}: {message}"[:300]
