"""A hook of mkdocs: what the site consists of beside the pages in docs/.

Pages get the paths that they have in the repository (`docs/deltas.md`), so that a link from one file to another is the
same on GitHub and on the site. Files outside docs/ that pages link to are added, code and settings as pages that show
them, and a page of the API for each subpackage. Formulas become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

from perflow_blocks import _PUBLIC

ROOT = Path(__file__).parent
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "integrations/comfyui/README.md",
    "integrations/comfyui/workflows/*",
    "perflow_blocks/demo/distill.toml",
    "perflow_blocks/training/config.py",
    "workflows/*/recipe.py",
)
IN_SUBPACKAGES = (
    "demo.perflow_pipeline",
    "demo.teacher_pipeline",
    "demo.weights_directory",
    "delta.extract.save_delta",
    "delta.files.open_weights",
    "delta.lora.save_lora",
    "delta.lora.save_residual",
    "delta.recipe.DeltaRecipe",
    "testing.contract.check_block",
    "testing.tiny",
    "training.config.ModelConfig",
    "training.config.DataConfig",
    "training.config.WindowConfig",
    "training.config.TeacherConfig",
    "training.config.LossConfig",
    "training.config.OptimizerConfig",
    "training.config.OutputConfig",
)
"""Public names that the package itself does not have."""
TITLES = {
    "core": "Time windows",
    "delta": "Deltas",
    "demo": "Loading the embedded model",
    "hub": "Repositories",
    "testing": "Testing blocks",
}
"""Of the subpackages whose name says too little."""
SHOWN = {".py": "python", ".toml": "toml", ".yaml": "yaml"}
"""By suffix of the files that get a page, the language of what they hold."""
IMAGE = re.compile(r'(<img [^>]*src="([^"]+)"[^>]*>)')
LINK_TO_SHOWN = re.compile(r"(\]\([^)#:]+(?:\.py|\.toml|\.yaml))\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
"""As `pymdownx.arithmatex` writes it: a `span` within a line, a `div` by itself."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All files of the site, under their paths in the repository."""
    places = (str(ROOT), config.site_dir, config.use_directory_urls)
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
        files.append(File(f"docs/{file.src_uri}", *places, dest_uri=file.dest_uri))
    for path in (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))):
        files.append(File(path.relative_to(ROOT).as_posix(), *places))
    for file in [file for file in files if Path(file.src_uri).suffix in SHOWN]:
        files.remove(file)
        content, apart = as_page(file.src_uri), InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, f"{file.src_uri}.md", content=content, inclusion=apart))
    for subpackage, names in api().items():
        files.append(File.generated(config, f"reference/{subpackage}.md", content=reference(subpackage, names)))
    return files


def as_page(path: str) -> str:
    """A page that shows the file at this path in the repository."""
    code = (ROOT / path).read_text(encoding="utf-8")
    return f"# {path}\n\n````{SHOWN[Path(path).suffix]}\n{code}````\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with links to the pages of code and settings in place of the files."""
    return LINK_TO_SHOWN.sub(r"\1.md)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """The page with its formulas as MathML, and images that open at full size."""

    def mathml(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    page = IMAGE.sub(r'<a href="\2">\1</a>', FORMULA.sub(mathml, content))
    if 'class="arithmatex"' in page:
        raise PluginError("a formula is not written as FORMULA expects it")
    return page


def api() -> dict[str, list[str]]:
    """By subpackage, the full names of what is public."""
    found = defaultdict(list)
    for name in (*(f"{module}.{name}" for name, module in _PUBLIC.items()), *IN_SUBPACKAGES):
        found[name.partition(".")[0]].append(name)
    return found


def reference(subpackage: str, names: list[str]) -> str:
    """A page for mkdocstrings, with the whole path of names that are not in `perflow_blocks` itself."""
    whole_path = "    options: {show_root_full_path: true}\n"
    entries = [f"::: perflow_blocks.{name}\n{whole_path if name in IN_SUBPACKAGES else ''}" for name in names]
    about = "Import names that are shown without a module from `perflow_blocks`."
    title = TITLES.get(subpackage, subpackage.capitalize())
    return "\n".join((f"# {title}\n\n{about}\n", *entries))
