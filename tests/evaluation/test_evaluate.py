"""`perflow evaluate` on a tiny SDXL repository, and each of its metrics against a value computed another way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

from perflow_blocks.cli.evaluate import open_pipelines
from perflow_blocks.delta.extract import extract_delta, save_delta
from perflow_blocks.delta.merge import merge_delta
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.demo import weights_directory
from perflow_blocks.evaluation.measure import (
    EvaluationSet,
    differences,
    evaluate_samplers,
    markdown_differences,
    mean_and_error,
    plus_minus,
)
from perflow_blocks.evaluation.metrics import ClipFeatures, clip_scorer, closeness, evaluation_set, set_distances
from perflow_blocks.evaluation.samplers import Sampler, seeded_latents
from perflow_blocks.testing.tiny import (
    IMAGE_SIZE,
    tiny_image,
    tiny_sd_components,
    tiny_sd_unet,
    tiny_sdxl_unet,
    tiny_text_config,
    tiny_tokenizer,
)
from tests.conftest import make_pipeline

Run = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
COUNT = 5


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    recipe = DeltaRecipe(prediction_type="ddim_eps", num_inference_steps=5, guidance_scale=1.0)
    save_delta({k: torch.full_like(v, 0.01) for k, v in tiny_sdxl_unet().state_dict().items()}, path, recipe)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP model of random weights."""
    path = tmp_path_factory.mktemp("clip")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    config = CLIPConfig(text_config=tiny_text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE)
    CLIPProcessor(image_processor=images, tokenizer=tiny_tokenizer()).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red étoile\n\na blue ring\n  a heart  \na star\na cross\n", encoding="utf-8")
    return path


def images(seed: int, count: int = COUNT, side: int = IMAGE_SIZE) -> Tensor:
    """Random smooth images (count, 3, side, side) of 8 bits."""
    small = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (255.0 * F.interpolate(small, side, mode="bilinear")).round().to(torch.uint8)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_repository_and_its_delta_give_table_json_and_sheet(
    run: Run, repository: Path, delta: Path, prompts: Path, clip: str, tmp_path: Path
) -> None:
    arguments = ["--model", repository, "--delta", delta, "--prompts", prompts, "--seed", 3, "--out", tmp_path / "new"]
    status, out, err = run(
        "evaluate",
        *arguments,
        *("--samplers", "perflow:4,perflow:5@2,ddim:3,dpm:3@1.5,euler:2", "--teacher", "stock:6"),
        *("--features", clip, "--clip", clip),
    )
    assert status == 0, err
    assert (tmp_path / "new" / "report.md").read_text() == out
    found = results(tmp_path / "new")
    rows = {f"{row['name']} {row['steps']} {row['guidance_scale']:g}": row for row in found["rows"]}
    assert [(name, row["nfe"]) for name, row in rows.items()] == [
        ("teacher, EulerDiscrete 6 5", 12),
        ("teacher, DDIM 3 5", 6),
        ("teacher, DPM-Solver++ 3 1.5", 6),
        ("teacher, Euler 2 5", 4),
        ("student, PeRFlow 4 1", 4),
        ("student, PeRFlow 5 2", 10),
    ]
    assert found["prompts"] == ["a red étoile", "a blue ring", "a heart", "a star", "a cross"]
    teacher, *others = rows.values()
    assert set(teacher["scores"]) == {"CLIP score"} and teacher["distances"] == {}
    for row in others:
        assert row["scores"].keys() == {"PSNR dB", "SSIM", "CLIP score"} and row["distances"].keys() == {"FID", "KID"}
        assert row["seconds"] > 0 and 0 < row["scores"]["PSNR dB"]["error"] < 20
    assert (
        f"| student, PeRFlow | 4 | 1 | 4 | {plus_minus(*rows['student, PeRFlow 4 1']['scores']['PSNR dB'].values())}"
    )
    table, differences, _ = out.split("\n\n")
    assert len(table.splitlines()) == 2 + 6 and len(differences.splitlines()) == 2 + 5
    mean = rows["student, PeRFlow 4 1"]["scores"]["SSIM"]["mean"] - rows["teacher, DDIM 3 5"]["scores"]["SSIM"]["mean"]
    assert rows["teacher, DDIM 3 5"]["baseline_less_this"]["SSIM"]["mean"] == pytest.approx(mean)
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width > 6 * 192 and sheet.height > COUNT * 192
    # The same from diffusers' own pipelines.
    classic = StableDiffusionXLPipeline.from_pretrained(repository)
    classic.set_progress_bar_config(disable=True)
    noise = seeded_latents(classic, range(3, 3 + COUNT))
    wanted = classic(found["prompts"], latents=noise, num_inference_steps=6, guidance_scale=5.0, output_type="pt")
    student = make_pipeline(**{name: part for name, part in classic.components.items() if name in MODELS})
    inputs = {"prompt": found["prompts"], "latents": noise, "output_type": "pt", "output": "images"}
    drawn = student(**inputs, num_inference_steps=4, delta=delta)
    levels = [(255.0 * one).round() for one in (wanted.images, drawn)]
    error = (levels[0] - levels[1]).square().flatten(1).mean(1)
    psnr, spread = mean_and_error(10.0 * (255.0**2 / error).log10())
    scores = rows["student, PeRFlow 4 1"]["scores"]["PSNR dB"]
    assert scores["mean"] == pytest.approx(psnr, abs=0.02)
    assert scores["error"] == pytest.approx(spread, abs=0.02)


