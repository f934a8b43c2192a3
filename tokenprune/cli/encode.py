"""The command `tokenprune encode`: writes the kept tokens of images to a file, for a server that runs the LLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from PIL import Image
from rich.console import Console
from rich.progress import track
from transformers.utils import logging

from tokenprune.cli.errors import UserError
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.configuration import as_config
from tokenprune.embedding_file import EmbeddingWriter, list_partial_files, read_metadata
from tokenprune.experiments.evaluation.hashing import hash_file
from tokenprune.experiments.evaluation.loading import find_checkpoint, is_hub_snapshot, resolve_device, resolve_name
from tokenprune.image_files import load_image
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import HiRED
from tokenprune.vision_encoder import VisionEncoder

LIBRARIES = ("tokenprune", "torch", "transformers")
"""Packages whose version is recorded."""


@dataclass(frozen=True)
class EncodeConfig:
    """Options of `tokenprune encode`.

    Args:
        plugin: Python files with further strategies.
        model: mini or mini-pages (embedded), a checkpoint folder, or a hub id; its LLM is not loaded.
        reducer: strategy before the LLM, as in `tokenprune run`.
        images: image files, and folders with image files.
        question: questions; each is asked about each image. A strategy that does not read the question keeps the same
            tokens for all.
        requests: JSONL file with the images and questions instead; each line is an object with the fields `image`
            (relative to the file) and `question`.
        out: safetensors file; a stopped command continues when it is repeated.
        batch_size: number of images that are encoded together.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto (float32 on a CPU), float32, bfloat16, float16.
        fresh: delete an existing file and encode all images again.
        quiet: show no progress.
    """

    plugin: list[str] = field(default_factory=list)
    model: str = "mini"
    reducer: TokenReducer = field(default_factory=HiRED)
    images: list[str] | None = None
    question: list[str] | None = None
    requests: str | None = None
    out: str = "embeddings.safetensors"
    batch_size: PositiveInt = 1
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    quiet: bool = False


def run(argv: Sequence[str]) -> None:
    """Run the command `encode`."""
    description = "Write the kept visual tokens of images to a file, for a vLLM server or engine that runs the LLM."
    parser = build_parser("tokenprune encode", description, EncodeConfig, file=True)
    config = select_fields(EncodeConfig, parse_options(parser, argv, {}))
    number = write_embeddings(config)
    print(f"{number} embeddings in {config.out}", file=sys.stderr)


def write_embeddings(config: EncodeConfig) -> int:
    """Write the file, unless it is complete, and return the number of its tensors.

    Args:
        config: the options.

    Raises:
        ValueError: if an option, an image or the model cannot be used, or the file belongs to another run.
        OSError: if the file cannot be written; the same call continues.
    """
    requests = read_requests(config)
    metadata, out = describe_run(config), Path(config.out)
    if config.fresh:
        for file in (out, *list_partial_files(out)):
            file.unlink(missing_ok=True)
    if out.exists():
        check_complete(out, metadata, requests)
    else:
        encode_requests(config, out, metadata, requests)
    return len(requests)


def read_requests(config: EncodeConfig) -> list[dict[str, Any]]:
    """Return the image file, its hash and the question of each tensor of the file.

    Args:
        config: the options.

    Raises:
        UserError: if there are no images, or an option excludes another one.
        ValueError: if a file cannot be read.
    """
    if (config.requests is None) == (config.images is None):
        raise UserError("give either --images FILE ... or --requests FILE.jsonl")
    if config.requests is not None:
        if config.question:
            raise UserError("--question cannot be used with --requests, whose lines have questions")
        pairs = read_lines(Path(config.requests).expanduser())
    else:
        files = [file for path in config.images or () for file in list_images(path)]
        questions: list[str | None] = list(config.question) if config.question else [None]
        pairs = [(file, question) for file in files for question in questions]
    if not pairs:
        raise UserError(f"there is no image in {config.requests or ' '.join(config.images or ())}")
    for file, _ in pairs:
        if not Path(file).expanduser().is_file():
            load_image(file)  # raises an error that names the fault, before the model is loaded
    return [{"image": file, "sha256": hash_file(Path(file).expanduser()), "question": text} for file, text in pairs]


def list_images(path: str) -> list[str]:
    """Return an image file, or the image files of a folder in alphabetical order."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [path]
    endings = Image.registered_extensions()
    return [str(file) for file in sorted(folder.iterdir()) if file.suffix.lower() in endings]


def read_lines(file: Path) -> list[tuple[str, str | None]]:
    """Return the image and the question of each line of a JSONL file.

    Args:
        file: the file.

    Raises:
        UserError: if the file cannot be read, or a line has no image.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"--requests {file} cannot be read ({error.strerror}); give a JSONL file") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            pairs.append((str(file.parent / content["image"]), content.get("question")))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            example = '{"image": "a.png", "question": "What is it?"}'
            raise UserError(f"{file}, line {number} is no request; expected an object such as {example}") from error
    return pairs


def describe_run(config: EncodeConfig) -> dict[str, Any]:
    """Return the options, files and versions that determine the tensors, as JSON values.

    Args:
        config: the options.
    """
    folder = find_checkpoint(config.model)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json")]
    states = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    # Of a hub checkpoint, files are downloaded when they are needed; its commit identifies it before.
    checkpoint = {"commit": folder.name} if is_hub_snapshot(folder) else states
    return {
        "model": config.model,
        "reducer": as_config(config.reducer),
        "device": config.device,
        "dtype": config.dtype,
        "checkpoint": checkpoint,
        "plugin": {Path(file).name: hash_file(Path(file).expanduser()) for file in config.plugin},
        "versions": {package: version(package) for package in LIBRARIES},
    }


def check_complete(out: Path, metadata: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """Raise an error if a complete file was written with other options, for other images or questions.

    Args:
        out: the file.
        metadata: the result of `describe_run`.
        requests: the result of `read_requests`.

    Raises:
        UserError: if the file differs.
    """
    stored, entries = read_metadata(out)
    is_same = [{name: entry[name] for name in ("image", "sha256", "question")} for entry in entries] == requests
    if stored != metadata or not is_same:
        raise UserError(
            f"{out} exists and was written with other options, images or questions; add --fresh to replace it, or give "
            "another --out"
        )


def encode_requests(config: EncodeConfig, out: Path, metadata: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """Encode the requests that are not yet encoded, and write the file.

    Args:
        config: the options.
        out: the file.
        metadata: the result of `describe_run`.
        requests: the result of `read_requests`.
    """
    with EmbeddingWriter(out, metadata, requests) as writer:
        logging.disable_progress_bar()
        device, dtype = resolve_device(config.device, config.dtype)
        encoder = VisionEncoder.from_pretrained(resolve_name(config.model), config.reducer, device, dtype)
        starts = range(writer.done, len(requests), config.batch_size)
        try:
            for start in track(starts, "", console=Console(stderr=True), disable=config.quiet):
                batch = requests[start : start + config.batch_size]
                questions = (
                    None
                    if all(request["question"] is None for request in batch)
                    else [request["question"] or "" for request in batch]
                )
                encoded = encoder.encode([load_image(request["image"]) for request in batch], questions)
                for tensor, account in zip(encoded.tensors, encoded.accounts, strict=True):
                    writer.add(tensor, asdict(account))
        except KeyboardInterrupt:
            print(f"stopped after {writer.done} of {len(requests)}; run the same command to continue", file=sys.stderr)
            raise
        writer.finish()
