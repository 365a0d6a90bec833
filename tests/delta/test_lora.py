"""A delta as a LoRA and a residual: what goes where, at which rank, with what loss, and what is refused."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from perflow_blocks import delta_to_lora, extract_delta
from perflow_blocks.delta.extract import open_difference
from perflow_blocks.delta.lora import DeltaLora
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_sd_unet, tiny_sdxl_unet
from tests.builder.conftest import unet_keys

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
    factorised = {layer.name for layer in converted.report.layers}
    assert {f"{name}.weight" for name in factorised} | set(converted.residual) == set(delta)
    for name, tensor in delta.items():
        if name in converted.residual:
            assert torch.equal(converted.residual[name], tensor), name
        else:
            rebuilt = product(converted, name.removesuffix(".weight")).reshape(tensor.shape)
            torch.testing.assert_close(rebuilt, tensor.double(), rtol=0, atol=2e-6)
    assert converted.report.relative_error < 1e-5 and converted.report.energy == pytest.approx(1.0)
    assert {layer.note for layer in converted.report.layers} == {"clipped from 10000"}
    assert all(layer.rank == layer.full_rank for layer in converted.report.layers)


def test_layers_go_into_the_lora_and_the_rest_stays_beside_it(delta: dict[str, Tensor]) -> None:
    model = tiny_sdxl_unet()
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    embeddings = {name for name in layers if name.startswith(("time_embedding", "add_embedding"))}
    assert len(embeddings) == 4
    converted = delta_to_lora(delta, rank=2)
    assert {layer.name for layer in converted.report.layers} == layers - embeddings
    names = {name.removeprefix("unet.").split(".lora_")[0] for name in converted.lora}
    assert names == layers - embeddings
    assert {f"{name}.weight" for name in embeddings} <= set(converted.residual)
    assert converted.lora[f"unet.{CONV}.lora_A.weight"].shape == (2, 16, 3, 3)
    assert converted.lora[f"unet.{CONV}.lora_B.weight"].shape == (16, 2, 1, 1)
    kept = delta_to_lora(delta, rank=2, keep=["conv_in", "*.attn2.to_k"])
    more = set(kept.residual) - set(converted.residual)
    assert "conv_in.weight" in more and len(more) == 1 + sum(name.endswith("attn2.to_k") for name in layers)
    assert not [name for name in kept.lora if "conv_in" in name or "attn2.to_k" in name]


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 0, 1)])
def test_peft_multiplies_a_pair_of_convolutions_to_the_same_kernel(stride: int, padding: int, kernel: int) -> None:
    shape = (5, 6, kernel, kernel)
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    converted = delta_to_lora({f"{CONV}.weight": change}, rank=3, dtype=torch.float32)
    model: Any = nn.Sequential(nn.Conv2d(6, 5, kernel, stride=stride, padding=padding))
    plain = model[0].weight.detach().clone()
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=["0"]), model)
    for side in "AB":
        getattr(model[0], f"lora_{side}")["default"].weight.data = converted.lora[f"unet.{CONV}.lora_{side}.weight"]
    expected = product(converted, CONV).float().reshape(shape)
    torch.testing.assert_close(model[0].get_delta_weight("default"), expected)
    picture = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    direct = nn.functional.conv2d(picture, plain + expected, model[0].base_layer.bias, stride, padding)
    torch.testing.assert_close(model(picture), direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95])
def test_energy_gives_each_layer_the_least_rank_that_keeps_it(delta: dict[str, Tensor], energy: float) -> None:
    report = delta_to_lora(delta, energy=energy).report
    assert len({layer.rank for layer in report.layers}) > 2
    for layer in report.layers:
        values = torch.linalg.svdvals(delta[f"{layer.name}.weight"].flatten(1).double()).square()
        kept = values.cumsum(0) / values.sum()
        assert kept[layer.rank - 1] >= energy - 1e-6, layer
        assert layer.rank == 1 or kept[layer.rank - 2] < energy + 1e-6, layer
        assert layer.energy == pytest.approx(float(kept[layer.rank - 1]), abs=1e-5)
        assert layer.note == ""


def test_max_rank_bounds_energy_and_nothing_else(delta: dict[str, Tensor]) -> None:
    report = delta_to_lora(delta, energy=0.99, max_rank=5).report
    assert max(layer.rank for layer in report.layers) == 5
    stopped = [layer for layer in report.layers if layer.note]
    assert {layer.note for layer in stopped} == {"stopped at max_rank=5"}
    assert {layer.name for layer in stopped} == {layer.name for layer in report.layers if layer.energy < 0.99}
    assert {layer.rank for layer in delta_to_lora(delta, rank=7, max_rank=2).report.layers} == {7, 4}  # conv_out has 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_deltas_of_any_floating_type_are_factorised(delta: dict[str, Tensor], dtype: torch.dtype) -> None:
    own = {name: tensor.to(dtype) for name, tensor in delta.items()}
    wide = {name: tensor.float() for name, tensor in own.items()}
    for layer, other in zip(
        delta_to_lora(own, rank=4).report.layers, delta_to_lora(wide, rank=4).report.layers, strict=True
    ):
        assert layer.relative_error == pytest.approx(other.relative_error, rel=1e-3, abs=1e-4)


def test_embeddings_stay_in_full() -> None:
    embeddings = ("time_embedding.linear_1", "add_embedding.linear_2", "class_embedding", "class_embedding.linear_1")
    delta = {f"{name}.weight": torch.ones(4, 4) for name in (*embeddings, SQUARE)}
    assert set(delta_to_lora(delta, rank=1).residual) == {f"{name}.weight" for name in embeddings}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_report_is_of_the_factors_as_they_are_stored(delta: dict[str, Tensor], dtype: torch.dtype) -> None:
    converted = delta_to_lora(delta, rank=6, dtype=dtype)
    report = converted.report
    assert {tensor.dtype for tensor in (*converted.lora.values(), *converted.residual.values())} == {dtype}
    lost, whole = 0.0, sum(float(tensor.double().square().sum()) for tensor in delta.values())
    for layer in report.layers:
        change = delta[f"{layer.name}.weight"].flatten(1).double()
        error = float((change - product(converted, layer.name)).square().sum())
        assert layer.relative_error == pytest.approx((error / float(change.square().sum())) ** 0.5, rel=1e-3, abs=1e-5)
        lost += error
    assert report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert report.energy == pytest.approx(1 - lost / sum(layer.squared_norm for layer in report.layers), abs=2e-3)
    assert report.parameters == sum(tensor.numel() for tensor in converted.lora.values())
    assert report.residual_parameters == sum(tensor.numel() for tensor in converted.residual.values())
    assert report.delta_parameters == sum(tensor.numel() for tensor in delta.values())


def test_the_report_is_one_line_of_text(delta: dict[str, Tensor]) -> None:
    report = delta_to_lora(delta, rank=6).report
    assert "rank 4 to 6" in str(report) and "1 layers of another rank" in str(report) and "\n" not in str(report)
    assert [layer.name for layer in report.layers if layer.note] == ["conv_out"]


def test_a_layer_that_does_not_change_is_left_out() -> None:
    delta = {f"{SQUARE}.weight": torch.zeros(4, 4), "conv_out.weight": torch.ones(4, 2, 3, 3)}
    converted = delta_to_lora(delta, rank=2)
    assert set(converted.lora) == {"unet.conv_out.lora_A.weight", "unet.conv_out.lora_B.weight"}
    unchanged = converted.report.layers[0]
    assert (unchanged.rank, unchanged.relative_error, unchanged.note) == (0, 0.0, "not changed")
    assert not converted.residual
    assert delta_to_lora(delta, energy=1.0).report.layers[1].rank == 1  # all ones


class OneAtATime(Mapping[str, Tensor]):
    """Hands out copies and notes how many of them are held at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._given: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].clone()
        self._given = [reference for reference in self._given if reference() is not None]
        self._given.append(weakref.ref(tensor))
        self.most = max(self.most, len(self._given))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_a_delta_is_read_one_tensor_at_a_time(delta: dict[str, Tensor]) -> None:
    watched = OneAtATime(delta)
    delta_to_lora(watched, rank=2)
    assert 1 <= watched.most <= 2  # a loop variable lives until the next value is there


