"""An attention plan: its three forms, which of its entries counts for a module, and mistakes in it."""

from __future__ import annotations

from typing import Any

import pytest

from perflow_blocks.attention.config import AttentionPlace, AttentionPlan, parse_plan

pytestmark = pytest.mark.behaviour
DOWN = "down_blocks.1.attentions.0.transformer_blocks.0"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"


def parsed(plan: Any) -> AttentionPlan:
    result = parse_plan(plan)
    assert result is not None
    return result


def place(name: str, model: str = "unet") -> AttentionPlace:
    return AttentionPlace(model, name, "cross" if name.endswith("attn2") else "self")


@pytest.mark.parametrize(
    ("plan", "entries"),
    [
        ("sliced", ["self=sliced", "cross=sliced"]),
        ({"self": "sliced"}, ["self=sliced"]),
        (["unet.mid_block.* = flex"], ["unet.mid_block.*=flex"]),
        (
            {"mid_block.*": "native", "self": "sliced", "cross": "flex"},
            ["self=sliced", "cross=flex", "mid_block.*=native"],
        ),
        (["self=sliced", "self=flex"], ["self=flex"]),
    ],
)
def test_every_form_becomes_the_list_that_an_index_holds(plan: Any, entries: list[str]) -> None:
    assert parsed(plan).as_list() == entries
    assert parse_plan(entries) == parse_plan(plan)


def test_nothing_asked_for_is_no_plan() -> None:
    assert parse_plan(None) is parse_plan({}) is parse_plan([]) is None


@pytest.mark.parametrize(
    ("plan", "attn1", "attn2"),
    [
        ("sliced", "sliced", "sliced"),
        ({"self": "sliced"}, "sliced", None),
        ({"mid_block.*": "flex", "self": "sliced"}, "flex", "flex"),  # a pattern overrules a kind that comes later
        ({"mid_block.*": "flex", "*.attn1": "sliced"}, "sliced", "flex"),  # the last pattern wins
        ({"*.attn1": "sliced", "mid_block.*": "flex"}, "flex", "flex"),
        ({"unet.mid_block.*.attn2": "flex"}, None, "flex"),
        ({"controlnet.*": "flex", "self": "sliced"}, "sliced", None),
        ({"mid_block.attentions.[0-3].*": "flex"}, "flex", "flex"),
        ({"block.*": "flex"}, None, None),  # a pattern means the whole name
    ],
)
def test_what_a_plan_asks_of_a_module(plan: Any, attn1: str | None, attn2: str | None) -> None:
    assert parsed(plan).asks(place(f"{MIDDLE}.attn1")) == attn1
    assert parsed(plan).asks(place(f"{MIDDLE}.attn2")) == attn2


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("controlnet.nets.0.*", True),
        ("controlnet.nets.1.*", False),
        ("controlnet.*", True),
        ("unet.*", False),
        ("*.attn2", False),
    ],
)
def test_one_of_several_controlnets_is_meant_by_its_number_or_with_all(pattern: str, found: bool) -> None:
    assert place(f"{MIDDLE}.attn1", "controlnet.nets.0").matches(pattern) is found


@pytest.mark.parametrize("pattern", ["selff", "up_blocks.*", "unet.midblock.*", "controlnett.*"])
def test_a_pattern_that_matches_no_module_is_refused_with_names_that_there_are(pattern: str) -> None:
    places = [place(f"{DOWN}.attn1"), place(f"{DOWN}.attn2"), place(f"{MIDDLE}.attn1")]
    with pytest.raises(ValueError, match="matches no attention module") as caught:
        parsed({"self": "native", pattern: "native"}).check(places, ["unet", "controlnet"])
    assert repr(pattern) in str(caught.value)
    assert f"such as 'unet.{DOWN}.attn1' or 'unet.{DOWN}.attn2'" in str(caught.value)


def test_a_pattern_for_a_component_that_is_not_in_use_is_not_checked() -> None:
    plan, places = parsed({"controlnet.mid_block.*": "native"}), [place(f"{MIDDLE}.attn1")]
    plan.check(places, ["unet"])
    with pytest.raises(ValueError, match=r"controlnet\.mid_block"):
        plan.check(places, ["unet", "controlnet"])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("nonsense", "strategy 'nonsense' is unknown; choose one of native, "),
        ({"self": "nonsense"}, "strategy 'nonsense' is unknown"),
        (["cross=sage", "mid_block.*=sagee"], "strategy 'sagee' is unknown"),
        ({"self": None}, "strategy None is unknown"),
        (["native"], r"plan=\['native'\] must be .* a mapping .* or a list"),
        (7, "attention plan=7 must be"),
    ],
)
def test_mistakes_are_told_in_one_sentence(plan: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_plan(plan)
    assert "\n" not in str(caught.value)
