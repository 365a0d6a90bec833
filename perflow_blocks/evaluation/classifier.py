"""A small convolutional classifier of shapes: the independent judge of what a picture shows."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..demo.data import RenderedPictures
from ..demo.pictures import SHAPES

WEIGHTS = Path(__file__).parent / "shape_classifier.safetensors"
NUM_FEATURES = 64


class ShapeClassifier(nn.Module):
    """Pictures (batch, 3, 64, 64) in [0, 1] to logits (batch, 8) in the order of `SHAPES`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, NUM_FEATURES)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)  # (batch, 64, 4, 4)
        self.head = nn.Linear(NUM_FEATURES, len(SHAPES))

    def features(self, pictures: Tensor) -> Tensor:
        """Features (batch, 64): the strongest answer of each channel anywhere in the picture."""
        return self.body(pictures * 2.0 - 1.0).amax((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))


def load_classifier(path: Path = WEIGHTS) -> ShapeClassifier:
    """The shipped classifier in float32, in evaluation mode."""
    classifier = ShapeClassifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return classifier.eval()


def save_classifier(classifier: ShapeClassifier, path: Path) -> None:
    """Writes weights and statistics in half precision."""
    state = {name: value.half().contiguous() for name, value in classifier.state_dict().items()}
    save_file(state, path)


def train_classifier(
    pictures: RenderedPictures, *, steps: int = 1200, batch_size: int = 64, lr: float = 2e-3, seed: int = 0
) -> ShapeClassifier:
    """Trains on renders with noise and blur added, so that it also judges pictures that a decoder drew."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    labels = shape_labels(pictures)
    classifier = ShapeClassifier()
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a documented form of Module.to
    optimizer = torch.optim.AdamW(classifier.parameters(), lr, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    progress = tqdm(range(steps), desc="classifier", unit="step")
    for step in progress:
        indices = torch.randint(len(pictures), (batch_size,), generator=generator)
        images = pictures.batch(indices) / 2 + 0.5
        if step % 2:
            images = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        strength = torch.rand(batch_size, 1, 1, 1, generator=generator) * 0.08
        images = (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        loss = F.cross_entropy(classifier(images.contiguous(memory_format=torch.channels_last)), labels[indices])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return classifier.eval()


@torch.no_grad()
def classifier_accuracy(classifier: ShapeClassifier, pictures: RenderedPictures, *, batch_size: int = 256) -> float:
    """The share of pictures whose shape is recognised, in [0, 1]."""
    labels = shape_labels(pictures)
    right = sum(
        int((classifier(pictures.batch(chunk) / 2 + 0.5).argmax(1) == labels[chunk]).sum())
        for chunk in torch.arange(len(pictures)).split(batch_size)
    )
    return right / len(pictures)


def shape_labels(pictures: RenderedPictures) -> Tensor:
    """Indices into `SHAPES`, (count,)."""
    return torch.tensor([SHAPES.index(scene.shape) for scene in pictures.scenes])
