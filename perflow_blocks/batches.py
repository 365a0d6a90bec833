"""Batches of images: rows of prompts files, drawn by one process or several, resumable, each with its settings.

What reads and checks rows does without torch.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .atomic_files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("prompt", "negative", "seed", "size", "steps", "image")
SUFFIXES = (".txt", ".csv", ".jsonl")
MANIFEST, SHEET = "manifest.jsonl", "sheet.png"
MOST_ON_SHEET, LEGIBLE = 64, 300  # images, and letters of a prompt
PARAMETERS, SETTINGS = "parameters", "perflow"
"""PNG text chunks: the settings as A1111 writes them, which other programs show, and all of them as JSON."""

SAMPLED = 2**20  # bytes at both ends of a file that tell it from others


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image to draw. What is None is left to the weights."""

    number: int
    prompt: str
    seed: int
    negative: str | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    image: Path | None = None

    @property
    def file(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower())[:40].strip("-") or "image"
        return f"{self.number:03d}-{slug}-seed{self.seed}.png"

    def digest(self, shared: Mapping[str, Any]) -> str:
        """64 hexadecimal digits for all that was asked for: this row, and what all rows share."""
        content = [{**asdict(self), "image": fingerprint(self.image)}, shared]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_rows(
    entries: Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    num_images: int = 1,
    seed_for_all: bool = False,
    **usual: Any,
) -> list[Row]:
    """Rows of checked entries; what an entry does not say is `usual`, and its seed the next one."""
    rows: list[Row] = []
    for entry in entries:
        for number in range(num_images):
            first = entry.get("seed", seed + (0 if seed_for_all else len(rows) - number))
            rows.append(Row(**{**usual, **entry, "number": len(rows), "seed": first + number}))
    return rows


def read_prompts(file: Path, factor: int) -> list[dict[str, Any]]:
    """The checked entries of a prompts file, whose images lie relative to it.

    Raises:
        ValueError: an unknown kind of file, or the first wrong line and what is wrong with it.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} is of an unknown kind; pass a prompts file of one of {', '.join(SUFFIXES)}.")
    try:
        text, found = file.read_text(encoding="utf-8-sig"), []
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8 ({error.reason}); save it in UTF-8.") from error
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        entries: list[tuple[int, Any]] = [(reader.line_num, entry) for entry in reader]
    else:
        entries = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if file.suffix == ".txt":
        entries = [(number, {"prompt": line}) for number, line in entries if not line.startswith("#")]
    for number, entry in entries:
        try:
            found.append(check_entry(json.loads(entry) if isinstance(entry, str) else entry, file.parent, factor))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{file} holds no prompt; write one a line.")
    return found


def check_entry(entry: Any, folder: Path, factor: int) -> dict[str, Any]:
    """An entry's values by column, without the empty ones; ValueError for what no row can be made of."""
    if not isinstance(entry, dict):
        raise ValueError('it must be an object, such as {"prompt": "a red star", "seed": 7}.')
    if unknown := [name for name in entry if name not in COLUMNS]:
        raise ValueError(f"column {unknown[0] or 'without a name'} is unknown; columns are {', '.join(COLUMNS)}.")
    given: dict[str, Any] = {name: str(value) for name, value in entry.items() if value not in (None, "")}
    require_prompts([given.get("prompt", "")])
    for name, least in (("seed", 0), ("steps", 1)):
        if name in given:
            if not given[name].strip().isdecimal() or int(given[name]) not in range(least, 2**63):
                raise ValueError(f"{name} {given[name]} must be an integer of at least {least}.")
            given[name] = int(given[name])
    if "size" in given:
        given["size"] = parse_size(given["size"], factor, "size")
    if "image" in given:
        given["image"] = require_image("image", folder / given["image"])
    return given


def require_prompts(prompts: list[str]) -> None:
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError('a prompt is empty; write what to draw, such as "a red star on a white background".')


