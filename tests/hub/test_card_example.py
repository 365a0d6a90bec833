"""The example of a model card: what a user gives, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perflow_blocks import CardExample, export_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLImage2ImageBlocks
from perflow_blocks.hub.card_example import example_code, loader_code, require_example


def test_the_lines_of_an_example(tmp_path: Path) -> None:
    example = CardExample(
        prompt='a "red" star',
        imports=["AutoencoderKL"],
        setup=['other = load_image("other.png")', 'place = "{repository}"'],
        arguments={"image": "other", "strength": "0.5"},
        dtype="bfloat16",
        device="mps",
    )
    options: dict[str, Any] = {"mode": "thin", "repo_id": "me/mine"}
    directory = export_workflow(PeRFlowSDXLImage2ImageBlocks(), tmp_path / "out", example=example, **options)
    card = (directory / "README.md").read_text()
    expected = """```py
import torch
from diffusers import AutoencoderKL, ModularPipeline
from diffusers.utils import load_image

pipe = ModularPipeline.from_pretrained("me/mine", trust_remote_code=True)
pipe.load_components(dtype=torch.bfloat16)
pipe.to("mps")
other = load_image("other.png")
place = "me/mine"
image = pipe(prompt="a \\"red\\" star", image=other, strength=0.5, output="images")[0]
image.save("picture.png")
```"""
    assert expected in card
    assert 'load_workflow("me/mine", trust_remote_code=True, dtype=torch.bfloat16, device="mps")' in card
    assert "weights that lie in the repository, which come from its main branch" in " ".join(card.split())


def test_a_long_call_is_broken() -> None:
    blocks = PeRFlowSDXLImage2ImageBlocks()
    code = example_code(CardExample(prompt="a star " * 20), blocks, "me/mine")
    compile(code, "card", "exec")
    assert '\n    image=load_image("photo.png"),\n' in code
    assert loader_code(CardExample(), f"{'me' * 20}/mine").startswith("pipe = load_workflow(\n")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (CardExample(arguments={"picture": "x", "image": "x"}), "the example passes picture, which the blocks do not"),
        (CardExample(setup=["other = ("]), "the example is no Python"),
        (CardExample(arguments={"image": "a b"}), "the example is no Python"),
        (CardExample(dtype="float 16"), "the example is no Python"),
    ],
)
def test_an_example_that_could_not_run_is_refused(example: CardExample, message: str, tmp_path: Path) -> None:
    blocks = PeRFlowSDXLImage2ImageBlocks()
    with pytest.raises(ValueError, match=message):
        require_example(example, blocks)
    with pytest.raises(ValueError, match=message):
        export_workflow(blocks, tmp_path / "out", mode="thin", example=example)
    assert not (tmp_path / "out").exists()
