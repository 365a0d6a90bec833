"""The pipeline of this package's presets: diffusers' modular SDXL pipeline with the habits of the classic one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffusers import ComponentsManager, StableDiffusionXLModularPipeline

from .block_source import block_files, load_blocks
from .saving import prepare, save_delta_file


class PeRFlowModularPipeline(StableDiffusionXLModularPipeline):
    """A modular SDXL pipeline that refuses unknown inputs and comes back from `save_pretrained` as it was.

    `init_pipeline` of this package's presets, the builder and the demo return it. For blocks that you composed, pass
    them: `PeRFlowModularPipeline(blocks=blocks, pretrained_model_name_or_path=...)`.
    """

    default_blocks_name = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        trust_remote_code: bool | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
        workflow: str | None = None,
        **kwargs: Any,
    ) -> PeRFlowModularPipeline:
        """The pipeline of a directory or repository; call `load_components()` on it.

        Presets of this package come back by name. A repository without blocks, such as a plain SDXL model, gets
        `PeRFlowSDXLAutoBlocks`.

        Args:
            pretrained_model_name_or_path: a directory or the id of a repository of the Hub.
            trust_remote_code: whether the repository's own blocks may run, which other blocks than presets need.
            components_manager, collection: as in diffusers.
            workflow: keep only the blocks of one of the preset's workflows, such as "text2image".
            kwargs: `revision`, `token`, `cache_dir` and the other options of downloads.

        Raises:
            ValueError: the repository has code of its own, and `trust_remote_code` is not set.
        """
        place = str(pretrained_model_name_or_path)
        blocks = load_blocks(place, trust_remote_code, **kwargs)
        pipe = cls(blocks, place, components_manager, collection, workflow, **kwargs)
        for spec in pipe._component_specs.values():
            if spec.pretrained_model_name_or_path == place:
                spec.revision = spec.revision or kwargs.get("revision")
                if spec.type_hint is None:  # model_index.json says that the model has no such component
                    spec.pretrained_model_name_or_path = None
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes a directory that comes back with the same blocks, components, settings and image.

        Load it with `PeRFlowModularPipeline.from_pretrained(directory)`, or with diffusers'
        `ModularPipeline.from_pretrained(directory, trust_remote_code=True)`, and `load_components()`. A merged delta
        stays merged, and its file is copied. The pipeline itself does not change.

        Args:
            save_directory: where to.
            args, kwargs: as in diffusers: `safe_serialization`, `variant`, `max_shard_size`, and `push_to_hub` with
                `repo_id`, `token`, `private`, `commit_message`, `create_pr`.

        Raises:
            ValueError: names all that would not come back, such as a LoRA, before anything is written.
        """
        saver, delta = prepare(self)
        directory = Path(save_directory)
        if delta is not None:
            save_delta_file(delta, directory / saver.config.delta)
        options = {"overwrite_modular_index": True, **kwargs}
        super(PeRFlowModularPipeline, saver).save_pretrained(str(directory), *args, **options)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the index and the blocks, without components; `save_pretrained` writes both.

        Raises:
            ValueError: a block whose class or arguments no file can name.
        """
        files = block_files(self.blocks)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (Path(save_directory) / name).write_text(text, encoding="utf-8", newline="\n")
        super().save_config(str(save_directory), push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The index, with a class that diffusers has, without unset values and without the name of the blocks' class.

        For a name that it does not know, diffusers takes its own blocks in silence.
        """
        index = json.loads(super().to_json_string())
        index.pop("_blocks_class_name", None)
        defaults = {spec.name: spec.default for spec in self._blocks.expected_configs}
        index = {name: value for name, value in index.items() if value is not None or defaults.get(name) is not None}
        return json.dumps({**index, "_class_name": stock_class_name(self)}, indent=2) + "\n"


def stock_class_name(pipe: Any) -> str:
    """The name of the pipeline's nearest class in diffusers, which an index can name."""
    return next(kind.__name__ for kind in type(pipe).__mro__ if kind.__module__.split(".")[0] == "diffusers")
