"""What the denoising loop costs over bare UNet calls, beside the two loops of diffusers with the same scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from diffusers import UNet2DConditionModel

from .contenders import BARE, GUIDANCE, RIVALS, Denoise, make_contenders, verify
from .measure import Setting, Timing, time_in_turns
from .models import MEDIUM, TINY, FreeUNet, build_unet
from .report import Report, table

STEPS, ROUNDS = 4, 12
FREE_STEPS, FREE_ROUNDS = (4, 24), 50

SETTING = """SDXL's architecture with random weights ({weights:.0f} M), one image of {latents} x {latents} latents in
float32, {steps} steps, guidance {guidance:g}; embeddings given, nothing decoded. All use `PeRFlowScheduler`, and their
latents agree. Medians and quartiles of {rounds} rounds taken in turns. The stock modular blocks call the UNet once for
each of the guider's batches, the others once a step with both."""

RATIOS = "Ratio of medians above: how many times the first one's time the second one takes."

FREE = """The same with a UNet that returns its input: what is left is Python and the small tensor operations of a step
(combining the predictions, the solver). Calls of {few} and {many} steps, {rounds} rounds in turns; the cost of a step
is the difference of their medians over {between} steps, the rest is what a call costs once. A stage by
itself, such as `denoise` here, is a pipeline of diffusers' class, in which three blocks look for the device in the
UNet's modules. The preset's own pipeline looks once: [host time](host.md) is of whole calls."""


def run(setting: Setting) -> Iterator[Report]:
    size, steps = (TINY if setting.quick else MEDIUM), STEPS
    unet = build_unet(size, setting.device)
    contenders = make_contenders(unet, size, steps, setting.device)
    calls = verify(contenders, unet, steps)
    timings = time_in_turns(contenders, setting, rounds=ROUNDS, label="loop")
    text = SETTING.format(
        weights=_millions(unet),
        latents=size.latents,
        steps=steps,
        guidance=GUIDANCE,
        rounds=setting.rounds(ROUNDS),
    )
    few, many = FREE_STEPS
    free = FREE.format(few=few, many=many, rounds=setting.rounds(FREE_ROUNDS), between=many - few)
    yield Report(
        title="Denoising loop",
        parts=(
            text,
            overheads(timings, calls, steps),
            RATIOS,
            comparisons(timings),
            "## Without the network",
            free,
            free_steps(setting),
        ),
    )


def overheads(timings: Mapping[str, Timing], calls: Mapping[str, int], steps: int) -> str:
    """Each contender's time above that of the bare calls."""
    base = timings[BARE].median
    return table(
        ("what", "UNet calls", "ms (quartiles)", "over bare %", "over bare, ms a step"),
        (
            (
                name,
                calls[name],
                timing.milliseconds(),
                "-" if name == BARE else f"{100 * (timing.median / base - 1):+.2f}",
                "-" if name == BARE else f"{1000 * (timing.median - base) / steps:+.2f}",
            )
            for name, timing in timings.items()
        ),
    )


def comparisons(timings: Mapping[str, Timing]) -> str:
    """How this package's loop and stage stand beside those that do the same work."""
    return table(
        ("of this package", "of diffusers", "ratio"),
        (
            (own, rival, f"{timings[rival].median / timings[own].median:.3f}")
            for own, rivals in RIVALS.items()
            for rival in rivals
        ),
    )


def free_steps(setting: Setting) -> str:
    """The table of what a step and a call cost without the network."""
    size, (few, many) = (TINY if setting.quick else MEDIUM), FREE_STEPS
    unet: UNet2DConditionModel = build_unet(size, setting.device, kind=FreeUNet)
    runs: dict[str, Denoise] = {}
    for steps in FREE_STEPS:
        contenders = make_contenders(unet, size, steps, setting.device)
        verify(contenders, unet, steps)
        runs |= {f"{name} {steps}": run for name, run in contenders.items()}
    timings = time_in_turns(runs, setting, rounds=FREE_ROUNDS, label="loop without network")
    rows = []
    for name in contenders:
        short, long = (timings[f"{name} {steps}"].median for steps in FREE_STEPS)
        step = (long - short) / (many - few)
        rows.append((name, f"{1000 * step:.3f}", f"{1000 * (short - few * step):.2f}"))
    return table(("what", "ms a step", "ms a call besides"), rows)


def _millions(unet: UNet2DConditionModel) -> float:
    return sum(weight.numel() for weight in unet.parameters()) / 1e6
