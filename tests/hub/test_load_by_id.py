"""Workflows that were pushed to the loopback Hub, loaded by id in processes of their own."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perflow_blocks import export_workflow, extract_delta
from perflow_blocks.blocks.workflows import PeRFlowSDXLImage2ImageBlocks, PeRFlowSDXLText2ImageBlocks
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.hub.push import push_workflow
from perflow_blocks.testing import tiny_picture, tiny_sdxl_unet
from tests.conftest import python, run
from tests.hub.loopback import LoopbackHub

REPO, OTHER = "someone/workflow", "someone/other"
ROOT = Path(__file__).parent.parent.parent

PLAIN = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import perflow_blocks
except ImportError:
    pass
else:
    raise SystemExit("perflow_blocks can be imported")
import torch
from diffusers import ModularPipeline
from PIL import Image
from safetensors.torch import save_file

results = {}
for repository, image in ((sys.argv[3], None), (sys.argv[4], Image.open(sys.argv[5]))):
    pipe = ModularPipeline.from_pretrained(repository, trust_remote_code=True)
    assert type(pipe.blocks).__module__.startswith("diffusers_modules.local.someone--"), type(pipe.blocks)
    pipe.load_components()
    assert pipe.null_component_names == [], pipe.null_component_names
    given = {} if image is None else {"image": image, "strength": 0.8}
    generator = torch.Generator().manual_seed(0)
    given |= {"prompt": "a red star", "generator": generator, "output_type": "latent"}
    results[repository] = pipe(output="images", **given).contiguous()
    del pipe
    assert not [name for name in sys.modules if name.startswith("perflow_blocks")]
save_file(results, sys.argv[2])
"""

LOADER = """
import json, sys
from pathlib import Path
import torch
from diffusers import ModularPipeline
from safetensors.torch import save_file
from perflow_blocks import load_workflow
from perflow_blocks.blocks.merge_delta import delta_path

repository, commit, out = sys.argv[1:]
results, report = {}, {}

def draw(name, **options):
    pipe = load_workflow(repository, trust_remote_code=True, **options)
    generator = torch.Generator().manual_seed(0)
    given = {"prompt": "a red star", "generator": generator, "output_type": "latent"}
    results[name] = pipe(output="images", **given).contiguous()
    report[name] = pipe.config["num_time_windows"]

draw("first", revision=commit)
draw("tag", revision="v1")
draw("main")
for name, options in {"offline first": {"revision": commit}, "offline main": {}}.items():
    draw(name, local_files_only=True, **options)
plain = ModularPipeline.from_pretrained(repository, revision=commit, trust_remote_code=True)
report["delta"] = Path(delta_path(None, plain)).read_bytes().hex()

def refusal(source, **options):
    try:
        load_workflow(source, **options)
    except ValueError as error:
        return str(error)

report["untrusted"] = refusal(repository)
report["revision"] = refusal(repository, revision="nonesuch", trust_remote_code=True)
for name in ("missing", "private", "gated"):
    report[name] = refusal(f"owner/{name}", trust_remote_code=True)
report["not cached"] = refusal("owner/missing", trust_remote_code=True, local_files_only=True)
save_file(results, out)
print("REPORT" + json.dumps(report))
"""


def loaded_from(repository: Path, blocks: Any, **components: Any) -> Any:
    pipe = blocks.init_pipeline(str(repository))
    pipe.load_components()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def published(hub: LoopbackHub, directory: Path, repo_id: str) -> str:
    commit = push_workflow(directory, repo_id, endpoint=hub.endpoint, token=hub.token).commit
    assert commit is not None
    return commit


def test_self_contained_workflows_load_by_id_without_this_package(
    loopback_hub: LoopbackHub, repository: Path, tmp_path: Path
) -> None:
    text = loaded_from(repository, PeRFlowSDXLText2ImageBlocks(), num_time_windows=2)
    picture = loaded_from(repository, PeRFlowSDXLImage2ImageBlocks())
    tiny_picture(1).save(tmp_path / "given.png")
    expected = {REPO: run(text), OTHER: run(picture, image=tiny_picture(1), strength=0.8)}
    for repo_id, pipe in ((REPO, text), (OTHER, picture)):
        directory = export_workflow(pipe, tmp_path / "exports" / repo_id, weights="include")
        published(loopback_hub, directory, repo_id)
        index = json.loads(loopback_hub.files(repo_id)["modular_model_index.json"])
        assert index["unet"][2]["pretrained_model_name_or_path"] == repo_id
    out, script = tmp_path / "out.safetensors", tmp_path / "plain.py"
    script.write_text(PLAIN)
    packages = sysconfig.get_paths()["purelib"]
    # -S leaves out .pth files, by which this package is found where it is installed for development.
    python(
        "-S", script, packages, out, REPO, OTHER, tmp_path / "given.png",
        environment={**loopback_hub.environment(tmp_path / "home"), "PYTHONPATH": ""}, cwd=tmp_path,
    )  # fmt: skip
    found = load_file(out)
    assert found.keys() == expected.keys()
    for repo_id, latents in expected.items():
        assert torch.equal(found[repo_id], latents), repo_id


@pytest.fixture
def deltas(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    for number, path in enumerate(paths, start=1):
        base = tiny_sdxl_unet()
        recipe = DeltaRecipe(num_inference_steps=4, guidance_scale=1.0)
        save_delta(extract_delta(tiny_sdxl_unet(number), base), path, recipe, torch.float32)
    return paths


def test_a_revision_holds_for_code_weights_and_delta_also_offline(
    loopback_hub: LoopbackHub, repository: Path, deltas: list[Path], tmp_path: Path
) -> None:
    hub, expected, commits = loopback_hub, [], []
    for number, delta in enumerate(deltas):
        pipe = loaded_from(repository, PeRFlowSDXLText2ImageBlocks(), num_time_windows=number + 1, delta=str(delta))
        with torch.no_grad():
            pipe.unet.conv_in.bias.add_(number)  # weights of its own
        directory = export_workflow(
            pipe, tmp_path / "flow", mode="thin", weights="include", overwrite=True, repo_id=REPO
        )
        expected.append(run(pipe))
        commits.append(published(hub, directory, REPO))
    assert not torch.equal(*expected)
    hub.tag(REPO, "v1", commits[0])
    hub.create("owner/private", {"a.txt": b"a"}, private=True)
    hub.create("owner/gated", {"a.txt": b"a"}, gated=True)
    out, script = tmp_path / "out.safetensors", tmp_path / "loader.py"
    script.write_text(LOADER)
    environment = {**hub.environment(tmp_path / "home", token=hub.other_token), "PYTHONPATH": str(ROOT)}
    printed = python(script, REPO, commits[0], out, environment=environment, cwd=tmp_path)
    report, found = json.loads(printed.split("REPORT")[1]), load_file(out)
    for name, number in {"first": 0, "tag": 0, "main": 1, "offline first": 0, "offline main": 1}.items():
        assert report[name] == number + 1, name
        assert torch.equal(found[name], expected[number]), name
    assert bytes.fromhex(report["delta"]) == deltas[1].read_bytes()
    assert "someone/workflow runs code of its own: block.py" in report["untrusted"]
    assert "has no revision 'nonesuch'" in report["revision"]
    assert "owner/missing is not found" in report["missing"] and "owner/private is not found" in report["private"]
    assert "owner/gated is gated" in report["gated"]
    assert "owner/missing is not in the cache" in report["not cached"]