def parse_size(text: str | None, factor: int = 1, name: str = "--size") -> tuple[int, int] | None:
    """(width, height) in pixels, multiples of the VAE's `factor`, from "N" or "WxH"; None from None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX]\s*(\d+)\s*)?", text)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if width < 1 or height < 1:
        raise ValueError(f"{name} {text} must be N or WxH in pixels, both at least 1, such as 1024x768.")
    if width % factor or height % factor:
        nearest = "x".join(str(max(1, round(side / factor)) * factor) for side in (width, height))
        raise ValueError(f"{name} {text} must be in multiples of {factor} for this model; pass {nearest}.")
    return width, height


def require_image(name: str, path: Path) -> Path:
    """The path of an image file; ValueError where there is none, or none that PIL can read."""
    from PIL import Image

    try:
        Image.open(path).close()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "is not an image that can be read"
        raise ValueError(f"{name} {path} {reason}; pass an image file.") from error
    return path


def fingerprint(place: str | Path | None) -> str | None:
    """Tells files and folders apart by the names, sizes and ends of all files; a repository is its own name."""
    if place is None or not (path := Path(place).expanduser()).exists():
        return None if place is None else str(place)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLED))
                stream.seek(max(SAMPLED, size - SAMPLED))
                digest.update(stream.read())
    return digest.hexdigest()


def parameters(settings: Mapping[str, Any]) -> str:
    """The settings as A1111 and Forge write them, and as the readers of ComfyUI and of galleries understand them."""
    fields = {
        "Steps": settings["steps"],
        "Sampler": "PeRFlow",
        "CFG scale": f"{settings['guidance']:g}",
        "Seed": settings["seed"],
        "Size": "x".join(map(str, settings["size"])),
        "Model": settings["model"],
        "Denoising strength": settings.get("strength"),
        "Version": f"perflow_blocks {__version__}",
    }
    given = {name: str(value) for name, value in fields.items() if value is not None}
    texts = {n: json.dumps(v, ensure_ascii=False) if re.search(r'[,:\n"]', v) else v for n, v in given.items()}
    lines = [settings["prompt"], *([f"Negative prompt: {settings['negative']}"] if settings["negative"] else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {text}" for name, text in texts.items())])


def read_settings(file: Path) -> dict[str, Any]:
    """The settings that are stored in an image; empty if the file is missing or broken, or stores none."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return json.loads(image.info[SETTINGS])
    except Exception:  # PIL has many kinds of error for files that are cut off
        return {}


def collect(out: Path, rows: Sequence[Row], *, failures: bool) -> list[dict[str, Any]]:
    """The manifest of these rows, written from the one that is there and the parts that processes wrote, which go.

    `failures` says whether what is noted of rows that failed counts.
    """
    manifest, parts, found = out / MANIFEST, sorted(out.glob("manifest.*.jsonl")), dict[str, Any]()
    for part in (manifest, *parts):
        for line in part.read_text(encoding="utf-8").splitlines() if part.exists() else ():
            with suppress(ValueError):  # the last line of a process that was killed
                entry = json.loads(line)
                if failures or not entry["error"]:
                    found[entry["file"]] = entry
    usual = {"seconds": None, "error": None}  # of an image whose process was killed before it could note it
    entries = [found.get(row.file, {"row": row.number, "file": row.file, "seed": row.seed, **usual}) for row in rows]
    if entries:
        with atomic_path(manifest) as temporary:
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            temporary.write_text("".join(lines), encoding="utf-8")
    else:
        manifest.unlink(missing_ok=True)
    for part in parts:
        part.unlink()
    return entries


@dataclass(frozen=True)
class Job:
    """Rows to draw, and how.

    Attributes:
        out: the directory for images, `sheet.png` and `manifest.jsonl`.
        load: gives the pipeline, if there is anything to draw.
        inputs: of the pipeline for all rows; None are left out, and for rows without an image those about images.
        settings: what tells these images from others, and what files say where an image has nothing of its own.
        resume: whether images that were drawn with these settings stay.
        keep_going: whether a row that fails is noted and does not stop the others.
        progress: whether each image has a progress bar.
        noted: is called with each entry of the manifest, in the process that made it.
    """

    rows: Sequence[Row]
    out: Path
    load: Callable[[], Any]
    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    resume: bool = False
    keep_going: bool = False
    progress: bool = True
    noted: Callable[[dict[str, Any]], None] = lambda entry: None


@dataclass(frozen=True)
class Result:
    """What the main process knows at the end: manifest, settings by file, the time, and how many were to be drawn."""

    entries: list[dict[str, Any]]
    settings: dict[Path, dict[str, Any]]
    seconds: float
    count: int


