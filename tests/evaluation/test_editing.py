"""Image-to-image, inpainting and ControlNet on the embedded model, and the report that measures them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel

from perflow_blocks.demo import perflow_pipeline
from perflow_blocks.evaluation import editing_report
from perflow_blocks.evaluation.classifier import load_classifier
from perflow_blocks.evaluation.editing import (
    Drawn,
    Edit,
    Known,
    Outcome,
    draw,
    evaluate_edits,
    measure,
    measure_floors,
    peak_signal_to_noise,
)
from perflow_blocks.evaluation.editing_set import MARGINS, EditingSet, make_editing_set
from perflow_blocks.evaluation.judge import Verdicts, judge, paired_difference

HOLES = (*MARGINS, "half")


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = perflow_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def data() -> EditingSet:
    return make_editing_set(32)


def outcomes(pipe: Any, data: EditingSet, *edits: Edit) -> list[Outcome]:
    found = evaluate_edits(pipe, data, edits, load_classifier())
    return [found[edit] for edit in edits]


def first_four(pipe: Any, data: EditingSet, edit: Edit) -> Drawn:
    return draw(pipe, data, edit, slice(0, 4))


def test_the_distance_to_the_input_grows_with_strength(pipe: Any, data: EditingSet) -> None:
    low, middle, high = outcomes(pipe, data, *(Edit(strength=s) for s in (0.3, 0.5, 0.8)))
    assert (low.steps, middle.steps, high.steps) == (2, 2, 4)
    for near, far in ((low, middle), (middle, high)):
        assert float(near.psnr.mean()) > float(far.psnr.mean()) + 0.5
        assert float(near.difference.mean()) < float(far.difference.mean()) - 0.5
        assert near.latent_distance is not None and far.latent_distance is not None
        assert float((near.latent_distance < far.latent_distance).float().mean()) > 0.8
    assert float(low.psnr.mean()) > 22.0  # the input is still there
    assert float(low.verdicts.accurate.float().mean()) > 0.85


def test_a_prompt_that_names_something_else_is_followed_with_growing_strength(pipe: Any, data: EditingSet) -> None:
    low, high = outcomes(pipe, data, *(Edit(wording="both", strength=s) for s in (0.3, 0.8)))
    assert float(low.verdicts.accurate.float().mean()) < 0.3
    assert float(high.verdicts.accurate.float().mean()) > 0.5


@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
def test_at_window_boundaries_both_ways_of_noising_are_one(pipe: Any, data: EditingSet, strength: float) -> None:
    chord, marginal = (first_four(pipe, data, Edit(strength=strength, noising=name)) for name in ("chord", "marginal"))
    torch.testing.assert_close(chord.pictures, marginal.pictures, rtol=0, atol=1e-5)
    assert chord.noise_to_signal == pytest.approx(marginal.noise_to_signal, rel=1e-6)


def test_inside_windows_the_chord_is_the_default_and_recovers_more(pipe: Any, data: EditingSet) -> None:
    for strength in (0.1, 0.6):
        chord = Edit(strength=strength)
        on_path, beside = outcomes(pipe, data, chord, replace(chord, noising="marginal"))
        gain, error = paired_difference(on_path.psnr, beside.psnr)
        assert gain > 2.0 * error > 0.0
    default = pipe(
        prompt=[prompt.text for prompt in data.prompts["own"][:4]],
        image=list(data.inputs[:4]),
        strength=0.6,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(data.seed + n) for n in range(4)],
        output_type="pt",
        output="images",
    )
    assert torch.equal(default, first_four(pipe, data, Edit(strength=0.6)).pictures)


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("strength", [1.0, 0.8])
def test_inpainting_keeps_what_is_outside_the_hole_exactly(
    pipe: Any, data: EditingSet, hole: str, strength: float
) -> None:
    edit = Edit(wording="both", hole=hole, strength=strength)
    part = replace(data, inputs=data.inputs[:4], masks={hole: data.masks[hole][:4]}, latents=data.latents[:4])
    part = replace(part, prompts={"both": data.prompts["both"][:4]})
    (kept, decoded) = outcomes(pipe, part, edit, replace(edit, keep_known_pixels=False))
    assert kept.known and decoded.known
    assert int(kept.known.pixels.sum()) == 0 and float(kept.known.difference.max()) < 1e-3
    assert int(kept.known.latents.sum()) == int(decoded.known.latents.sum()) == 0
    assert int(decoded.known.pixels.min()) > 0  # so the count can tell
    assert float(kept.difference.min()) > 1.0  # something was painted


def test_pil_pictures_have_the_known_pixels_bit_for_bit(pipe: Any, data: EditingSet) -> None:
    given, mask = data.inputs[0], data.masks["tight"][0]
    arguments = {"prompt": "a red ring", "image": given, "mask_image": mask, "output": "images"}
    painted = pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]
    differs = (np.asarray(painted) != np.asarray(given)).any(-1)
    hole = np.asarray(mask) > 127
    assert not differs[~hole].any() and differs[hole].mean() > 0.5


def test_the_hole_is_filled_with_what_the_prompt_says(pipe: Any, data: EditingSet) -> None:
    (filled,) = outcomes(pipe, data, Edit(wording="both", hole="wide", strength=1.0))
    assert float(filled.verdicts.accurate.float().mean()) > 0.6
    assert not judge(data.pixels(), data.prompts["both"], load_classifier()).accurate.any()


def controlnet(pipe: Any, scale: float) -> ControlNetModel:
    """One for the demo's UNet, whose latents are a quarter of the picture; `scale` of its outputs' weights."""
    torch.manual_seed(0)
    model = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64))
    with torch.no_grad():
        outputs = [*model.controlnet_down_blocks, model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out]
        for layer in outputs:
            torch.nn.init.normal_(layer.weight, std=scale)
    return model.eval()


@pytest.mark.parametrize("task", ["text2image", "image2image", "inpainting"])
def test_controlnet(pipe: Any, data: EditingSet, task: str) -> None:
    arguments: dict[str, Any] = {"prompt": "a red star", "num_inference_steps": 4, "output_type": "pt"}
    if task != "text2image":
        arguments |= {"image": data.inputs[0], "strength": 0.8}
    if task == "inpainting":
        arguments |= {"mask_image": data.masks["tight"][0]}

    def run_with(**control: Any) -> torch.Tensor:
        return pipe(**arguments, **control, generator=torch.Generator().manual_seed(0), output="images")

    plain = run_with()
    pipe.update_components(controlnet=controlnet(pipe, 0.0))
    torch.testing.assert_close(run_with(control_image=data.inputs[1]), plain, rtol=0, atol=1e-4)
    pipe.update_components(controlnet=controlnet(pipe, 0.1))
    first, second = (run_with(control_image=data.inputs[number]) for number in (1, 2))
    assert float((first - plain).abs().mean()) > 1e-3 < float((first - second).abs().max())


def test_the_set_is_reproducible_and_its_holes_hold_the_shapes() -> None:
    data, again = make_editing_set(64), make_editing_set(64)
    assert data.inputs == again.inputs and data.prompts == again.prompts and torch.equal(data.latents, again.latents)
    pixels = data.pixels()
    shape = (pixels != pixels[..., :1, :1]).any(1, keepdim=True)
    shares = []
    for hole in HOLES:
        painted = data.painted(hole)
        blocks = painted.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2)
        assert torch.equal(blocks.all(-1), blocks.any(-1))  # whole latents
        shares.append(float((shape & painted).sum() / shape.sum()))
        assert (~painted).any((1, 2, 3)).all()  # something is known
    assert shares[:2] == [1.0, 1.0] and 0.5 < shares[2] < 1.0
    assert bool((data.painted("wide") >= data.painted("tight")).all())


def test_wordings_change_what_they_say_and_nothing_else() -> None:
    data = make_editing_set(12)
    assert judge(data.pixels(), data.prompts["own"], load_classifier()).strict.all()
    for own, color, shape, both in zip(*data.prompts.values(), strict=True):
        assert color.color != own.color and replace(color, color=own.color) == own
        assert shape.shape != own.shape and replace(shape, shape=own.shape) == own
        assert both == replace(shape, color=color.color)


def test_measures_find_single_pixels_and_latents() -> None:
    data = make_editing_set(2)
    pictures, change = data.pixels(), torch.zeros(2, 4, 16, 16)
    row, column = (~data.painted("tight")[1, 0]).nonzero()[0].tolist()
    pictures[1, 2, row, column] += 4 / 255
    change[1, 3, row // 4, column // 4] = 1e-6
    drawn = Drawn(pictures=pictures, change=change, steps=4, noise_to_signal=1.0)
    outcome = measure(drawn, data, Edit(strength=1.0, hole="tight"), load_classifier())
    assert outcome.known and outcome.known.pixels.tolist() == outcome.known.latents.tolist() == [0, 1]
    assert float(outcome.psnr[0]) == pytest.approx(96.0) and float(outcome.psnr[1]) < 90.0
    assert float(outcome.difference[1]) == pytest.approx(4 / (3 * 64 * 64), rel=1e-3)
    levels = 3 * int((~data.painted("tight")[1]).sum())
    assert float(outcome.known.difference[1]) == pytest.approx(4 / levels, rel=1e-3)
    assert float(peak_signal_to_noise(torch.full((1, 3, 2, 2), 0.1))) == pytest.approx(20.0)


def made_up(edit: Edit, data: EditingSet) -> Outcome:
    """An outcome of random values that differ from edit to edit."""
    generator = torch.Generator().manual_seed(sum(map(ord, edit.label)))
    values = torch.rand(len(data), generator=generator) + (edit.noising == "chord")
    hits = torch.rand(len(data), generator=generator) < 0.5
    changed = torch.full((len(data),), 0 if edit.keep_known_pixels else 3)
    known = Known(pixels=changed, difference=values, latents=torch.zeros(len(data)))
    return Outcome(
        verdicts=Verdicts(accurate=hits, strict=hits & hits.roll(1)),
        psnr=values,
        difference=values,
        steps=edit.steps,
        noise_to_signal=None if edit.strength is None else edit.strength,
        latent_distance=None if edit.strength is None else values,
        known=known if edit.hole else None,
    )


def test_every_table_finds_its_edits_among_the_planned_ones(pipe: Any, data: EditingSet) -> None:
    planned = editing_report.planned_edits()
    assert len(planned) == len(set(planned))
    results = {edit: made_up(edit, data) for edit in planned}
    floors = measure_floors(pipe.vae, data, load_classifier())
    assert len(editing_report.strength_table(results, floors).splitlines()) == 2 + 5
    assert len(editing_report.wording_table(results).splitlines()) == 2 + 4
    noising = editing_report.noising_table(results).splitlines()[2:]
    assert len(noising) == len(editing_report.noising_pairs()) == 15
    gains = [float(line.split("|")[6].split("±")[0]) for line in noising]
    assert all(0.5 < gain < 1.5 for gain in gains)  # chord less marginal, not the other way round
    assert len(editing_report.hole_table(results, data).splitlines()) == 2 + 9
    known = editing_report.known_table(results, data).splitlines()[2:]
    assert [line.split("|")[3].split()[0] for line in known] == ["0"] * 3
    assert [line.split("|")[4].split()[0] for line in known] == [str(3 * len(data))] * 3
    assert float(floors["decoded"].psnr.mean()) > 25.0
    assert float(floors["blank"].verdicts.accurate.float().mean()) < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--editing", "--prompts", "1"), "prompts=1"),
        (("--editing", "--quick"), "--quick"),
        (("--editing", "--out", "sheet.png"), "sheet.png is a picture"),
    ],
)
def test_mistakes_are_one_line(run: Callable[..., tuple[int, str, str]], arguments: Any, message: str) -> None:
    status, out, err = run("evaluate", *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


def test_editing_writes_its_report_and_a_sheet_beside(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing_report, "HOLES", {"half": "own"})
    monkeypatch.setattr(editing_report, "editing_report", lambda pipe, data, classifier: f"{len(data)} inputs")
    status, out, _ = run("evaluate", "--editing", "--prompts", 2, "--out", tmp_path / "editing.md")
    assert status == 0 and out.strip() == (tmp_path / "editing.md").read_text().strip() == "2 inputs"
    assert (tmp_path / "editing.png").stat().st_size > 10_000
