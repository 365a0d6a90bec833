"""A workflow that was pushed twice to the loopback Hub, loaded by id in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
VERSION_OF = {"first": 0, "tag": 0, "main": 1, "offline first": 0, "offline main": 1, "plain": 1}

LOADER = """
import json, logging, sys
import torch
from diffusers import ModularPipeline
from safetensors.torch import save_file
from perflow_blocks import load_workflow

repository, out, commit = sys.argv[1:]
results, report = {}, {"warnings": []}
handler = logging.Handler()
handler.emit = lambda record: report["warnings"].append(record.getMessage())
logging.getLogger("perflow_blocks.hub.load").addHandler(handler)

def draw(name, pipe):
    given = {"prompt": "a red star", "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    results[name] = pipe(output="images", **given).contiguous()
    report[name] = [type(pipe.blocks).__module__.startswith("perflow_blocks."), pipe.config["num_time_windows"]]

def load(name, **options):
    draw(name, load_workflow(repository, trust_remote_code=True, **options))

load("first", revision=commit)
load("tag", revision="v1")
load("main")
load("offline first", local_files_only=True, revision=commit)
load("offline main", local_files_only=True)
plain = ModularPipeline.from_pretrained(repository, trust_remote_code=True)
plain.load_components()
draw("plain", plain)

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


def push_version(hub: LoopbackHub, repository: Path, number: int, tmp_path: Path) -> tuple[str, torch.Tensor]:
    """Code, windows, weights and delta of its own; the commit and the image."""
    delta = extract_delta(tiny_sdxl_unet(number + 1), tiny_sdxl_unet())
    save_delta(delta, tmp_path / "delta.safetensors", DeltaRecipe(num_inference_steps=4), torch.float32)
    pipe: Any = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository))
    pipe.load_components()
    pipe.update_components(num_time_windows=number + 1, delta=str(tmp_path / "delta.safetensors"))
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(number)
    mode: Any = ("thin", "self-contained")[number]
    directory = export_workflow(pipe, tmp_path / f"v{number}", mode=mode, weights="include", name=f"V{number}")
    commit = push_workflow(directory, REPO, endpoint=hub.endpoint, token=hub.token).commit
    assert commit is not None and (directory / "delta").is_dir()
    return commit, run(pipe)


def test_a_revision_holds_for_code_weights_and_delta_also_offline(
    loopback_hub: LoopbackHub, repository: Path, tmp_path: Path
) -> None:
    hub = loopback_hub
    commits, images = zip(*(push_version(hub, repository, number, tmp_path) for number in (0, 1)), strict=True)
    assert not torch.equal(*images)
    hub.repositories[REPO].refs["v1"] = commits[0]
    hub.create("someone/outside", {"modular_model_index.json": b'{"delta": "../x"}'})
    out, script = tmp_path / "out.safetensors", tmp_path / "loader.py"
    script.write_text(LOADER)
    environment = {**hub.environment(tmp_path / "home", token=hub.other_token), "PYTHONPATH": str(ROOT)}
    printed = python(script, REPO, out, commits[0], environment=environment, cwd=tmp_path)
    report, found = json.loads(printed.split("REPORT")[1]), load_file(out)
    for name, number in VERSION_OF.items():
        assert report[name] == [number == 0, number + 1], name  # self-contained code is not this package's
        assert torch.equal(found[name], images[number]), name
    pinned = [text.split("revision=")[1].split()[0] for text in report["warnings"]]
    assert pinned == [repr(commits[number]) for number in (0, 1, 1)]  # tag, main, offline main
    assert f"{REPO} runs code of its own (block.py" in report["untrusted"]
    assert "nonesuch" in report["revision"] and "owner/missing is not a directory" in report["missing"]
    assert "load it once with a network" in report["not cached"]
    assert "names '../x' as the delta" in report["outside"]