def test_a_stable_diffusion_model_and_its_delta(run: Run, prompts: Path, tmp_path: Path) -> None:
    StableDiffusionPipeline(**tiny_sd_components()).save_pretrained(tmp_path / "model")
    save_delta(extract_delta(tiny_sd_unet(1), tiny_sd_unet(0)), tmp_path / "delta.safetensors")
    arguments = ["--model", tmp_path / "model", "--delta", tmp_path / "delta.safetensors", "--prompts", prompts]
    samplers = ["--samplers", "perflow:4,dpm:4", "--teacher", "stock:6", "--out", tmp_path]
    status, _, err = run("evaluate", *arguments, *samplers)
    assert status == 0, err
    found = [(row["name"], row["guidance_scale"]) for row in results(tmp_path)["rows"]]
    assert found == [("teacher, DDIM", 7.5), ("teacher, DPM-Solver++", 7.5), ("student, PeRFlow", 4.5)]


MODELS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")


def test_a_merged_unet_and_a_merged_repository_have_a_teacher_too(
    run: Run, repository: Path, delta: Path, prompts: Path, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(repository / "unet")
    merge_delta(unet, delta)
    unet.save_pretrained(tmp_path / "unet")
    merged = StableDiffusionXLPipeline.from_pretrained(repository, unet=unet)
    merged.save_pretrained(tmp_path / "merged")
    common = ["--prompts", prompts, "--samplers", "perflow:4,ddim:2", "--teacher", "ddim:3", "--count", 3]
    ways = {
        "delta": ["--model", repository, "--delta", delta],
        "unet": ["--model", repository, "--unet", tmp_path / "unet"],
        "base": ["--model", tmp_path / "merged", "--base", repository],
    }
    scores = {}
    for name, way in ways.items():
        status, _, err = run("evaluate", *common, *way, "--out", tmp_path / name)
        assert status == 0, err
        scores[name] = [row["scores"].get("PSNR dB", {}).get("mean") for row in results(tmp_path / name)["rows"]]
    assert scores["delta"][0] is None and scores["delta"][2] < 90.0
    assert scores["unet"] == pytest.approx(scores["delta"], abs=0.05)
    assert scores["base"] == pytest.approx(scores["delta"], abs=0.05)
    demo, _ = open_pipelines(None, None, weights_directory() / "unet", None, "cpu", torch.float32)
    assert demo.config.delta is None  # a UNet that is few-step already gets no other delta
    status, _, err = run("evaluate", *common, "--model", tmp_path / "merged", "--out", tmp_path / "x")
    assert status == 2 and "pass --delta, --unet, or its teacher as --base" in err and err.count("\n") == 1


def test_reference_images_come_from_a_folder(clip: str, tmp_path: Path) -> None:
    for number in range(4):
        tiny_image(number, (48, 40)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    data = evaluation_set(["a", "b"], torch.zeros(2, 4, 16, 16), features=clip, reference=tmp_path, device=CPU)
    assert not data.to_teacher and int(data.distances["FID"].real_features_num_samples) == 4
    with pytest.raises(ValueError, match=r"holds 0 images; name a folder with at least 2"):
        evaluation_set(["a"], torch.zeros(1, 4, 2, 2), features=clip, reference=tmp_path / "no", device=CPU)


def test_psnr_and_ssim() -> None:
    target, given = images(0), images(1)
    scores = closeness(target)(given[1:3].float() / 255.0, slice(1, 3))
    error = (target[1:3].double() - given[1:3].double()).square().flatten(1).mean(1)
    torch.testing.assert_close(scores["PSNR dB"].double(), 10.0 * (255.0**2 / error).log10(), atol=1e-4, rtol=0)
    kernel = torch.exp(-torch.arange(-5, 6).double().square() / (2 * 1.5**2))
    window = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 11, 11)

    def blurred(one: Tensor) -> Tensor:
        return F.conv2d(F.pad(one, (5, 5, 5, 5), "reflect"), window, groups=3)

    a, b = target[1:3].double() / 255.0, given[1:3].double() / 255.0
    x, y = blurred(a), blurred(b)
    covariance = blurred(a * b) - x * y
    variances = blurred(a * a) - x * x + blurred(b * b) - y * y
    ssim = (2 * x * y + 1e-4) * (2 * covariance + 9e-4) / ((x * x + y * y + 1e-4) * (variances + 9e-4))
    torch.testing.assert_close(scores["SSIM"].double(), ssim.flatten(1).mean(1), atol=1e-4, rtol=0)
    same = closeness(target)(target[:2].float() / 255.0, slice(0, 2))
    assert same["PSNR dB"].tolist() == [100.0] * 2 and same["SSIM"].tolist() == pytest.approx([1.0] * 2)


def test_the_clip_score_is_the_cosine_of_image_and_prompt(clip: str) -> None:
    prompts = ["a red star", "b", "c and d"]
    scores = clip_scorer(clip, prompts, CPU)(images(0, 2).float() / 255.0, slice(1, 3))["CLIP score"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=prompts[1:], images=list(images(0, 2)), return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**inputs)
    expected = 100.0 * F.cosine_similarity(found.image_embeds, found.text_embeds)
    torch.testing.assert_close(scores, expected.clamp(min=0), atol=1e-3, rtol=0)
    assert (expected > 0).any()


def test_fid_and_kid_of_clip_features(clip: str) -> None:
    real, drawn = images(0, 40), images(1, 40)
    distances = set_distances(clip, 80, CPU)  # so that KID's subsets are the sets
    for metric in distances.values():
        metric.update(real.float() / 255.0, real=True)
        metric.update(drawn.float() / 255.0, real=False)
    network = ClipFeatures(clip, CPU)
    with torch.no_grad():
        x, y = (network(one.float() / 255.0).double() for one in (real, drawn))
    product = x.T.cov() @ y.T.cov()
    root = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    fid = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root
    assert float(distances["FID"].compute()) == pytest.approx(float(fid), rel=1e-3)
    count = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / x.shape[1] + 1) ** 3

    within = sum((kernel(a, a).sum() - kernel(a, a).trace()) / (count * (count - 1)) for a in (x, y))
    kid = within - 2 * kernel(x, y).mean()
    assert float(distances["KID"].compute()[0]) == pytest.approx(float(kid), rel=1e-3)


