"""Workflows that were pushed to the loopback Hub, loaded by id in processes of their own."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perflow_blocks import export_workflow, extract_delta, push_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing import tiny_sdxl_unet
from tests.conftest import python, run
from tests.hub.loopback import LoopbackHub

REPO = "someone/work.flow"
ROOT = Path(__file__).parent.parent.parent

DRAW = """
import json, logging, sys
from pathlib import Path
import torch
from safetensors.torch import save_file

repository, out, *commits = sys.argv[1:]
results, report = {}, {}

def draw(name, pipe):
    given = {"prompt": "a red star", "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    results[name] = pipe(output="images", **given).contiguous()
    report[name] = [type(pipe.blocks).__name__, pipe.config["num_time_windows"]]
"""
PLAIN = f"""{DRAW}
from diffusers import ModularPipeline
pipe = ModularPipeline.from_pretrained(repository, trust_remote_code=True)
pipe.load_components()
draw("plain", pipe)
assert pipe.null_component_names == [] and not [name for name in sys.modules if name.startswith("perflow_blocks")]
save_file(results, out)
print("REPORT" + json.dumps(report))
"""
LOADER = f"""{DRAW}
from perflow_blocks import load_workflow
from perflow_blocks.blocks.merge_delta import delta_path

warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("perflow_blocks.hub.load").addHandler(handler)

def load(name, **options):
    pipe = load_workflow(repository, trust_remote_code=True, **options)
    assert Path(delta_path(None, pipe)).parent.parent.name == commits[report_of[name]]
    draw(name, pipe)

report_of = {{"first": 0, "tag": 0, "main": 1, "offline first": 0, "offline main": 1}}
load("first", revision=commits[0])
load("tag", revision="v1")
load("main")
load("offline first", local_files_only=True, revision=commits[0])
load("offline main", local_files_only=True)
report["warnings"] = warnings

def refusal(source, **options):
    try:
        load_workflow(source, **options)
    except ValueError as error:
        return str(error)

report["untrusted"] = refusal(repository)
report["revision"] = refusal(repository, revision="nonesuch", trust_remote_code=True)
report["missing"] = refusal("owner/missing")
report["not cached"] = refusal("owner/missing", local_files_only=True)
report["outside"] = refusal("someone/outside")
save_file(results, out)
print("REPORT" + json.dumps(report))
"""


def loaded_from(repository: Path, **components: Any) -> Any:
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository))
    pipe.load_components()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def published(hub: LoopbackHub, directory: Path) -> str:
    commit = push_workflow(directory, REPO, endpoint=hub.endpoint, token=hub.token).commit
    assert commit is not None
    return commit


def drawn(printed: str, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads(printed.split("REPORT")[1]), load_file(out)


def test_a_pushed_workflow_loads_by_id_without_this_package(
    loopback_hub: LoopbackHub, repository: Path, tmp_path: Path
) -> None:
    pipe = loaded_from(repository, num_time_windows=2)
    published(loopback_hub, export_workflow(pipe, tmp_path / "flow", mode="self-contained", weights="include"))
    out, script = tmp_path / "out.safetensors", tmp_path / "plain.py"
    script.write_text(PLAIN)
    # -S leaves out .pth files, by which this package is found where it is installed for development.
    environment = {**loopback_hub.environment(tmp_path / "home"), "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    report, images = drawn(python("-S", script, REPO, out, environment=environment, cwd=tmp_path), out)
    assert report["plain"] == ["PeRFlowSDXLText2ImageBlocks", 2]
    assert torch.equal(images["plain"], run(pipe))


@pytest.fixture
def deltas(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    for number, path in enumerate(paths, start=1):
        recipe = DeltaRecipe(num_inference_steps=4, guidance_scale=1.0)
        save_delta(extract_delta(tiny_sdxl_unet(number), tiny_sdxl_unet()), path, recipe, torch.float32)
    return paths


def test_a_revision_holds_for_code_weights_and_delta_also_offline(
    loopback_hub: LoopbackHub, repository: Path, deltas: list[Path], tmp_path: Path
) -> None:
    hub, expected, commits = loopback_hub, [], []
    for number, delta in enumerate(deltas):
        pipe = loaded_from(repository, num_time_windows=number + 1, delta=str(delta))
        with torch.no_grad():
            pipe.unet.conv_in.bias.add_(number)  # weights of its own
        directory = export_workflow(pipe, tmp_path / f"v{number}", mode="thin", weights="include", name=f"V{number}")
        expected.append(run(pipe))
        commits.append(published(hub, directory))
    assert not torch.equal(*expected)
    hub.repositories[REPO].refs["v1"] = commits[0]
    hub.create("someone/outside", {"modular_model_index.json": b'{"delta": "../x"}'})
    out, script = tmp_path / "out.safetensors", tmp_path / "loader.py"
    script.write_text(LOADER)
    environment = {**hub.environment(tmp_path / "home", token=hub.other_token), "PYTHONPATH": str(ROOT)}
    report, images = drawn(python(script, REPO, out, *commits, environment=environment, cwd=tmp_path), out)
    for name, number in {"first": 0, "tag": 0, "main": 1, "offline first": 0, "offline main": 1}.items():
        assert report[name] == [f"V{number}", number + 1], name
        assert torch.equal(images[name], expected[number]), name
    pinned = [text.split("revision=")[1].split()[0] for text in report["warnings"]]
    assert pinned == [repr(commits[number]) for number in (0, 1, 1)]  # tag, main, offline main
    assert f"{REPO} runs code of its own (block.py)" in report["untrusted"]
    assert "nonesuch" in report["revision"] and "owner/missing is not a directory" in report["missing"]
    assert "load it once with a network" in report["not cached"]
    assert "names '../x' as the delta" in report["outside"]