def run(job: Job, processes: Any) -> Result | None:
    """Draws this process's share of the rows, where `processes` is accelerate's `PartialState`.

    The main process then writes manifest and sheet and returns the result, the others return None.
    """
    digests = {row.number: row.digest(job.settings) for row in job.rows}
    there = [read_settings(job.out / row.file).get("request") if job.resume else None for row in job.rows]
    done = [row for row, digest in zip(job.rows, there, strict=True) if digest == digests[row.number]]
    left = [row for row in job.rows if row not in done]
    if processes.is_main_process:
        collect(job.out, done, failures=False)
    processes.wait_for_everyone()
    rank, started = processes.process_index, time.monotonic()
    with processes.split_between_processes(left) as share:
        if rank < len(left):  # accelerate gives the last row to processes for which none is left
            pipeline = job.load()
            started = time.monotonic()
            for row in share:
                draw(pipeline, row, digests[row.number], job, job.out / f"manifest.{rank}.jsonl")
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    seconds, entries = time.monotonic() - started, collect(job.out, job.rows, failures=True)
    settings = {file: read_settings(file) for file in (job.out / one["file"] for one in entries if not one["error"])}
    if shown := list(settings.items())[:MOST_ON_SHEET]:
        from .evaluation.sheet import contact_sheet

        captions = [f"{one['prompt'][:LEGIBLE]}\nseed {one['seed']}, {one['steps']} steps" for _, one in shown]
        save_image(contact_sheet([open_image(file) for file, _ in shown], captions), job.out / SHEET)
    return Result(entries, settings, seconds, len(left))


def draw(pipeline: Any, row: Row, digest: str, job: Job, manifest: Path) -> None:
    """Draws one image into its file, and notes it or its failure in the manifest."""
    started, error = time.monotonic(), None
    pipeline.set_progress_bar_config(desc=row.file, leave=False, disable=not job.progress)
    try:
        image, settings = drawn(pipeline, row, job)
        save_image(image, job.out / row.file, {**settings, "request": digest})
    except Exception as problem:
        if not job.keep_going:
            raise
        error = " ".join(str(problem).split()) or type(problem).__name__
    entry: dict[str, Any] = {"row": row.number, "file": row.file, "seed": row.seed}
    entry |= {"seconds": round(time.monotonic() - started, 3), "error": error}
    job.out.mkdir(parents=True, exist_ok=True)
    with manifest.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    job.noted(entry)


def drawn(pipeline: Any, row: Row, job: Job) -> tuple[Image, dict[str, Any]]:
    shared = {name: job.inputs[name] for name in job.inputs if row.image or name not in ("strength", "mask_image")}
    width, height = row.size or (None, None)
    own: dict[str, Any] = {"prompt": row.prompt, "negative_prompt": row.negative, "num_inference_steps": row.steps}
    own |= {"width": width, "height": height, "image": row.image and open_image(row.image)}
    settings = {**job.settings, "image": row.image and row.image.name}
    return draw_image(pipeline, {**shared, **own}, row.seed, settings)


def draw_image(
    pipeline: Any, inputs: Mapping[str, Any], seed: int, settings: Mapping[str, Any]
) -> tuple[Image, dict[str, Any]]:
    """One image, and `settings` with all that made it. The noise is the CPU's, so that a seed means the same anywhere.

    Of inputs and settings those that are None are left out.
    """
    import torch

    from .delta.merge import merge_record

    inputs = {name: value for name, value in inputs.items() if value is not None}
    generator = torch.Generator("cpu").manual_seed(seed)
    result = pipeline(**inputs, generator=generator, output=["images", "num_inference_steps"])
    image, record = result["images"][0], merge_record(pipeline.unet)
    return image, {
        **{name: value for name, value in settings.items() if value},
        "prompt": inputs["prompt"],
        "negative": inputs.get("negative_prompt"),
        "steps": result["num_inference_steps"],
        "guidance": inputs.get("guidance_scale", pipeline.guider.guidance_scale),
        "seed": seed,
        "size": list(image.size),
        "delta": record and {"file": Path(record.source).name, "digest": record.digest, "scale": record.scale},
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "versions": {"perflow_blocks": __version__, **{name: version(name) for name in ("diffusers", "torch")}},
    }


def open_image(path: Path) -> Image:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
    return image


def save_image(image: Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes an image whole or not at all, of the kind that its suffix says; a PNG with its settings as text."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if settings:
        info.add_text(PARAMETERS, parameters(settings))
        info.add_itxt(SETTINGS, json.dumps(settings, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, pnginfo=info)
