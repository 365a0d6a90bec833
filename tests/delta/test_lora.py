"""A delta as a LoRA and a residual: what goes where, at which rank, with what loss, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.utils import logging
from torch import Tensor, nn

from perflow_blocks import delta_to_lora, extract_delta
from perflow_blocks.delta.lora import DeltaLora, save_lora
from perflow_blocks.testing.tiny import tiny_sd_unet, tiny_sdxl_unet

pytestmark = pytest.mark.behaviour

SQUARE = "mid_block.attentions.0.proj_in"
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(autouse=True)
def no_progress_bar() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def delta() -> dict[str, Tensor]:
    return extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))


def product(converted: DeltaLora, module: str) -> Tensor:
    """What the pair of the module adds to its weight, as a matrix (out, in * k * k)."""
    down, up = (converted.lora[f"unet.{module}.lora_{side}.weight"].double() for side in "AB")
    return up.flatten(1) @ down.flatten(1)


@pytest.mark.parametrize("unet", [tiny_sdxl_unet, tiny_sd_unet])
def test_at_full_rank_nothing_is_lost(unet: Any) -> None:
    delta = extract_delta(unet(1), unet(0))
    converted = delta_to_lora(delta, rank=10_000, dtype=torch.float32)
    assert {f"{name}.weight" for name in converted.report.ranks} | set(converted.residual) == set(delta)
    for name, tensor in delta.items():
        if name in converted.residual:
            assert torch.equal(converted.residual[name], tensor), name
        else:
            rebuilt = product(converted, name.removesuffix(".weight")).reshape(tensor.shape)
            torch.testing.assert_close(rebuilt, tensor.double(), rtol=0, atol=2e-6)
    assert converted.report.relative_error < 1e-5 and converted.report.energy == pytest.approx(1.0)


def test_layers_go_into_the_lora_and_the_rest_stays_beside_it(delta: dict[str, Tensor]) -> None:
    model = tiny_sdxl_unet()
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    embeddings = {name for name in layers if name.startswith(("time_embedding", "add_embedding"))}
    assert len(embeddings) == 4
    converted = delta_to_lora(delta, rank=2)
    assert converted.report.ranks.keys() == layers - embeddings
    names = {name.removeprefix("unet.").split(".lora_")[0] for name in converted.lora}
    assert names == layers - embeddings
    assert {f"{name}.weight" for name in embeddings} <= set(converted.residual)
    assert converted.lora[f"unet.{CONV}.lora_A.weight"].shape == (2, 16, 3, 3)
    assert converted.lora[f"unet.{CONV}.lora_B.weight"].shape == (16, 2, 1, 1)
    kept = delta_to_lora(delta, rank=2, keep=["conv_in", "*.attn2.to_k"])
    more = set(kept.residual) - set(converted.residual)
    assert "conv_in.weight" in more and len(more) == 1 + sum(name.endswith("attn2.to_k") for name in layers)
    assert not [name for name in kept.lora if "conv_in" in name or "attn2.to_k" in name]
    whole = delta_to_lora(delta, rank=2, keep_embeddings=False)
    assert whole.report.ranks.keys() == layers and not {f"{name}.weight" for name in layers} & set(whole.residual)
    with pytest.raises(ValueError, match="layout='kohya' has no names for embeddings"):
        save_lora(whole, "not-written.safetensors", "kohya")


def test_whole_weights_and_loras_make_no_lora(delta: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="a model's whole weights, not their difference from a base"):
        delta_to_lora(tiny_sdxl_unet(0).state_dict(), rank=2)
    with pytest.raises(ValueError, match=r"is a LoRA .*load_lora_weights"):
        delta_to_lora(delta_to_lora(delta, rank=2).lora, rank=2)


@pytest.mark.parametrize(("energy", "max_rank"), [(0.3, 128), (0.8, 128), (0.99, 5)])
def test_energy_gives_each_layer_the_least_rank_that_keeps_it(
    delta: dict[str, Tensor], energy: float, max_rank: int
) -> None:
    converted = delta_to_lora(delta, energy=energy, max_rank=max_rank)
    lost = whole = layers = 0.0
    for name, rank in converted.report.ranks.items():
        change = delta[f"{name}.weight"].flatten(1).double()
        kept = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
        assert rank == max_rank or kept[rank - 1] >= energy - 1e-6
        assert rank <= max_rank and (rank == 1 or kept[rank - 2] < energy + 1e-6)
        lost += float((change - product(converted, name)).square().sum())
        layers += float(change.square().sum())
    whole = sum(float(tensor.double().square().sum()) for tensor in delta.values())
    report = converted.report
    assert report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert report.energy == pytest.approx(1 - lost / layers, abs=2e-3)
    assert report.parameters == sum(tensor.numel() for tensor in converted.lora.values())
    assert report.residual_parameters == sum(tensor.numel() for tensor in converted.residual.values())
    assert f"rank {min(report.ranks.values())} to {max(report.ranks.values())}" in str(report)


GOOD = {f"{SQUARE}.weight": torch.ones(4, 4), f"{SQUARE}.bias": torch.ones(4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, r"rank=2\.5"),
        ({"energy": 0.0}, r"energy=0\.0"),
        ({"energy": 1.01}, r"energy=1\.01"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"energy": 0.5, "max_rank": 0}, "max_rank=0"),
        ({"rank": 2, "keep": ["conv_inn"]}, "conv_inn matches no"),
    ],
)
def test_settings_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    class Unread(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            raise AssertionError("factorised before the settings were checked")

    with pytest.raises(ValueError, match=message) as caught:
        delta_to_lora(Unread(GOOD), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({}, "no floating-point tensors"),
        ({**GOOD, "conv_in.weight": torch.full((2, 2, 1, 1), torch.nan)}, r"not finite \(conv_in\.weight\)"),
        ({f"{SQUARE}.bias": torch.ones(4)}, "no linear or convolution layer"),
        ({f"{SQUARE}.weight": torch.full((4, 4), 1e12)}, rf"{SQUARE}\.lora_.* too large for torch\.float16"),
        ({**GOOD, f"{SQUARE}.bias": torch.full((4,), 1e5)}, rf"{SQUARE}\.bias is too large"),
        ([torch.ones(2)], "delta=list"),
    ],
)
def test_deltas_that_are_refused(delta: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        delta_to_lora(delta, rank=2)
    assert "\n" not in str(caught.value)
