"""`perflow generate`: what it writes, and that a mistake costs one line and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageChops

from perflow_blocks import PeRFlowSDXLAutoBlocks, insert_loop_block, load_workflow
from perflow_blocks.cli import main
from perflow_blocks.cli.pipeline import find_model
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import IMAGE_SIZE, tiny_sd_components, tiny_sdxl_components, tiny_sdxl_unet

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain SDXL directory, as any fine-tune is published."""
    path = tmp_path_factory.mktemp("model")
    StableDiffusionXLPipeline(**tiny_sdxl_components()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    recipe = DeltaRecipe(prediction_type="ddim_eps", num_inference_steps=5, guidance_scale=1.0)
    save_delta({k: torch.full_like(v, 0.01) for k, v in tiny_sdxl_unet().state_dict().items()}, path, recipe)
    return path


OWN_BLOCK = """
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam

class BrightStep(ModularPipelineBlocks):
    model_name = "stable-diffusion-xl"
    inputs = [InputParam("latents", required=True)]
    intermediate_outputs = [OutputParam("latents")]

    def __call__(self, components, block_state, i, t):
        block_state.latents = block_state.latents + 1.0
        return components, block_state
"""


@pytest.mark.usefixtures("own_modules")
def test_blocks_of_ones_own_draw_and_are_exported_where_they_are_trusted(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (tmp_path / "bright.py").write_text(OWN_BLOCK)
    sys.path.append(str(tmp_path))  # as for the script that makes the pipeline
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "bright", import_module("bright").BrightStep, after="solver")
    pipe: Any = blocks.init_pipeline(str(model))
    pipe.load_components(dtype=torch.float32)
    pipe.save_pretrained("mine")
    sys.path.remove(str(tmp_path))  # for the command
    del sys.modules["bright"]
    for arguments in (["generate", "a", "--model", "mine", "--out", "out"], ["export", "mine", "out"]):
        status, stdout, err = run(*arguments)
        assert status == 2 and not stdout and not Path("out").exists()
        assert "mine has blocks of its own; read its block.py, then pass --trust-remote-code" in err
    for name, location, trust in (("own", "mine", ["--trust-remote-code"]), ("preset", str(model), [])):
        assert run("generate", "a", "--model", location, "--out", name, "--seed", 3, *trust)[0] == 0
    images = [Image.open(f"{name}/000-a-seed3.png") for name in ("own", "preset")]
    assert ImageChops.difference(*images).getbbox() is not None
    del sys.modules["bright"]
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path)])
    monkeypatch.chdir("mine")
    status, _, err = run("generate", "a", "--model", tmp_path / "mine", "--trust-remote-code")
    assert status == 2 and "cannot run (No module named 'bright'); start where the modules lie" in err
    monkeypatch.chdir(tmp_path)
    status, _, err = run("export", "mine", "flow", "--trust-remote-code", "--weights", "include")
    assert status == 0, err
    assert "class BrightStep" in "".join(file.read_text() for file in Path("flow").glob("*.py"))


def settings(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        image.load()
        return json.loads(image.info["perflow"])


def test_the_pipeline_of_a_merged_unet(run: Run, model: Path, delta: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert run("merge", model, delta, "-o", merged)[0] == 0
    shutil.copy(ROOT / "modular_model_index.json", tmp_path)  # a folder whose index names weights elsewhere
    assert find_model(str(merged), None) == (str(model), merged)
    shutil.copytree(model / "vae", tmp_path / "vae")  # a pipeline that holds its weights
    assert find_model(str(merged), None) == (str(tmp_path), merged)
    (tmp_path / "modular_model_index.json").unlink()
    assert find_model(str(merged), None) == (str(model), merged)
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}))
    with pytest.raises(ValueError, match="is a UNet alone; pass --unet"):
        find_model(str(merged), None)


