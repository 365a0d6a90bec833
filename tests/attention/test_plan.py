"""An attention plan: its three forms, which of its entries holds for a module, and every mistake in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from perflow_blocks.attention.plan import AttentionPlace, parse_plan

DOWN = "down_blocks.1.attentions.0.transformer_blocks.0"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"


def place(name: str, model: str = "unet") -> AttentionPlace:
    kind: Any = "cross" if name.endswith("attn2") else "self"
    return AttentionPlace(component=model.split(".")[0], model=model, name=name, kind=kind)


@pytest.mark.parametrize("empty", [None, {}, []])
def test_nothing_asked_for_is_no_plan(empty: Any) -> None:
    assert parse_plan(empty) is None


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("plan", "entries"),
    [
        ("sliced", ["self=sliced", "cross=sliced"]),
        ({"self": "sliced"}, ["self=sliced"]),
        (["cross=flex"], ["cross=flex"]),
        (("cross=flex",), ["cross=flex"]),
        (["unet.mid_block.* = flex"], ["unet.mid_block.*=flex"]),
        (
            {"mid_block.*": "native", "self": "sliced", "cross": "flex"},
            "self=sliced cross=flex mid_block.*=native".split(),
        ),
        (["self=sliced", "self=flex"], ["self=flex"]),
        (["b.*=sliced", "a.*=flex"], ["b.*=sliced", "a.*=flex"]),
    ],
)
def test_every_form_becomes_the_list_that_an_index_holds(plan: Any, entries: list[str]) -> None:
    parsed = parse_plan(plan)
    assert parsed is not None
    assert parsed.as_list() == entries
    assert parse_plan(entries) == parsed


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("plan", "attn1", "attn2"),
    [
        ("sliced", "sliced", "sliced"),
        ({"self": "sliced"}, "sliced", None),
        ({"cross": "flex"}, None, "flex"),
        ({"mid_block.*": "flex", "self": "sliced"}, "flex", "flex"),  # a pattern overrules a kind that comes later
        ({"mid_block.*": "flex", "*.attn1": "sliced"}, "sliced", "flex"),  # the last pattern wins
        ({"*.attn1": "sliced", "mid_block.*": "flex"}, "flex", "flex"),
        ({"unet.mid_block.*.attn2": "flex"}, None, "flex"),
        ({"controlnet.*": "flex", "self": "sliced"}, "sliced", None),
        ({"up_blocks.*": "flex"}, None, None),
        ({MIDDLE + ".attn1": "flex"}, "flex", None),
        ({"mid_block.attentions.[0-3].*": "flex"}, "flex", "flex"),
        ({"block.*": "flex"}, None, None),  # a pattern means the whole name
    ],
)
def test_what_a_plan_asks_of_a_module(plan: Any, attn1: str | None, attn2: str | None) -> None:
    parsed = parse_plan(plan)
    assert parsed is not None
    assert parsed.strategy_for(place(f"{MIDDLE}.attn1")) == attn1
    assert parsed.strategy_for(place(f"{MIDDLE}.attn2")) == attn2


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("controlnet.nets.0.*", True),
        ("controlnet.nets.1.*", False),
        ("controlnet.mid_block.*", True),
        ("controlnet.*", True),
        ("mid_block.*", True),
        ("unet.*", False),
        ("*.attn2", False),
    ],
)
def test_one_of_several_controlnets_is_meant_by_its_number_or_with_all(pattern: str, found: bool) -> None:
    assert place(f"{MIDDLE}.attn1", "controlnet.nets.0").matches(pattern) is found


@pytest.mark.behaviour
def test_a_pattern_that_means_no_module_is_refused_with_names_that_there_are() -> None:
    places = [place(f"{DOWN}.attn1"), place(f"{DOWN}.attn2"), place(f"{MIDDLE}.attn1")]
    for pattern in ("up_blocks.*", "unet.midblock.*", "controlnett.*"):
        plan = parse_plan({"self": "native", pattern: "native"})
        assert plan is not None
        with pytest.raises(ValueError, match="no attention module has such a name") as caught:
            plan.require_places(places, ["unet", "controlnet"])
        assert repr(pattern) in str(caught.value)
        assert f"such as 'unet.{DOWN}.attn1' or 'unet.{DOWN}.attn2'" in str(caught.value)


def test_what_is_said_of_a_component_that_is_not_at_hand_is_left_for_later() -> None:
    plan = parse_plan({"controlnet.mid_block.*": "native"})
    assert plan is not None
    places = [place(f"{MIDDLE}.attn1")]
    plan.require_places(places, ["unet"])
    with pytest.raises(ValueError, match=r"controlnet\.mid_block"):
        plan.require_places(places, ["unet", "controlnet"])


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("nonsense", "strategy 'nonsense' is unknown; pass one of native, "),
        ({"self": "nonsense"}, "strategy 'nonsense' is unknown"),
        (["cross=sage", "mid_block.*=sagee"], "strategy 'sagee' is unknown"),
        ({"selff": "native"}, "the key 'selff' is wrong .* pass 'self' or 'cross', or a pattern such as 'mid_block"),
        (["=native"], r"the entry \('', 'native'\) is wrong"),
        ({"self": None}, r"the entry \('self', None\) is wrong"),
        ({"self": ""}, r"the entry \('self', ''\) is wrong"),
        ({1: "native"}, r"the entry \(1, 'native'\) is wrong"),
        ("self=native", r"a string names one strategy for all; pass \['self=native'\]"),
        (["native"], "neither a strategy's name, nor a mapping .* nor a list"),
        ([("self", "native")], "neither a strategy's name, nor a mapping"),
        (7, "attention plan: 7 is wrong"),
    ],
)
def test_mistakes_are_told_in_one_sentence(plan: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_plan(plan)
    assert "\n" not in str(caught.value)
