"""The judge of the demo's images: what they show, by measures that know nothing of the models that drew them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..evaluation.measure import EvaluationSet, measure
from .images import BACKGROUNDS, COLORS, RGB, SHAPES, Prompt, Renderer, Scene, render, render_scenes
from .models import LATENT_CHANNELS, LATENT_SIZE

CLASSIFIER = Path(__file__).parent / "shape_classifier.safetensors"
PROMPT_SEED = 20_260  # no training run draws its prompts from this seed
BATCH = 32
CLEAN_SHARE = 0.75
_BORDER = 3  # pixels at each edge that count as background
_FOREGROUND_DISTANCE = 50.0  # RGB distance from the background beyond which a pixel belongs to the shape
_MIN_FOREGROUND = 24  # pixels; the smallest shape has about 100
_FAR_FROM_PALETTE = 80.0  # a median colour farther than this from every named colour has no name
_CLEAN_DISTANCE = 45.0  # the jitter of rendered colours stays below 18

Judge = Callable[[Tensor, Sequence[Prompt], "ShapeClassifier"], tuple[list[bool], list[bool]]]


class ShapeClassifier(nn.Module):
    """Images (batch, 3, 64, 64) in [0, 1] to features (batch, 64), in the form torchmetrics asks for."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, 24, 48, 64, self.num_features)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)  # (batch, 64, 4, 4)
        self.head = nn.Linear(self.num_features, len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        """The strongest answer of each channel anywhere in the image."""
        return self.body(images * 2.0 - 1.0).amax((2, 3))

    def shapes(self, images: Tensor) -> Tensor:
        """Logits (batch, 8) in the order of `SHAPES`."""
        return self.head(self(images))


def load_classifier(path: Path = CLASSIFIER) -> ShapeClassifier:
    """The shipped classifier in float32, in evaluation mode."""
    classifier = ShapeClassifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return classifier.eval()


class ColorReading(NamedTuple):
    """The nearest names, None where none is near, and whether most of the shape and of the border are near them."""

    color: str | None
    background: str | None
    clean: bool


def read_colors(image: Tensor) -> ColorReading:
    """Reads an image (3, height, width) in [0, 255]."""
    inner = torch.zeros(image.shape[1:], dtype=torch.bool)
    inner[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    border = image[:, ~inner].T  # (pixels, 3)
    background_color = border.median(0).values
    background = nearest_color(background_color, BACKGROUNDS)
    far = (image - background_color[:, None, None]).norm(dim=0) > _FOREGROUND_DISTANCE
    mask = far.clone()  # less the blend at the shape's edge: all four neighbours must be far as well
    for mine, other in ((slice(1, None), slice(-1)), (slice(-1), slice(1, None))):
        mask[mine] &= far[other]
        mask[:, mine] &= far[:, other]
    if int(mask.sum()) < _MIN_FOREGROUND:
        return ColorReading(color=None, background=background, clean=False)
    shape = image[:, mask].T
    color = nearest_color(shape.median(0).values, COLORS)
    clean = color is not None and share_near(shape, COLORS[color]) >= CLEAN_SHARE
    clean &= background is not None and share_near(border, BACKGROUNDS[background]) >= CLEAN_SHARE
    return ColorReading(color=color, background=background, clean=clean)


def nearest_color(color: Tensor, palette: Mapping[str, RGB]) -> str | None:
    """The name in `palette` nearest to a colour (3,) in [0, 255]; None where none is near."""
    distances = {name: float((color - torch.tensor(value).float()).norm()) for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= _FAR_FROM_PALETTE else None


def share_near(pixels: Tensor, color: RGB) -> float:
    """The share of pixels (count, 3) in [0, 255] that are near `color`, allowing for the jitter of renders."""
    return float(((pixels - torch.tensor(color).float()).norm(dim=1) <= _CLEAN_DISTANCE).float().mean())


@torch.no_grad()
def judge(images: Tensor, prompts: Sequence[Prompt], classifier: ShapeClassifier) -> tuple[list[bool], list[bool]]:
    """For each image (count, 3, 64, 64) in [0, 1]: is all that its prompt names right, and in clean colours?

    Shape, and colour and background where named, are compared; size and position are not judged.
    """
    accurate, strict = [], []
    shapes = classifier.shapes(images).argmax(1).tolist()
    for prompt, shape, image in zip(prompts, shapes, 255.0 * images, strict=True):
        reading = read_colors(image)
        right = SHAPES[shape] == prompt.shape
        right &= prompt.color in (None, reading.color) and prompt.background in (None, reading.background)
        accurate.append(right)
        strict.append(right and reading.clean)
    return accurate, strict


def make_demo_set(
    count: int,
    *,
    seed: int = PROMPT_SEED,
    vae: Any = None,
    renderer: Renderer = render,
    judge: Judge = judge,
    references: int = 2048,
) -> EvaluationSet:
    """`count` prompts with attributes left open as in training, and the judge; the same seed gives the same set.

    With `vae` there are two floors, real renders of the prompts' scenes and their reconstructions. Frechet distances
    are measured to `references` other renders, on the classifier's features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    rng = np.random.default_rng(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    prompts = [Prompt.describe(scene, rng) for scene in scenes]
    renders = torch.from_numpy(render_scenes(scenes, rng, renderer))
    classifier = load_classifier()
    distance = FrechetInceptionDistance(feature=classifier, reset_real_features=False)
    others = render_scenes([Scene.random(rng) for _ in range(references)], rng, renderer)
    for chunk in torch.from_numpy(others).split(256):
        distance.update(chunk / 255.0, real=True)

    def score(images: Tensor, where: slice) -> Mapping[str, Tensor]:
        accurate, strict = judge(images, prompts[where], classifier)
        return {"accuracy %": 100.0 * torch.tensor(accurate), "strict %": 100.0 * torch.tensor(strict)}

    generator = torch.Generator().manual_seed(seed)
    data = EvaluationSet(
        prompts=[prompt.text for prompt in prompts],
        latents=torch.randn(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator),
        scorers=[score],
        distances={"Frechet": distance},
    )
    if vae is not None:
        data.floors.append(measure("real renders", renders, data))
        data.floors.append(measure("VAE reconstructions", reconstruct(vae, renders), data))
    return data


@torch.no_grad()
def reconstruct(vae: Any, images: Tensor) -> Tensor:
    """Images (count, 3, height, width) of 8 bits, encoded (the posterior's mode) and decoded."""
    inputs = [(chunk / 127.5 - 1.0).to(vae.device, vae.dtype) for chunk in images.split(BATCH)]
    decoded = torch.cat([vae.decode(vae.encode(chunk).latent_dist.mode()).sample.float().cpu() for chunk in inputs])
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255.0).round().to(torch.uint8)
