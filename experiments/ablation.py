"""Ablations: a grid over anything that can be configured, with the rows that every table needs."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from tokenprune.configure import as_config, content_of, one_line, prepare
from tokenprune.experiments.experiment import Cell, Experiment, Progress, rank_and_world, run_cells
from tokenprune.experiments.records import merge, write_whole
from tokenprune.experiments.tasks import Task, tasks
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import BaseTileOnly, ImageDownsample, Random, SpatialPooling, UniformStride

KEYS = tuple(one.name for one in fields(Experiment))
"""Keys of an experiment."""
OWN = ("grid", "baselines", "random_seeds")
"""Keys of an ablation beside those of an experiment."""


def experiment_parser(prog: str, description: str) -> ArgumentParser:
    """Return a parser of everything that an experiment is made of."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--plugin", type=list[str], default=[], help="Python files whose classes get known by name")
    parser.add_argument("--model", default="mini", help="mini (embedded), a checkpoint folder, or a hub id")
    for name, kind, default in (("reducer", TokenReducer, "HiRED"), ("task", Task, "Boards")):
        parser.add_argument(f"--{name}", type=kind, help=f"class name; parameters follow as --{name}.NAME")
        parser.set_defaults({name: json.loads(words_for(name, default)[1])})
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 answers greedily")
    parser.add_argument("--batch-size", type=int, default=1, help="questions about one picture answered together")
    parser.add_argument("--dtype", default="auto", help="auto (float32 on a CPU), float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def words_for(name: str, value: Any) -> list[str]:
    """Return an option as the command line wants it, class names resolved."""
    text = value if isinstance(value, str) else json.dumps(value)
    return prepare([f"--{name}", text], {"task": (Task, tasks())})


def experiment_of(
    words: Sequence[str], parser: ArgumentParser | None = None, rest: Namespace | None = None
) -> Experiment:
    """Return the experiment that a command line describes.

    Args:
        words: the words after the command.
        parser: the parser, if the command has options of its own.
        rest: is given all options, for those that are the command's own.

    Raises:
        LookupError: if a name is not known.
        ValueError: if a value is not valid.
        argparse.ArgumentError: if an option is not.
    """
    parser = parser or experiment_parser("tokenprune evaluate", "")
    chosen = parser.instantiate(parser.parse_args(prepare(words, {"task": (Task, tasks())})))
    if rest is not None:
        rest.update(chosen)
    return Experiment(**{name: getattr(chosen, name) for name in KEYS})


def in_words(value: Any) -> str:
    """Return a value of a grid as tables show it."""
    if isinstance(value, Mapping) and "class_path" in value:
        inside = ", ".join(f"{name}={in_words(one)}" for name, one in (value.get("init_args") or {}).items())
        short = str(value["class_path"]).rpartition(".")[2]
        return f"{short}({inside})" if inside else short
    return str(value)


def words_of(name: str, value: Any) -> list[str]:
    """Return the words of an option; nested values as JSON."""
    option = "--" + name.replace("_", "-") if "." not in name else f"--{name}"
    return [option, value if isinstance(value, str) else json.dumps(value)]


def expand(config: Mapping[str, Any]) -> list[Cell]:
    """Return all cells of an ablation: the grid, and unless switched off the rows that every table needs.

    Args:
        config: the keys of an experiment, and ``grid`` (options to lists of values), ``baselines`` (default true) and
            ``random_seeds`` (default 3).

    Raises:
        ValueError: if a key is not known or a combination is not valid; every one is listed.
    """
    allowed = [*KEYS, *OWN]
    if wrong := [key for key in config if key not in allowed]:
        near = difflib.get_close_matches(str(wrong[0]), allowed, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"there is no key {wrong[0]!r} in an ablation{hint}; it has {', '.join(allowed)}")
    grid: Mapping[str, Any] = config.get("grid") or {}
    for option, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{option}: give a list of values, e.g. [0.1, 0.2], not {values!r}")
    plugins = [word for plugin in config.get("plugin") or [] for word in ("--plugin", plugin)]
    base = [w for name, value in config.items() if name in KEYS and name != "plugin" for w in words_of(name, value)]
    parser = experiment_parser("tokenprune evaluate", "")
    cells: dict[str, Cell] = {}
    problems: list[str] = []
    for values in itertools.product(*grid.values()):
        factors = dict(zip(grid, values, strict=True))
        named = ", ".join(f"{option.removeprefix('reducer.')}={in_words(value)}" for option, value in factors.items())
        try:
            overrides = [word for option, value in factors.items() for word in words_of(option, value)]
            replaced = {f"--{option.replace('_', '-')}" for option in factors}
            kept = [w for n in range(0, len(base), 2) for w in base[n : n + 2] if base[n] not in replaced]
            experiment = experiment_of([*plugins, *kept, *overrides], parser)
        except Exception as error:
            problems.append(f"{named or 'the experiment'}: {one_line(error)}")
            continue
        name = f"{type(experiment.reducer).__name__}, {named}" if "reducer" not in factors else named
        shown = {option: in_words(value) for option, value in factors.items()}
        cells.setdefault(experiment.hash(), Cell(experiment, name, "grid", shown))
    if problems:
        raise ValueError(f"{len(problems)} settings of the grid are not valid:\n  " + "\n  ".join(problems))
    if config.get("baselines", True):
        for cell in baselines([cell.experiment for cell in cells.values()], int(config.get("random_seeds", 3))):
            cells.setdefault(cell.experiment.hash(), cell)
    return list(cells.values())


def baselines(experiments: Sequence[Experiment], seeds: int) -> Iterator[Cell]:
    """Yield the rows that every table needs: all tokens, and for each budget random, spaced, pooled and shrunk ones.

    Args:
        experiments: those of the grid.
        seeds: seeds of random selection.
    """
    shared = {json.dumps(as_config(replace(e, reducer=UniformStride(1.0)))): e for e in experiments}
    for experiment in shared.values():
        yield Cell(replace(experiment, reducer=UniformStride(1.0)), "full tokens", "full")
    budgets = {json.dumps(as_config(replace(e, reducer=UniformStride(e.reducer.budget)))): e for e in experiments}
    for experiment in budgets.values():
        budget = experiment.reducer.budget
        rows: list[TokenReducer] = [Random.seeded(budget, seed) for seed in range(seeds)]
        rows += [kind(budget) for kind in (UniformStride, BaseTileOnly, SpatialPooling, ImageDownsample)]
        for reducer in rows:
            seed = f", seed {reducer.selection.seed}" if isinstance(reducer, Random) else ""  # type: ignore[attr-defined]
            name = f"{type(reducer).__name__}{seed}, budget={in_words(as_config(budget))}"
            yield Cell(replace(experiment, reducer=reducer), name, "baseline", {"reducer.budget": as_config(budget)})


def load_config(path: str) -> dict[str, Any]:
    """Return what the YAML file of an ablation says.

    Raises:
        ValueError: if there is no such file, or it is no mapping.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give the YAML file of an ablation")
    try:
        config = content_of(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not config:
        raise ValueError(f"{path} holds no mapping; an ablation has keys such as model, task, reducer and grid")
    return config


def claim(out: Path, config: Mapping[str, Any]) -> None:
    """Note in a run directory which ablation it belongs to.

    Raises:
        ValueError: if it belongs to another one.
    """
    text = yaml.safe_dump(dict(config), sort_keys=True)
    file = out / "ablation.yaml"
    if file.is_file() and yaml.safe_load(file.read_text()) != yaml.safe_load(text):
        old, new = (hashlib.sha256(t.encode()).hexdigest()[:12] for t in (file.read_text(), text))
        raise ValueError(f"{out} holds another ablation (hash {old}, this one is {new}); give another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        write_whole(file, text)


def by_model(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells that can share encodings: those of one model, dtype and task."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        one = cell.experiment
        groups.setdefault(json.dumps([one.model, one.dtype, as_config(one.task)], sort_keys=True), []).append(cell)
    return list(groups.values())


def shard_of(cells: Sequence[Cell], shard: str | None) -> list[Cell]:
    """Return the part of a grid that ``i/n`` names, i from 0.

    Raises:
        ValueError: if it is not of that form.
    """
    if shard is None:
        return list(cells)
    number, slash, total = shard.partition("/")
    if not (slash and number.isdigit() and total.isdigit() and int(number) < int(total)):
        raise ValueError(f"--shard {shard}: write i/n with i from 0 to n - 1, e.g. 0/4")
    return list(cells)[int(number) :: int(total)]


def ablate(
    path: str,
    out: Path,
    shard: str | None = None,
    workers: int = 1,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Run an ablation, or go on with it.

    Under torchrun or accelerate (``RANK`` and ``WORLD_SIZE`` are set) this process takes its part of the pictures.

    Args:
        path: the YAML file.
        out: the run directory.
        shard: ``i/n`` takes every n-th setting from the i-th on.
        workers: processes that share the pictures, one a GPU where there are GPUs.
        tell: is told after every record.

    Raises:
        ValueError: if the configuration is not valid.
        InUseError: if another process runs the same settings.
        RuntimeError: if a worker failed.
    """
    config = load_config(path)
    cells = shard_of(expand(config), shard)
    rank, world = rank_and_world()
    claim(out, config)
    if workers > 1 and world == 1:
        _share(path, out, shard, workers)
        finish(out)
    total = Progress(0)
    for group in by_model(cells):
        before = Progress(**{**vars(total), "scores": dict(total.scores)})

        def tell_all(progress: Progress, before: Progress = before) -> None:
            tell(_added(before, progress))

        total = _added(before, run_cells(group, out, rank, world, tell_all))
    return total


def _added(one: Progress, other: Progress) -> Progress:
    return Progress(
        one.total + other.total,
        one.done + other.done,
        one.errors + other.errors,
        one.pictures + other.pictures,
        one.encodes + other.encodes,
        other.cell or one.cell,
        {**one.scores, **other.scores},
    )


def _share(path: str, out: Path, shard: str | None, workers: int) -> None:
    """Run the workers and put their records together."""
    command = [sys.executable, "-m", "tokenprune", "ablate", path, "--out", str(out), "--quiet"]
    command += ["--shard", shard] if shard else []
    started = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers)})
        for rank in range(workers)
    ]
    try:
        codes = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        raise
    if any(code not in (0, 1) for code in codes):
        raise RuntimeError(f"workers ended with {codes}; their messages are above. The same command goes on")


def finish(out: Path) -> None:
    """Put the records of all workers of a run directory together."""
    for cell in sorted((out / "cells").glob("*/cell.json")):
        merge(cell.parent, [])
