"""What `export_workflow` refuses, all at once and before it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, ControlNetModel
from diffusers.models import MultiControlNetModel

from perflow_blocks import PeRFlowSDXLAutoBlocks, export_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from perflow_blocks.testing import load_tiny_ip_adapter, tiny_controlnet, tiny_image_encoder
from tests.hub.conftest import hub_entry, referring_pipeline, tiny_pipeline


class OwnGuidance(ClassifierFreeGuidance):
    """A guider that is nowhere but here."""


class OwnControlNet(ControlNetModel):
    """A model that is nowhere but here."""


def refused(given: Any, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        export_workflow(given, tmp_path / "no", **{"mode": "thin", **options})
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))
    return str(caught.value)


def test_local_weights_are_refused_by_reference_all_at_once(tmp_path: Path, repository: Path) -> None:
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository))
    text = refused(pipe, tmp_path)
    assert text.startswith("nothing was exported: ") and "pass weights='include'" in text
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    assert f"{repository}, where {', '.join(sorted(names, key=text.index))} came from" in text
    pipe.load_components("vae")
    pipe.update_components(unet=tiny_pipeline().unet)
    text = refused(pipe, tmp_path)
    assert "for 2 reasons" in text and "unet was put in as an object" in text
    assert "is not loaded, so that its weights cannot be included" in refused(pipe, tmp_path, weights="include")


@pytest.mark.parametrize("location", ["./model", "model", "C:\\models\\sdxl", "/srv/model", "~/model", "a/b/c"])
def test_a_source_that_is_no_repository_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    index = {"unet": hub_entry("UNet2DConditionModel", location)}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    assert "is a place that others do not have" in refused(pipe, tmp_path)


@pytest.mark.parametrize("repo_id", ["../x y", "mine", "a/b/c", ""])
def test_a_name_of_no_repository_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_id: str
) -> None:
    monkeypatch.delattr("perflow_blocks.hub.export.make_plan")
    text = refused(PeRFlowSDXLText2ImageBlocks(), tmp_path, repo_id=repo_id)
    assert repr(repo_id) in text and text.endswith("pass owner/name.")


def test_what_no_index_can_name_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PeRFlowSDXLAutoBlocks(), image_encoder=tiny_image_encoder())
    pipe.update_components(controlnet=OwnControlNet.from_config(tiny_controlnet().config))
    pipe.update_components(guider=OwnGuidance(guidance_scale=3.0))
    load_tiny_ip_adapter(pipe)
    text = refused(pipe, tmp_path, weights="include")
    for part in ("OwnControlNet, which no index can name", "OwnGuidance, which no index", "unet has an IP-Adapter"):
        assert part in text
    pipe = tiny_pipeline(PeRFlowSDXLAutoBlocks())
    pipe.register_components(controlnet=MultiControlNetModel([tiny_controlnet(), tiny_controlnet(1)]))
    assert "controlnet holds several models" in refused(pipe, tmp_path, weights="include")
    pipe = tiny_pipeline(PeRFlowSDXLText2ImageBlocks())
    pipe.unet.to("meta")
    assert "unet has weights without values" in refused(pipe, tmp_path, weights="include")


def test_a_lora_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline(PeRFlowSDXLText2ImageBlocks())
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_q"]), adapter_name="style")
    assert "unet has the LoRA style" in refused(pipe, tmp_path, weights="include")


def test_values_that_others_cannot_read_are_refused(tmp_path: Path) -> None:
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline()
    pipe.update_components(default_num_inference_steps="/srv/layout", force_zeros_for_empty_prompt=torch.zeros(1))
    text = refused(pipe, tmp_path)
    assert "default_num_inference_steps='/srv/layout' is a path" in text and "is none of JSON" in text
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline()
    pipe.update_components(attention_plan="nonesuch")
    assert "attention strategy 'nonesuch' is unknown" in refused(pipe, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fat"}, "mode='fat' is unknown"),
        ({"weights": "some"}, "weights='some' is unknown; pass one of reference, include, delta-only."),
        ({"weights": "include"}, "blocks have no weights to include"),
        ({"name": "not a name"}, "is no name of a class"),
        ({"picture": "absent.png"}, "picture absent.png cannot be read"),
        ({"files": ["absent.py"]}, "absent.py is no file"),
        ({"files": [__file__, __file__]}, "has a file test_export_refused.py already"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in refused(PeRFlowSDXLText2ImageBlocks(), tmp_path, **options)


def test_what_is_neither_pipeline_nor_blocks_is_refused(tmp_path: Path) -> None:
    assert "is neither a modular pipeline nor blocks" in refused("owner/model", tmp_path)


def test_a_block_that_cannot_be_exported_is_one_of_the_problems(tmp_path: Path) -> None:
    blocks = PeRFlowSDXLText2ImageBlocks()

    class Local(type(blocks.sub_blocks["merge_delta"])):  # type: ignore[misc]
        pass

    blocks.sub_blocks["merge_delta"] = Local()
    assert "Local" in refused(blocks, tmp_path)


def test_a_directory_is_replaced_only_where_that_is_meant_and_loses_nothing(tmp_path: Path) -> None:
    blocks, target = PeRFlowSDXLText2ImageBlocks(), tmp_path / "out"
    target.mkdir()
    export_workflow(blocks, target, mode="thin")  # an empty one is as good as none
    with pytest.raises(ValueError, match="pass overwrite=True"):
        export_workflow(blocks, target, mode="thin")
    (target / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"holds files that no export wrote \(mine.txt\)"):
        export_workflow(blocks, target, mode="thin", overwrite=True)
    (target / "mine.txt").unlink()
    export_workflow(blocks, target, mode="thin", overwrite=True, title="Another")
    assert "# Another" in (target / "README.md").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for path in (other, other / "thesis.tex"):
        with pytest.raises(ValueError, match="is no workflow repository"):
            export_workflow(blocks, path, mode="thin", overwrite=True)
    assert (other / "thesis.tex").read_text() == "years of work"


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(PeRFlowSDXLText2ImageBlocks())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(pipe.vae, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        export_workflow(pipe, tmp_path / "out", mode="thin", weights="include")
    assert list(tmp_path.iterdir()) == []
