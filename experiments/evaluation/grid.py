"""Ablations: a grid over anything that can be configured, with the rows that every table needs."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from tokenprune.cli.parsing import content_of, format_error, prepare
from tokenprune.configuration import as_config
from tokenprune.experiments.evaluation.experiment import (
    Experiment,
    Progress,
    Setting,
    check_records,
    discard_records,
    lacking,
    rank_and_world,
    run_settings,
)
from tokenprune.experiments.evaluation.loading import outline
from tokenprune.experiments.evaluation.records import forget_errors, write_whole
from tokenprune.experiments.evaluation.stored_images import IMAGES
from tokenprune.experiments.evaluation.tasks import Task, tasks
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
        parser.set_defaults({name: json.loads(resolve_args(name, default)[1])})
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 answers greedily")
    parser.add_argument("--batch-size", type=int, default=1, help="questions about one image answered together")
    parser.add_argument("--dtype", default="auto", help="auto (float32 on a CPU), float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def resolve_args(name: str, value: Any) -> list[str]:
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


def format_value(value: Any) -> str:
    """Return a value of a grid as tables show it."""
    if isinstance(value, Mapping) and "class_path" in value:
        inside = ", ".join(f"{name}={format_value(one)}" for name, one in (value.get("init_args") or {}).items())
        short = str(value["class_path"]).rpartition(".")[2]
        return f"{short}({inside})" if inside else short
    return str(value)


def to_cli_args(name: str, value: Any) -> list[str]:
    """Return the words of an option; nested values as JSON."""
    option = "--" + name.replace("_", "-") if "." not in name else f"--{name}"
    return [option, value if isinstance(value, str) else json.dumps(value)]


def expand(config: Mapping[str, Any]) -> list[Setting]:
    """Return all settings of an ablation: the grid, and unless switched off the rows that every table needs.

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
    base = [w for name, value in config.items() if name in KEYS and name != "plugin" for w in to_cli_args(name, value)]
    parser = experiment_parser("tokenprune evaluate", "")
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    for values in itertools.product(*grid.values()):
        factors = dict(zip(grid, values, strict=True))
        named = ", ".join(
            f"{option.removeprefix('reducer.')}={format_value(value)}" for option, value in factors.items()
        )
        try:
            overrides = [word for option, value in factors.items() for word in to_cli_args(option, value)]
            replaced = {f"--{option.replace('_', '-')}" for option in factors}
            kept = [w for n in range(0, len(base), 2) for w in base[n : n + 2] if base[n] not in replaced]
            experiment = experiment_of([*plugins, *kept, *overrides], parser)
        except Exception as error:
            problems.append(f"{named or 'the experiment'}: {format_error(error)}")
            continue
        name = f"{type(experiment.reducer).__name__}, {named}" if "reducer" not in factors else named
        shown = {option: format_value(value) for option, value in factors.items()}
        settings.setdefault(experiment.hash(), Setting(experiment, name, "grid", shown))
    if problems:
        raise ValueError(f"{len(problems)} settings of the grid are not valid:\n  " + "\n  ".join(problems))
    if config.get("baselines", True):
        for setting in baselines(
            [setting.experiment for setting in settings.values()], int(config.get("random_seeds", 3))
        ):
            settings.setdefault(setting.experiment.hash(), setting)
    return list(settings.values())


def baselines(experiments: Sequence[Experiment], seeds: int) -> Iterator[Setting]:
    """Yield the rows that every table needs: all tokens, and for each budget random, spaced, pooled and shrunk ones.

    Args:
        experiments: those of the grid.
        seeds: seeds of random selection.
    """
    shared = {json.dumps(as_config(replace(e, reducer=UniformStride(1.0)))): e for e in experiments}
    for experiment in shared.values():
        yield Setting(replace(experiment, reducer=UniformStride(1.0)), "full tokens", "full")
    budgets = {json.dumps(as_config(replace(e, reducer=UniformStride(e.reducer.budget)))): e for e in experiments}
    for experiment in budgets.values():
        budget = experiment.reducer.budget
        rows: list[TokenReducer] = [Random.seeded(budget, seed) for seed in range(seeds)]
        rows += [kind(budget) for kind in (UniformStride, BaseTileOnly, SpatialPooling, ImageDownsample)]
        for reducer in rows:
            seed = f", seed {reducer.selection.seed}" if isinstance(reducer, Random) else ""  # type: ignore[attr-defined]
            name = f"{type(reducer).__name__}{seed}, budget={format_value(as_config(budget))}"
            yield Setting(replace(experiment, reducer=reducer), name, "baseline", {"reducer.budget": as_config(budget)})


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