def test_pictures_carry_their_settings_and_stand_on_a_sheet(
    run: Run, model: Path, delta: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    request = ["--model", model, "--delta", delta, "--num-images", 2, "--seed", 7, "--out", out]
    status, stdout, _ = run("generate", "a red étoile", "b", *request, "--negative", "blue")
    assert status == 0
    paths = [Path(line) for line in stdout.split("\n") if line]
    assert {*(path.name for path in paths), "manifest.jsonl"} == {path.name for path in out.iterdir()}
    assert len(paths) == 5 and paths[-1].name == "sheet.png"
    assert [settings(path)["seed"] for path in paths[:4]] == [7, 8, 9, 10]
    first = settings(paths[0])
    assert first["prompt"] == "a red étoile" and first["negative"] == "blue"
    assert first["steps"] == 5 and first["guidance"] == 1.0  # the delta's recipe
    assert first["size"] == [IMAGE_SIZE, IMAGE_SIZE] and first["model"] == model.name
    assert first["delta"]["file"] == delta.name and first["delta"]["scale"] == 1.0
    assert first["versions"]["torch"] == version("torch")  # without the build, such as +cu130
    pictures = [Image.open(path) for path in paths]
    assert all(picture.size == (IMAGE_SIZE, IMAGE_SIZE) for picture in pictures[:4])
    assert pictures[4].width > 2 * IMAGE_SIZE


def test_a_picture_comes_again_from_its_own_settings(run: Run, model: Path, tmp_path: Path) -> None:
    def pictures(name: str, *arguments: object) -> list[Image.Image]:
        out = tmp_path / name
        status, _, _ = run(
            "generate", "a", "--model", model, "--steps", 4, "--size", "16x24", "--out", out, *arguments
        )
        assert status == 0
        return [Image.open(path) for path in sorted(out.glob("0*.png"))]

    def same(a: Image.Image, b: Image.Image) -> bool:
        return ImageChops.difference(a, b).getbbox() is None

    many, alone = pictures("many", "--seed", 3, "--num-images", 2), pictures("alone", "--seed", 4)
    assert many[0].size == (16, 24)
    assert same(many[1], alone[0])
    assert not same(many[0], alone[0])
    assert not same(alone[0], pictures("guided", "--seed", 4, "--guidance", 9)[0])


def test_guidance_asked_for_wins_over_the_recipe(run: Run, model: Path, delta: Path, tmp_path: Path) -> None:
    # 2.0 is also the default guider's scale, which the recipe's 1.0 would replace.
    request = ["--model", model, "--delta", delta, "--guidance", 2.0, "--steps", 4, "--out", tmp_path]
    assert run("generate", "a", *request)[0] == 0
    made = settings(next(tmp_path.glob("0*.png")))
    assert (made["guidance"], made["steps"]) == (2.0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass prompts in quotes, or --prompts-file FILE"),
        (["a", "--steps", "0"], "'--steps'"),
        (["a", "--steps", "few"], "'--steps'"),
        (["a", "--guidance", "-1"], "'--guidance'"),
        (["a", "--num-images", "0"], "'--num-images'"),
        (["a", "--seed", "-1"], "'--seed'"),
        (["a", "--size", "0"], "--size 0 must be N or WxH"),
        (["a", "--size", "64x-8"], "--size 64x-8 must be N or WxH"),
        (["a", "--size", "67"], "--size 67 must be in multiples of 4 for this model; pass 68x68"),
        (["a", "--strength", "0.5"], "pass --image FILE"),
        (["a", "--strength", "2"], "'--strength'"),
        (["a", "--mask", "{png}"], "pass --image FILE"),
        (["a", "--image", "{txt}"], "is not an image that can be read"),
        (["a", "--image", "nowhere.png"], "'nowhere.png' does not exist"),
        (["a", "--control", "{png}"], "--controlnet MODEL need each other"),
        (["a", "--controlnet", "some/net"], "--controlnet MODEL need each other"),
        (["a", "--compile", "--offload", "model"], "--compile does not work with --offload"),
        (["a", "--offload", "disk"], "'--offload'"),
        (["a", "--lora", "nowhere.safetensors:0.5"], "--lora nowhere.safetensors:0.5 must name a file"),
        (["a", "--lora", "{png}:nan"], "must name a file"),
        (["a", "--unet", "{folder}"], "holds no UNet"),
        (["a", "--prompts-file", "{txt}"], "and not both"),
        (["--prompts-file", "{png}"], "is of an unknown kind; pass a prompts file of one of .txt, .csv, .jsonl"),
        (["--prompts-file", "{txt}"], "holds no prompt"),
        (["a", "--device", "warp"], "--device warp is unknown; pass one such as cpu, cuda"),
        (["a", "--device", "xpu"], "--device xpu cannot be used here"),
        (["a", "--dtype", "int8"], "'--dtype': "),
        (["a", "--delta", "nowhere.safetensors"], "'nowhere.safetensors' does not exist"),
        (["a", "--model", "./nowhere"], "--model ./nowhere does not exist"),
        (["a", "--no-such-option"], "No such option"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("perflow_blocks.cli.pipeline.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    out, png, txt = tmp_path / "out", tmp_path / "a.png", tmp_path / "a.txt"
    Image.new("RGB", (64, 64)).save(png)
    txt.write_text("# nothing\n\n")
    arguments = [argument.format(png=png, txt=txt, folder=tmp_path) for argument in arguments]
    status, stdout, stderr = run("generate", *arguments, "--out", out)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("Error: ") and message in stderr
    assert stderr.count("\n") == 1
    assert not out.exists()


WRONG = """
generate a --nope 1
generate a --steps 0
generate a --size 67
generate a --device tpu
generate a --dtype int8
generate a --delta nowhere
generate a --image a.png
generate a --lora nowhere
generate a --model ./nowhere
generate a --out file/x
generate --prompts-file file
app --port 0
app --model ./nowhere
app --delta nowhere
compare a --steps 0
compare a --out x.xyz
compare a --device tpu
compare a --model ./nowhere
demo --out file/x
evaluate
evaluate --demo --samplers perflow
evaluate --demo --device tpu
evaluate --demo --model ./nowhere
extract model model -o file
extract model model -o x.safetensors --windows 0
extract model model -o x.safetensors --prediction-type x
merge model file -o x --scale 0
merge file file -o x
merge model file -o model
unmerge model file -o model
to-lora file -o x.safetensors
to-lora file -o x.safetensors --rank 0
to-lora file -o file --rank 1
to-lora file -o x.safetensors --rank 1 --device tpu
inspect nowhere
inspect file --top -1
export ./nowhere x
export model model
export model x --revision main
push nowhere me/x
push model me/x
distill --config nowhere
distill --config file --nope
""".strip().splitlines()


def test_a_wrong_option_is_answered_without_importing_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from perflow_blocks.cli import main
for wrong in {WRONG}:
    try:
        main(wrong.split())
    except SystemExit as done:
        assert done.code == 2, wrong
    assert "torch" not in sys.modules, wrong
"""
    (tmp_path / "file").write_text("text")
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "model" / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_TOKEN_PATH": "nowhere"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == len(WRONG) and all(line.startswith("Error: ") for line in lines)


def test_the_shell_completes_names() -> None:
    environment = {**os.environ, "_PERFLOW_COMPLETE": "complete_bash", "COMP_WORDS": "perflow gen", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "perflow_blocks.cli"]
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout == "generate\n"


def test_a_very_long_prompt_is_drawn_like_any_other(run: Run, model: Path, tmp_path: Path) -> None:
    """The sheet shows its start."""
    status, stdout, _ = run("generate", "x" * 10_000, "--model", model, "--steps", 4, "--out", tmp_path)
    with Image.open(stdout.splitlines()[-1]) as sheet:
        assert status == 0 and sheet.height < 1000


def test_what_only_the_model_can_tell_costs_no_unet_call(
    run: Run, model: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    out = tmp_path / "out"
    other, broken = tmp_path / "other.safetensors", tmp_path / "broken.safetensors"
    save_delta({"conv_in.weight": torch.zeros(1)}, other)
    broken.write_bytes(delta.read_bytes()[:5000])
    for path, message in ((other, "does not fit this UNet2DConditionModel"), (broken, "complete safetensors file")):
        status, _, stderr = run("generate", "a", "--model", model, "--delta", path, "--out", out)
        assert status == 2
        last = stderr.splitlines()[-1]
        assert last.startswith(f"Error: {path}") and message in last
        assert "Traceback" not in stderr
    assert not out.exists()


def test_a_directory_without_a_model_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    status, _, stderr = run("generate", "a", "--model", tmp_path, "--out", tmp_path / "out")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "holds none of modular_model_index.json, model_index.json" in stderr
    (tmp_path / "model_index.json").write_text((model / "model_index.json").read_text())
    status, _, stderr = run("generate", "a", "--model", tmp_path, "--out", tmp_path / "out")
    assert status == 2
    assert stderr.splitlines()[-1].startswith(f"Error: {tmp_path} gave no ")


def test_a_defect_of_the_program_keeps_its_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object, **__: object) -> None:
        raise KeyError("defect")

    monkeypatch.setattr("perflow_blocks.cli.pipeline.load_pipeline", defect)
    with pytest.raises(KeyError, match="defect"):
        main(["generate", "a", "--model", str(model)])


def test_help_and_version(run: Run) -> None:
    for arguments, expected in ((["--help"], "generate"), ([], "generate"), (["--version"], "perflow_blocks 0.")):
        status, stdout, stderr = run(*arguments)
        assert (status, stderr) == (0, "")
        assert expected in stdout


def test_an_error_inside_the_pipeline_is_one_line_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "perflow_blocks.cli", "generate", "a star", "--steps", "5000"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"Error: timesteps .* 5000 steps.*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_and_a_path_in_the_home_directory(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, error = run("generate", "a star", " ", "--out", tmp_path / "out")
    assert status == 2 and "a prompt is empty" in error and not (tmp_path / "out").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    status, _, error = run("generate", "a star", "--delta=~/none.safetensors")
    assert status == 2 and f"{tmp_path}/none.safetensors" in error


def test_a_stable_diffusion_model_draws_and_is_exported(run: Any, tmp_path: Path, own_modules: None) -> None:
    StableDiffusionPipeline(**tiny_sd_components()).save_pretrained(tmp_path / "model")
    status, output, error = run("generate", "a star", "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert status == 0, error
    drawn = settings(Path(output.splitlines()[0]))
    assert (drawn["steps"], drawn["guidance"]) == (8, 4.5)
    assert run("export", tmp_path / "model", tmp_path / "workflow", "--weights", "include", "--dtype=float32")[0] == 0
    pipe = load_workflow(tmp_path / "workflow")
    assert type(pipe).__name__ == "PeRFlowSDModularPipeline"
    card = (tmp_path / "workflow" / "README.md").read_text()
    assert "| 8 | 4.5 | diff_eps | 4, equal |" in card and "- stable-diffusion\n" in card
