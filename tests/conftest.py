"""What more than one test file uses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import close_session
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from perflow_blocks import PeRFlowPipelineBuilder, PeRFlowSDXLAutoBlocks, load_workflow
from perflow_blocks.cli import main
from perflow_blocks.testing.tiny import tiny_sdxl_components
from tests.hub.loopback import LoopbackHub


@pytest.fixture(name="run")
def run_perflow(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `perflow` in this process: exit status, stdout, stderr."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run_command


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_repository(tmp_path_factory.mktemp("repository") / "tiny")


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny teacher of each family, to be left as it is."""
    from tests.training.conftest import save_teacher  # with all that a training needs

    folder = tmp_path_factory.mktemp("teachers")
    return {family: save_teacher(folder / family, family) for family in ("sdxl", "sd")}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the classes whose `from_pretrained` is called, appended to as they are."""
    called: list[str] = []
    for kind in LOADABLE:

        def counted(cls: Any, *args: Any, original: Any = kind.from_pretrained, **kwargs: Any) -> Any:
            called.append(cls.__name__)
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(counted))
    return called


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state for the process; a test with this has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies the code of repositories to a folder of the test's, which other processes do not write to."""
    folder = tmp_path / "modules"
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    folder.mkdir()  # Python remembers of a place in sys.path that it is none
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def loopback_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that tests ask by `endpoint=`; huggingface_hub uses plain LFS and finds no token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # one that was opened before may go through a proxy
    with LoopbackHub() as hub:
        yield hub
    close_session()


@pytest.fixture
def default_hub(
    loopback_hub: LoopbackHub, own_modules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LoopbackHub:
    """The loopback Hub where libraries ask by themselves, its owner's token, and an empty cache."""
    endpoint = loopback_hub.endpoint
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made at its first use, and kept
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    return loopback_hub


def make_pipeline(blocks: Any = None, **components: Any) -> Any:
    pipe = (blocks or PeRFlowSDXLAutoBlocks()).init_pipeline()
    pipe.update_components(**{**tiny_sdxl_components(), **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: Any, **inputs: Any) -> Any:
    """Final latents (images, 4, 16, 16) of a seeded run, or another `output`."""
    inputs = {"prompt": "a red star", "generator": generator(), "output_type": "latent", "output": "images", **inputs}
    return pipe(**inputs)


def count_unet_calls(pipe: Any) -> list[int]:
    """The batch sizes of the UNet's calls, appended to as they happen."""
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    return batches


def watch_models(pipe: Any) -> tuple[list[str], Callable[[], None]]:
    """The names of the pipeline's models, appended to as they run, and a function that ends the watch.

    A model whose methods run its parts without calling the model itself, as the VAE's `encode` and `decode` do, is
    noted by its parts.
    """
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, model in pipe.components.items()
        if isinstance(model, nn.Module)
        for module in (model, *model.children())
    ]

    def stop() -> None:
        for hook in hooks:
            hook.remove()

    return ran, stop


def refusal(pipe: Any, **inputs: Any) -> str:
    """The one line with which a call is refused before a model runs."""
    ran, stop = watch_models(pipe)
    with pytest.raises(ValueError) as caught:
        pipe(**{"prompt": "a star", "num_inference_steps": 4, **inputs})
    stop()
    assert ran == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


LOADABLE = (
    UNet2DConditionModel,
    AutoencoderKL,
    ControlNetModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    EulerDiscreteScheduler,
)

WHOLE = sorted([*(kind.__name__ for kind in LOADABLE if kind is not ControlNetModel), "CLIPTokenizer"])
"""What a pipeline of `tiny_sdxl_components` loads."""


def save_repository(folder: Path, **components: Any) -> Path:
    """The tiny SDXL pipeline as diffusers saves it, in float32."""
    pipe = StableDiffusionXLPipeline(**{**tiny_sdxl_components(), **components}, add_watermarker=False)
    pipe.save_pretrained(folder)
    return folder


def builder(repository: Path, **settings: Any) -> PeRFlowPipelineBuilder:
    return PeRFlowPipelineBuilder(**settings).from_pretrained(repository)


def latents(pipe: Any, **inputs: Any) -> torch.Tensor:
    """Those of a run of four steps without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return run(pipe, **{"num_inference_steps": 4, **inputs})


def index_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "modular_model_index.json").read_text())


def load(place: Path | str, **options: Any) -> Any:
    """A workflow, whose code is trusted."""
    pipe = load_workflow(place, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def problems(built: PeRFlowPipelineBuilder) -> str:
    """The text of the error that `build` raises, which says what `problems` says."""
    with pytest.raises(ValueError) as caught:
        built.build()
    text = str(caught.value)
    assert all(problem in text for problem in built.problems())
    return text


class _NoReadingOperators(TorchDispatchMode):
    """Refuses what `.item()`, `bool(tensor)` and boolean indexing come down to, in libraries' code too."""

    REFUSED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.REFUSED:
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


class _NoReadingMethods(TorchFunctionMode):
    """Refuses the methods that copy to the host, which on CPU tensors reach no operator."""

    REFUSED = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.REFUSED:
            raise AssertionError(f"{func.__name__} reads from the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(*, methods: bool = True) -> Iterator[None]:
    """Everything inside must leave tensors where they are; `methods=False` allows `.tolist()` of host tensors."""
    with _NoReadingOperators():
        if not methods:
            yield
            return
        with _NoReadingMethods():
            yield


def python(
    *arguments: object, environment: Mapping[str, str], cwd: Path | None = None, executable: str = sys.executable
) -> str:
    """What Python prints with these arguments; an error there fails the test with the end of its traceback."""
    done = subprocess.run(
        [executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