def test_a_file_gives_the_same_and_its_recipe(delta: dict[str, Tensor], tmp_path: Path) -> None:
    recipe = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=4, guidance_scale=1.5)
    path = tmp_path / "delta.safetensors"
    save_file(delta, path, metadata={"format": "pt", **recipe.to_metadata()})
    given, read = delta_to_lora(delta, rank=3, recipe=recipe), delta_to_lora(path, rank=3)
    assert read.recipe == given.recipe == recipe
    for one, other in ((read.lora, given.lora), (read.residual, given.residual)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert delta_to_lora(path, rank=3, recipe=DeltaRecipe()).recipe == DeltaRecipe()


@pytest.mark.parametrize("layout", ["folder", "variant", "shards", "wrapped", "original", "mapping", "difference"])
def test_a_delta_in_any_layout_gives_the_same(delta: dict[str, Tensor], tmp_path: Path, layout: str) -> None:
    unet = tiny_sdxl_unet(0)
    config: Any = None
    given: Any = tmp_path
    unet.load_state_dict(delta)
    if layout in ("folder", "variant", "shards"):
        unet.save_pretrained(
            tmp_path,
            variant=None if layout == "folder" else "v0-1",
            max_shard_size="100KB" if layout == "shards" else "1GB",
        )
    elif layout == "wrapped":
        given = tmp_path / "delta.safetensors"
        save_file({f"module._orig_mod.{name}": tensor for name, tensor in delta.items()}, given)
    elif layout == "difference":
        for seed in (0, 1):
            tiny_sdxl_unet(seed).save_pretrained(tmp_path / str(seed))
        given = open_difference(tmp_path / "1", tmp_path / "0")
    else:
        given, config = unet_keys(unet), unet.config
        if layout == "original":
            save_file(given, tmp_path / "delta.safetensors")
            given = tmp_path / "delta.safetensors"
        with pytest.raises(ValueError, match="pass config= with the UNet's configuration"):
            delta_to_lora(given, rank=2)
    expected, read = delta_to_lora(delta, rank=2), delta_to_lora(given, rank=2, config=config)
    for one, other in ((read.lora, expected.lora), (read.residual, expected.residual)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_whole_weights_and_loras_make_no_lora(delta: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="a model's whole weights, not their difference from a base"):
        delta_to_lora(tiny_sdxl_unet(0).state_dict(), rank=2)
    with pytest.raises(ValueError, match=r"is a LoRA .*load_lora_weights"):
        delta_to_lora(delta_to_lora(delta, rank=2).lora, rank=2)


GOOD = {f"{SQUARE}.weight": torch.ones(4, 4), f"{SQUARE}.bias": torch.ones(4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": 2.5}, r"rank=2\.5"),
        ({"rank": True}, "rank=True"),
        ({"energy": 0.0}, r"energy=0\.0"),
        ({"energy": 1.01}, r"energy=1\.01"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"energy": 0.5, "max_rank": 0}, "max_rank=0"),
        ({"rank": 2, "dtype": torch.int8}, "int8"),
        ({"rank": 2, "device": "nowhere"}, "nowhere"),
        ({"rank": 2, "keep": "conv_in"}, r"keep=\['conv_in'\]"),
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
        ({"text_model.encoder.layers.0.weight": torch.ones(2, 2)}, "not weights of a UNet .*text_model"),
        (
            {**GOOD, f"unet.{SQUARE}.weight": torch.ones(2, 2)},
            rf"not weights of a UNet \(unet\.{SQUARE}",
        ),
        ({**GOOD, "conv_in.weight": torch.full((2, 2, 1, 1), torch.nan)}, r"not finite \(conv_in\.weight\)"),
        ({**GOOD, "conv_in.bias": torch.tensor([torch.inf])}, r"not finite \(conv_in\.bias\)"),
        ({"conv_in.weight": torch.ones(2, 2, 1, 1, dtype=torch.int64)}, "no floating-point tensors"),
        ({f"{SQUARE}.bias": torch.ones(4)}, "no linear or convolution layer"),
        ({f"{SQUARE}.weight": torch.zeros(4, 4)}, "no linear or convolution layer"),
        ({f"{SQUARE}.weight": torch.full((4, 4), 1e12)}, rf"{SQUARE}\.lora_.* too large for torch\.float16"),
        ({**GOOD, f"{SQUARE}.bias": torch.full((4,), 1e5)}, rf"{SQUARE}\.bias is too large"),
        ([torch.ones(2)], "delta=list"),
    ],
)
def test_deltas_that_are_refused(delta: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        delta_to_lora(delta, rank=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "directory", "truncated", "text"])
def test_files_that_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "delta.safetensors"
    if kind == "directory":
        path.mkdir()
    elif kind == "truncated":
        save_file(GOOD, path)
        path.write_bytes(path.read_bytes()[:-4])
    elif kind == "text":
        path.write_text("a delta")
    with pytest.raises(ValueError, match=r"delta\.safetensors") as caught:
        delta_to_lora(path, rank=2)
    assert "\n" not in str(caught.value)