def test_paired_differences_and_their_errors() -> None:
    values = {"one": torch.tensor([1.0, 2.0, 4.0]), "other": torch.tensor([0.0, 2.0, 1.0])}
    number = {name: Sampler(model=name, solver="x", steps=1, guidance_scale=1.0, draw=draw_black) for name in values}
    names = iter(values)

    def score(given: Tensor, where: slice) -> dict[str, Tensor]:
        return {"score": values[next(names)][where]}

    data = EvaluationSet(prompts=["a"] * 3, latents=torch.zeros(3, 1), scorers=[score])
    one, other = evaluate_samplers(list(number.values()), data, batch_size=2)
    difference = torch.tensor([1.0, 0.0, 3.0])
    expected = (float(difference.mean()), float(difference.std()) / 3**0.5)
    assert differences(one, other)["score"] == pytest.approx(expected)
    assert "| other, x, 1 steps | 1 | +1.33 ± 0.88 |" in markdown_differences([one, other], one)
    assert mean_and_error(values["one"])[1] == pytest.approx((7 / 3) ** 0.5 / 3**0.5)


def draw_black(prompts: Any, latents: Tensor) -> Tensor:
    return torch.zeros(len(latents), 3, 4, 4)


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (93.94, 1.06, "93.9 ± 1.1"),
        (0.91234, 0.0123, "0.912 ± 0.012"),
        (1234.0, 56.0, "1234 ± 56"),
        (1, 0, "1.0 ± 0.0"),
    ],
)
def test_figures_have_two_digits_of_their_error(mean: float, error: float, text: str) -> None:
    assert plus_minus(mean, error) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "pass one of --prompts FILE and --demo"),
        (("--demo", "--count", "1"), "--count 1 gives no standard error"),
        (("--demo", "--samplers", "heun:4"), "solvers are perflow, stock, ddim, dpm and euler"),
        (("--demo", "--samplers", "perflow:0"), "must be SOLVER:STEPS"),
        (("--demo", "--samplers", "perflow:2"), "below the model's 4 time windows"),
        (("--demo", "--teacher", "perflow:4"), "must be one sampler of the base"),
        (("--demo", "--features", "a/b"), "cannot be combined with --demo"),
        (("--demo", "--features", "inception"), "needs torch-fidelity"),
        (("--demo", "--reference", "images"), "--reference needs --features"),
        (("--demo", "--batch-size", "0"), "greater than or equal to 1"),
        (("--prompts", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run("evaluate", *arguments, "--out", tmp_path)
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err
