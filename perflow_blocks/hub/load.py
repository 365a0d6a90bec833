"""Loading a workflow: one commit for code, weights and delta, no other blocks than its own, no missing components."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME, logging
from diffusers.utils.dynamic_modules_utils import create_dynamic_module
from huggingface_hub import snapshot_download

from ..blocks.block_source import INDEX, PRESET_KEY, make_preset, require_sound, workflow_config
from ..delta.files import read_json

logger = logging.get_logger(__name__)


def load_workflow(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    load_components: bool = True,
) -> Any:
    """The pipeline of a workflow, as `export_workflow` and `save_pretrained` write them.

    A repository of the Hub is downloaded at one commit; code, delta and the weights in it are those of this commit.
    Unlike diffusers' `from_pretrained`, this never falls back to other blocks, and a component that does not load is
    an error. Presets of this package run without `trust_remote_code`.

    Args:
        source: a directory, or the id of a repository of the Hub.
        revision: branch, tag or commit of a repository; None for its main branch. A commit (40 hexadecimal digits)
            protects from code that changes later.
        trust_remote_code: run the workflow's code. Without it the error says what would run.
        token: of the Hub; None for the one that is logged in.
        cache_dir: of the Hub's files; None for the usual one.
        local_files_only: ask no network: the repository, and those it refers to, must be in the cache.
        dtype: of the models; None for float32, which diffusers loads, also of text encoders stored in less.
        device: where to put the models; None for the CPU.
        load_components: load the components that the index names; else only the blocks and the configuration.

    Raises:
        ValueError: the workflow cannot be downloaded or is broken, its index names files outside it, its code is not
            trusted, or components fail to load: one error names all of them.
    """
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    is_local = Path(source).expanduser().is_dir()
    directory = _fetch(source, revision, is_local, options)
    require_sound(directory, portable=not is_local)
    config, file, kind = workflow_config(directory)
    if config.get(PRESET_KEY) is not None:
        blocks = make_preset(config[PRESET_KEY])
    else:
        code = sorted(path.name for path in directory.glob("*.py"))
        if not trust_remote_code:
            raise ValueError(
                f"{source} runs code of its own ({', '.join(code)}); read it in {directory}, then pass "
                "trust_remote_code=True."
            )
        if not is_local and not re.fullmatch("[0-9a-f]{40}", revision or ""):
            logger.warning(
                f"{source} runs the code of {revision or 'its main branch'}, which can change; pass "
                f"revision={directory.name!r} to load the code that runs now."
            )
        blocks = _import_blocks(directory, Path(file).stem, kind)
    pipe = blocks.init_pipeline(str(directory))
    for spec in pipe._component_specs.values():
        if not is_local and spec.pretrained_model_name_or_path == str(source):
            spec.pretrained_model_name_or_path, spec.revision = str(directory), None
    if load_components:
        _load_components(pipe, directory, {**options, "dtype": dtype or torch.float32})
    return pipe if device is None else pipe.to(device)


def _fetch(source: str | os.PathLike[str], revision: str | None, is_local: bool, options: dict[str, Any]) -> Path:
    """The directory; a repository is downloaded whole at one commit, unless it is cached."""
    if is_local:
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for repositories, and {source} is a directory; leave it out.")
        return Path(source).expanduser().absolute()
    try:
        return Path(snapshot_download(str(source), revision=revision, **options))
    except (OSError, ValueError) as error:  # huggingface_hub's, about the name, access, the network or the cache
        raise ValueError(
            f"{source} is not a directory, and no repository that can be downloaded ({' '.join(str(error).split())}); "
            "check its name, revision and token, or load it once with a network."
        ) from error


def _import_blocks(directory: Path, module: str, kind: str) -> ModularPipelineBlocks:
    """The blocks of the directory's code, which is imported as a package of its own.

    diffusers copies the code of all directories to one place and runs it in one module, so that two workflows, or two
    versions of one, would mix. The package's name depends on the code, so a workflow that was exported again is new.
    """
    digest = hashlib.sha256(str(directory).encode())
    for path in sorted(directory.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    create_dynamic_module(DIFFUSERS_DYNAMIC_MODULE_NAME)
    name = f"{DIFFUSERS_DYNAMIC_MODULE_NAME}.workflow_{digest.hexdigest()[:16]}"
    package = sys.modules.setdefault(name, ModuleType(name))
    package.__path__ = [str(directory)]
    try:
        found = getattr(import_module(f"{name}.{module}"), kind, None)
        blocks = found() if isinstance(found, type) else None
    except (ImportError, AttributeError) as error:  # what is not installed, or of another version of this package
        raise ValueError(f"the code of {directory} cannot run ({error}); install that, or export it again.") from error
    if not isinstance(blocks, ModularPipelineBlocks) or _is_stock(blocks):
        raise ValueError(f"{directory / module}.py defines no blocks {kind} of PeRFlow; export the workflow again.")
    return blocks


def _is_stock(blocks: ModularPipelineBlocks) -> bool:
    stock = type(blocks).__module__.split(".")[0] == "diffusers"
    return stock and all(_is_stock(inner) for inner in blocks.sub_blocks.values())


def _load_components(pipe: Any, directory: Path, options: dict[str, Any]) -> None:
    """Loads what the index names; diffusers' own `load_components` only warns of what fails.

    Raises:
        ValueError: names every component that failed, and why.
    """
    named = read_json(directory / INDEX) if (directory / INDEX).is_file() else {}
    loaded, failures = {}, []
    for name in pipe.pretrained_component_names:
        spec = pipe.get_component_spec(name)
        place = spec.pretrained_model_name_or_path
        if place is None:
            if name in named:
                failures.append(f"{name}: the index names no source, and {directory / spec.subfolder} holds none")
            continue
        try:
            loaded[name] = spec.load(**options)
        except Exception as error:  # a library's, of any kind
            reason = str(error).split("using load method: ", 1)[-1].strip().split("\n")[0] or type(error).__name__
            failures.append(f"{name} from {Path(place, spec.subfolder or '')}: {reason}")
    if failures:
        lines = "\n".join(f"- {failure}" for failure in failures)
        raise ValueError(
            f"{len(failures)} of {len(loaded) + len(failures)} components of {directory} failed to load:\n{lines}\n"
            "Check these sources, or pass load_components=False and set them with update_components."
        )
    pipe.register_components(**loaded)