def hash_of(settings: Sequence[Setting]) -> str:
    """Return 12 letters that identify an ablation by its experiments, however its file was written."""
    return hashlib.sha256(" ".join(sorted(setting.experiment.hash() for setting in settings)).encode()).hexdigest()[:12]


def claim(out: Path, config: Mapping[str, Any], settings: Sequence[Setting]) -> None:
    """Note in a run directory which ablation it belongs to.

    Args:
        out: the run directory.
        config: the ablation.
        settings: what `expand` makes of it.

    Raises:
        ValueError: if the directory belongs to another one.
    """
    file = out / "ablation.yaml"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, yaml.safe_dump(dict(config), sort_keys=True))
        return
    there = load_config(str(file))
    if there == config:
        return
    try:
        old = hash_of(expand(there))
    except (ValueError, LookupError):
        old = "not known: it is not valid any more"
    if old != hash_of(settings):
        raise ValueError(
            f"{out} holds another ablation (hash {old}, this one is {hash_of(settings)}); give another --out"
        )


def by_model(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Return the settings that can share encodings: those of one model, dtype, task and text model (or none)."""
    groups: dict[str, list[Setting]] = {}
    first: dict[str, str] = {}
    for setting in sorted(settings, key=lambda setting: setting.experiment.reducer.text_model is None):
        one = setting.experiment
        key = json.dumps([one.model, one.dtype, as_config(one.task)], sort_keys=True)
        text_model = one.reducer.text_model or first.setdefault(key, "")
        first.setdefault(key, text_model)
        groups.setdefault(f"{key} {text_model}", []).append(setting)
    place = {id(setting): number for number, setting in enumerate(settings)}
    ordered = [sorted(group, key=lambda setting: place[id(setting)]) for group in groups.values()]
    return sorted(ordered, key=lambda group: place[id(group[0])])


def check(groups: Sequence[Sequence[Setting]]) -> None:
    """Look at all models and tasks of a grid before the first one runs.

    Args:
        groups: what `by_model` returns.

    Raises:
        ValueError: if a model or the data of a task cannot be had, or a strategy needs what its model cannot give.
    """
    wrong: list[str] = []
    outlines: dict[str, Any] = {}
    for group in groups:
        shared = group[0].experiment
        try:
            shared.task.check()
            if len(groups) == 1:  # the run itself looks at the model before its first sample
                break
            if shared.model not in outlines:
                outlines[shared.model] = outline(shared.model)
            wrong += lacking(outlines[shared.model], group)
        except (ValueError, LookupError, TypeError, OSError) as error:
            wrong.append(format_error(error))
    if wrong:
        raise ValueError("these settings cannot run:\n  " + "\n  ".join(dict.fromkeys(wrong)))


def shard_of(settings: Sequence[Setting], shard: str | None) -> list[Setting]:
    """Return the part of a grid that ``i/n`` names, i from 0.

    Raises:
        ValueError: if it is not of that form.
    """
    if shard is None:
        return list(settings)
    number, slash, total = shard.partition("/")
    if not (slash and number.isdigit() and total.isdigit() and int(number) < int(total)):
        raise ValueError(f"--shard {shard}: write i/n with i from 0 to n - 1, e.g. 0/4")
    return list(settings)[int(number) :: int(total)]


def ablate(
    path: str,
    out: Path,
    shard: str | None = None,
    workers: int = 1,
    tell: Callable[[Progress], None] = lambda progress: None,
    retry_errors: bool = False,
    images: int = IMAGES,
    fresh: bool = False,
) -> Progress:
    """Run an ablation, or go on with it.

    Under torchrun or accelerate (``RANK`` and ``WORLD_SIZE`` are set) this process takes its part of the images.

    Args:
        path: the YAML file.
        out: the run directory.
        shard: ``i/n`` takes every n-th setting from the i-th on.
        workers: processes that share the images, one a GPU where there are GPUs.
        tell: is told after every record.
        retry_errors: try the samples again that failed before.
        images: so many images of a model and task are stored for reports.
        fresh: discard the records that are there, and run all samples again.

    Raises:
        ValueError: if the configuration is not valid.
        IdentityError: if there are records of another model, data set, code or library version.
        InUseError: if another process runs the same settings.
        RuntimeError: if a worker failed.
    """
    config = load_config(path)
    everything = expand(config)
    rank, world = rank_and_world()
    if workers < 1:
        raise ValueError(f"--workers {workers}: give the number of processes, at least 1")
    if retry_errors and world > 1:
        raise ValueError("--retry-errors cannot be used under torchrun; run the command once without torchrun")
    if fresh and world > 1:
        raise ValueError("--fresh cannot be used under torchrun; run the command once without torchrun")
    groups = by_model(shard_of(everything, shard))
    check(groups)
    claim(out, config, everything)
    if fresh:
        discard_records(list(itertools.chain(*groups)), out)
    if retry_errors:
        for setting in itertools.chain(*groups):
            forget_errors(setting.folder(out))
    for group in groups:  # all of them before the first one runs
        check_records(group, out)
    if workers > 1 and world == 1:
        return _shared(path, shard, out, workers, tell, images)
    return _run(groups, out, rank, world, tell, images)


def _run(
    groups: Sequence[Sequence[Setting]],
    out: Path,
    rank: int,
    world: int,
    tell: Callable[[Progress], None],
    images: int,
) -> Progress:
    """Run the settings of each model and task, one after the other."""
    total = Progress(0)
    for group in groups:
        before = total

        def tell_all(now: Progress, before: Progress = before) -> None:
            tell(_added(before, now))

        total = _added(before, run_settings(group, out, rank, world, tell_all, images=images))
    return total


def _added(one: Progress, other: Progress) -> Progress:
    counts = ("total", "done", "errors", "images", "encodes", "more_encodes")
    return Progress(
        **{name: getattr(one, name) + getattr(other, name) for name in counts},
        setting=other.setting or one.setting,
        scores={**one.scores, **other.scores},
    )


def _of_workers(found: Sequence[Progress], setting: str) -> Progress:
    """Return the progress of processes that share the samples of the same settings."""
    whole = Progress(0)
    for one in found:
        whole = _added(whole, one)
    names = {name for one in found for name in one.scores}
    pairs = {name: [one.scores.get(name, (0.0, 0)) for one in found] for name in names}
    scores = {name: (sum(score for score, _ in of), sum(number for _, number in of)) for name, of in pairs.items()}
    return replace(whole, setting=setting, scores=scores)


SECONDS = 0.2
"""A worker says so often how far it is."""


def _work(path: str, shard: str | None, out: Path, rank: int, world: int, told: Any, images: int) -> None:
    """Run as one of several workers, which tells its parent how far it is and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    last = 0.0

    def tell(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS:
            told.put((rank, replace(progress, scores=dict(progress.scores))))
            last = time.monotonic()

    try:
        # Built anew from the file, which loads plug-ins too: their classes cannot be sent from process to process.
        groups = by_model(shard_of(expand(load_config(path)), shard))
        told.put((rank, _run(groups, out, rank, world, tell, images)))
    except Exception as error:
        print(f"tokenprune: worker {rank}: {format_error(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _shared(
    path: str, shard: str | None, out: Path, workers: int, tell: Callable[[Progress], None], images: int
) -> Progress:
    """Run several workers; the last one puts their records together."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [
        context.Process(target=_work, args=(path, shard, out, rank, workers, told, images), daemon=True)
        for rank in range(workers)
    ]
    found: dict[int, Progress] = {}

    def listen(seconds: float) -> bool:
        """Take one message; return whether there was one."""
        try:
            rank, found[rank] = told.get(timeout=seconds)
        except queue.Empty:
            return False
        tell(_of_workers([found[one] for one in sorted(found)], found[rank].setting))
        return True

    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            listen(SECONDS)
        while listen(SECONDS):
            pass
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"workers ended with {codes}; their messages are above. The same command goes on")
    return _of_workers([found[rank] for rank in sorted(found)], "")
