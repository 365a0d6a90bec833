"""Loading a workflow repository: its files are verified before its code runs, and nothing fails in silence."""

from __future__ import annotations

import os
import sys
from importlib import invalidate_caches
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME, HF_MODULES_CACHE
from huggingface_hub.utils import WeakFileLock

from .fetch import fetch_workflow
from .json_files import BLOCKS_CONFIG, INDEX, parse_json
from .manifest import Manifest, sha256_of, verify_manifest


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
    verify_weights: bool = False,
) -> Any:
    """The pipeline of a workflow repository, as `export_workflow` writes them.

    A repository of the Hub is downloaded at one commit, and code, weights that it holds and its delta are those of
    this commit. Everything is compared with its manifest before any of its code runs, weights by their size unless
    `verify_weights` is set. Unlike `from_pretrained`, this never falls back to other blocks, and a component that
    fails to load is an error.

    Args:
        source: a directory, or the id of a repository of the Hub.
        revision: branch, tag or commit of a repository; None for its main branch.
        trust_remote_code: run the repository's code. Without it the error says what would run.
        token: of the Hub; None for the one that is logged in.
        cache_dir: of the Hub's files; None for the usual one.
        local_files_only: ask no network: the repository, and those it refers to, have to be in the cache.
        dtype: of the models; None as they are stored.
        device: where to put the models; None for the CPU.
        load_components: load the components that the index names; else only the blocks and the configuration.
        verify_weights: read the weights in the repository for the comparison as well, which takes as long as loading.

    Raises:
        ValueError: the repository cannot be read or is not what its manifest says, its code is not trusted or gives
            other blocks than it names, or components fail to load: then one error names all of them.
    """
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    directory = fetch_workflow(source, revision=revision, **options)
    manifest = verify_manifest(directory, weights=verify_weights)
    if not trust_remote_code:
        raise ValueError(_untrusted(source, directory, manifest))
    pipe = _load_blocks(directory, manifest).init_pipeline(str(directory))
    if load_components:
        _load_components(pipe, directory, {**options, **({} if dtype is None else {"dtype": dtype})})
    return pipe if device is None else pipe.to(device)


def _untrusted(source: object, directory: Path, manifest: Manifest) -> str:
    code = [f"{name} ({entry.size:,} bytes)" for name, entry in manifest.files.items() if name.endswith(".py")]
    package = "" if manifest.mode == "self-contained" else ", and the package perflow-blocks that it imports"
    return (
        f"{source} runs code of its own: {', '.join(code)}{package}. Read it in {directory}, then pass "
        "trust_remote_code=True."
    )


def _load_blocks(directory: Path, manifest: Manifest) -> Any:
    """The blocks of the repository's own `block.py`, and no others."""
    name = manifest.blocks.rsplit(".", 1)[-1]
    config = _read(directory / BLOCKS_CONFIG)
    named = (config.get("auto_map") or {}).get("ModularPipelineBlocks")
    if named != f"block.{name}":
        raise ValueError(
            f"{directory / BLOCKS_CONFIG} runs {named}, and the manifest says block.{name}; export the workflow again."
        )
    # Not in the folder of the modules, which diffusers is to make: it makes packages of folders that it makes alone.
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with WeakFileLock(Path(HF_MODULES_CACHE) / "perflow.lock"):  # other processes copy their files to the same place
        _require_fresh_modules(directory, manifest)
        try:
            blocks = ModularPipelineBlocks.from_pretrained(str(directory), trust_remote_code=True)
        except Exception as error:  # the repository's own, of any kind
            raise ValueError(
                f"the code of {directory} does not run ({type(error).__name__}: {error}); {_remedy(manifest)}."
            ) from error
        _require_own_modules(directory, manifest)
    if type(blocks).__name__ != name:
        raise ValueError(
            f"the code of {directory} gives the blocks {type(blocks).__name__}, and the manifest says {name}; export "
            "the workflow again."
        )
    return blocks


def _remedy(manifest: Manifest) -> str:
    if manifest.mode == "thin":
        return f"install perflow-blocks {manifest.package_version} and what else its card asks for"
    return "install the diffusers that its modular_config.json names, and what else its card asks for"


def _require_fresh_modules(directory: Path, manifest: Manifest) -> None:
    """Sees to it that what runs is what was verified.

    diffusers copies the files of every directory into one place and imports them from there. A module of this name
    that the process has imported already would run in place of this one; so would bytecode of another file of the
    same size that was copied there within the same second.
    """
    for file in _code(manifest):
        module = sys.modules.get(f"{DIFFUSERS_DYNAMIC_MODULE_NAME}.local.{Path(file).stem}")
        copy = _shared_modules() / file
        if file != "block.py" and module is not None:
            if not copy.is_file() or copy.read_bytes() != (directory / file).read_bytes():
                raise ValueError(
                    f"another {file} than that of {directory} is imported in this process already; load this workflow "
                    "in a process of its own."
                )
        Path(cache_from_source(str(copy))).unlink(missing_ok=True)
    invalidate_caches()  # of the places that modules are looked for in


def _require_own_modules(directory: Path, manifest: Manifest) -> None:
    """Raises the ValueError where a process that takes no notice of the lock has put other files in place."""
    copies = [_shared_modules() / file for file in _code(manifest)]
    if any(copy.is_file() and sha256_of(copy) != manifest.files[copy.name].sha256 for copy in copies):
        raise ValueError(
            f"another process loaded other code while that of {directory} was read; load it again, or give processes "
            "that load workflows at the same time an HF_MODULES_CACHE each."
        )


def _shared_modules() -> Path:
    """Where diffusers copies the code of every directory that it loads blocks from."""
    return Path(HF_MODULES_CACHE) / DIFFUSERS_DYNAMIC_MODULE_NAME / "local"


def _code(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name.endswith(".py") and "/" not in name]


def _load_components(pipe: Any, directory: Path, options: dict[str, Any]) -> None:
    named = [name for name in _read(directory / INDEX) if name in pipe.pretrained_component_names]
    specs = {name: pipe.get_component_spec(name) for name in pipe.pretrained_component_names}
    loaded, failures = {}, []
    for name, spec in specs.items():
        source = spec.pretrained_model_name_or_path
        if source is None:
            if name in named:
                failures.append(f"{name}: the index names no source, and {directory / spec.subfolder} holds none")
            continue
        try:
            loaded[name] = spec.load(**options)
        except Exception as error:  # a library's, of any kind: what fails is told with the rest that fails
            failures.append(f"{name} from {_place(spec)}: {_reason(error)}")
    if failures:
        lines = "\n".join(f"- {failure}" for failure in failures)
        raise ValueError(
            f"{len(failures)} of {len(loaded) + len(failures)} components of {directory} failed to load:\n{lines}\n"
            "Check these sources, or pass load_components=False and set them with update_components."
        )
    pipe.register_components(**loaded)


def _place(spec: Any) -> str:
    details = {"subfolder": spec.subfolder, "variant": spec.variant, "revision": spec.revision}
    named = [f"{what} {value}" for what, value in details.items() if value]
    return ", ".join([str(spec.pretrained_model_name_or_path), *named])


def _reason(error: Exception) -> str:
    """The first line of what the library said, which spec.load puts behind words of its own."""
    text = str(error).split("using load method: ", 1)[-1].strip()
    return text.split("\n")[0] or type(error).__name__


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); download or export the workflow again.") from error
    return parse_json(content, str(path))
