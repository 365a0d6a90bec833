"""Delta arithmetic and delta files: a merge is right to the last rounding, and a wrong file changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from perflow_blocks.delta.extract import extract_delta, save_delta
from perflow_blocks.delta.merge import merge_delta, merge_record, merge_records, unmerge_delta
from perflow_blocks.delta.recipe import DeltaRecipe

pytestmark = pytest.mark.behaviour

RECIPE = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=4)


def network(seed: int, *, dtype: torch.dtype = torch.float32, width: int = 8) -> nn.Sequential:
    """Two layers and a buffer; all values are multiples of 2^-10 below 4, so that float32 differences are exact."""
    module = nn.Sequential(nn.Linear(width, 16), nn.Linear(16, 4, bias=False))
    module.register_buffer("running", torch.zeros(3))
    module.register_buffer("count", torch.tensor(seed))
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randint(-4096, 4096, tensor.shape, generator=generator) / 1024)
    return module.to(dtype)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.fixture
def delta_file(tmp_path: Path) -> Path:
    path = tmp_path / "delta.safetensors"
    save_delta(extract_delta(network(1), network(0)), path, RECIPE, dtype=torch.float32)
    return path


def test_a_file_that_was_written_to_is_refused(delta_file: Path, tmp_path: Path) -> None:
    model, content = network(0), delta_file.read_bytes()
    merge_delta(model, delta_file)
    before = values(model)
    save_delta(extract_delta(network(2), network(0)), tmp_path / "other.safetensors")
    delta_file.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(ValueError, match="was written to since"):
        unmerge_delta(model)
    assert_same(model, before)
    delta_file.unlink()  # a new file in the place of the one that stays open
    delta_file.write_bytes(content)
    assert merge_delta(model, delta_file).digest == merge_records(model)[0].digest
    assert_same(model, before)


def _without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda delta: delta.pop(name)


def _with(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda delta: delta.__setitem__(name, torch.zeros(*shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("0.bias"), r"1 missing from the file \(0\.bias\)"),
        (_with("2.weight", 3), r"1 unexpected, not in the model \(2\.weight\)"),
        (_with("1.weight", 4, 15), r"1 of another shape \(1\.weight is \[4, 15\] instead of \[4, 16\]\)"),
        (_with("1.weight", 16, 4), r"is \[16, 4\] instead of \[4, 16\]"),
    ],
)
def test_a_delta_of_another_architecture_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    path, model = tmp_path / "delta.safetensors", network(0)
    delta = extract_delta(network(1), model)
    change(delta)
    save_delta(delta, path)
    before = values(model)
    with pytest.raises(ValueError, match=message) as caught:
        merge_delta(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same(model, before)
    assert merge_record(model) is None


def test_a_partial_delta_leaves_the_rest_alone(tmp_path: Path) -> None:
    path, model = tmp_path / "delta.safetensors", network(0)
    delta = {"0.bias": extract_delta(network(1), model)["0.bias"]}
    save_delta(delta, path)
    with pytest.raises(ValueError, match="3 missing"):
        merge_delta(model, path)
    save_delta(delta, path, partial=True)
    merge_delta(model, path)
    expected = values(network(0))
    expected["0.bias"] += delta["0.bias"].half()  # the file's type
    assert_same(model, expected)


def test_offloaded_and_quantized_weights_are_refused(delta_file: Path) -> None:
    with pytest.raises(ValueError, match="merge before enabling offload"):
        merge_delta(network(0).to("meta"), delta_file)
    quantized = network(0)
    quantized[1].weight = nn.Parameter(torch.zeros(4, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantized .*\(1\.weight\)"):
        merge_delta(quantized, delta_file)


def test_extraction_wants_a_pair() -> None:
    with pytest.raises(ValueError, match=r"do not match: .*0\.weight is \[16, 8\] instead of \[16, 9\]"):
        extract_delta(network(0), network(1, width=9))
    state = network(1).state_dict()
    del state["0.bias"]
    with pytest.raises(ValueError, match=r"1 missing from the student \(0\.bias\)"):
        extract_delta(state, network(0))
    same = extract_delta(network(1), network(0).state_dict())
    assert all(torch.equal(same[k], v) for k, v in extract_delta(network(1).state_dict(), network(0)).items())
