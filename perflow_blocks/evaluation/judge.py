"""Judges pictures against the prompts they were drawn from, and a set of pictures against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ..demo.pictures import SHAPES, Prompt
from .classifier import NUM_FEATURES, ShapeClassifier
from .pixels import read_colors

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Per picture: does it show everything its prompt names (`accurate`), and that in clean colours (`strict`)?

    Both are bool tensors (count,).
    """

    accurate: Tensor
    strict: Tensor


@torch.no_grad()
def judge(pictures: Tensor, prompts: Sequence[Prompt], classifier: ShapeClassifier) -> Verdicts:
    """Compares shape, and colour and background where named, with the picture; size and position are not judged.

    Args:
        pictures: (count, 3, 64, 64) in [0, 1].
        prompts: what each was drawn from.
        classifier: recognises the shape; colours are read from the pixels.
    """
    shapes = torch.cat([classifier(chunk).argmax(1) for chunk in pictures.split(_BATCH)]).tolist()
    accurate, strict = [], []
    for prompt, shape, reading in zip(prompts, shapes, read_colors(pictures), strict=True):
        right = (
            SHAPES[shape] == prompt.shape
            and prompt.color in (None, reading.color)
            and prompt.background in (None, reading.background)
        )
        accurate.append(right)
        strict.append(right and reading.clean)
    return Verdicts(accurate=torch.tensor(accurate), strict=torch.tensor(strict))


def proportion(hits: Tensor) -> tuple[float, float]:
    """The share of true entries of a bool tensor, and its standard error, both in [0, 1]."""
    share = float(hits.float().mean())
    return share, math.sqrt(share * (1.0 - share) / len(hits))


def paired_difference(hits: Tensor, baseline: Tensor) -> tuple[float, float]:
    """Mean difference of two samplers' hits on the same prompts, and its standard error."""
    difference = hits.double() - baseline.double()
    return float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))


class _Features(nn.Module):
    """The classifier's features in the form torchmetrics asks for."""

    num_features = NUM_FEATURES

    def __init__(self, classifier: ShapeClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pictures: Tensor) -> Tensor:
        return self.classifier.features(pictures)


@torch.no_grad()
def frechet_distance(pictures: Tensor, real: Tensor, classifier: ShapeClassifier) -> float:
    """The Frechet distance of two sets of pictures (count, 3, 64, 64) in [0, 1], on the classifier's features.

    It compares samplers with each other only: the features are not Inception's, so the scale is its own.
    """
    metric = FrechetInceptionDistance(feature=_Features(classifier))
    for images, is_real in ((real, True), (pictures, False)):
        for chunk in images.split(_BATCH):
            metric.update(chunk, real=is_real)
    return float(metric.compute())
