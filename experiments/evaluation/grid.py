"""Ablations: a grid over options of an experiment, with the standard baselines."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from tokenprune.cli.errors import MultipleUserError
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.cli.parsing import format_error, prepare_arguments, read_yaml
from tokenprune.configuration import as_config
from tokenprune.decoder_reducer import AtLayer, DecoderReducer
from tokenprune.display import format_count
from tokenprune.experiments.evaluation.experiment import (
    Experiment,
    Progress,
    Setting,
    check_records,
    discard_records,
    list_unsupported,
    rank_and_world,
)
from tokenprune.experiments.evaluation.loading import build_without_weights
from tokenprune.experiments.evaluation.records import remove_failed, write_atomically
from tokenprune.experiments.evaluation.stored_images import IMAGES
from tokenprune.experiments.evaluation.tasks import Task, tasks
from tokenprune.experiments.evaluation.workers import run_groups, run_workers
from tokenprune.reducer import Composed, TokenReducer
from tokenprune.registry import suggest_name
from tokenprune.strategies import BaseTileOnly, ImageDownsample, Random, SpatialPooling, UniformStride

EXPERIMENT_KEYS = tuple(item.name for item in fields(Experiment))
"""Keys of an experiment."""
ABLATION_KEYS: Mapping[str, str] = {
    "grid": "options of an experiment, each with a list of values; all combinations are run",
    "baselines": "whether the standard baselines are added at every budget; default: true",
    "random_seeds": "number of seeds of the baseline with random tokens; default: 3",
}
"""Keys of an ablation, in addition to the keys of an experiment, and their meanings."""


def resolve_args(name: str, value: Any) -> list[str]:
    """Return the arguments of an option, with class names resolved."""
    text = value if isinstance(value, str) else json.dumps(value)
    return prepare_arguments([f"--{name}", text], {"task": (Task, tasks())})


def parse_experiment(argv: Sequence[str], parser: ArgumentParser | None = None) -> Experiment:
    """Return the experiment of a command line.

    Args:
        argv: the arguments after the command.
        parser: a parser with the options of an experiment; None builds one.

    Raises:
        UserError: if an option is not valid.
    """
    parser = parser or build_parser("tokenprune evaluate", "", Experiment, file=True)
    return select_fields(Experiment, parse_options(parser, argv, {"task": (Task, tasks())}))


def format_value(value: Any) -> str:
    """Return a value of a grid as text for tables."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = ", ".join(f"{name}={format_value(entry)}" for name, entry in (value.get("init_args") or {}).items())
        short = str(value["class_path"]).rpartition(".")[2]
        return f"{short}({arguments})" if arguments else short
    return str(value)


def to_cli_args(name: str, value: Any) -> list[str]:
    """Return the command-line arguments of an option, nested values as JSON."""
    option = "--" + name.replace("_", "-") if "." not in name else f"--{name}"
    return [option, value if isinstance(value, str) else json.dumps(value)]


def expand(config: Mapping[str, Any]) -> list[Setting]:
    """Return all settings of an ablation: the grid, then the baselines unless they are switched off.

    Args:
        config: the keys of an experiment, and ``grid`` (options to lists of values), ``baselines`` (default true) and
            ``random_seeds`` (default 3).

    Raises:
        ValueError: if a key is unknown or combinations are not valid; the error lists all of them.
    """
    allowed = [*EXPERIMENT_KEYS, *ABLATION_KEYS]
    if unknown := [key for key in config if key not in allowed]:
        hint = suggest_name(str(unknown[0]), allowed)
        raise ValueError(f"there is no key {unknown[0]!r} in an ablation{hint}; it has {', '.join(allowed)}")
    grid: Mapping[str, Any] = config.get("grid") or {}
    for option, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{option}: give a list of values, e.g. [0.1, 0.2], not {values!r}")
    plugins = [word for plugin in config.get("plugin") or [] for word in ("--plugin", plugin)]
    options = {name: value for name, value in config.items() if name in EXPERIMENT_KEYS and name != "plugin"}
    base = [word for name, value in options.items() for word in to_cli_args(name, value)]
    parser = build_parser("tokenprune evaluate", "", Experiment, file=True)
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    for values in itertools.product(*grid.values()):
        factors = dict(zip(grid, values, strict=True))
        factor_text = ", ".join(
            f"{option.removeprefix('reducer.')}={format_value(value)}" for option, value in factors.items()
        )
        try:
            overrides = [word for option, value in factors.items() for word in to_cli_args(option, value)]
            replaced = {f"--{option.replace('_', '-')}" for option in factors}
            defaults = [word for n in range(0, len(base), 2) for word in base[n : n + 2] if base[n] not in replaced]
            experiment = parse_experiment([*plugins, *defaults, *overrides], parser)
        except Exception as error:
            problems.append(f"{factor_text or 'the experiment'}: {format_error(error)}")
            continue
        parts = [] if "reducer" in factors else [experiment.reducer.label]
        name = ", ".join([*parts, *([factor_text] if factor_text else [])])
        formatted = {option: format_value(value) for option, value in factors.items()}
        settings.setdefault(experiment.hash(), Setting(experiment, name, "grid", formatted))
    if problems:
        raise MultipleUserError(
            f"{format_count(len(problems), 'setting')} of the grid {'is' if len(problems) == 1 else 'are'} not valid",
            problems,
        )
    if config.get("baselines", True):
        for setting in baselines(
            [setting.experiment for setting in settings.values()], int(config.get("random_seeds", 3))
        ):
            settings.setdefault(setting.experiment.hash(), setting)
    return list(settings.values())


def baselines(experiments: Sequence[Experiment], seeds: int) -> Iterator[Setting]:
    """Yield the baselines: all tokens, and for each budget random, strided, base-tile, pooled and downsampled tokens.

    Strategies inside the LLM and compositions are compared with random and strided tokens at the same stages, after the
    same strategies before and inside the vision tower.

    Args:
        experiments: the experiments of the grid.
        seeds: number of seeds of random selection.
    """
    by_context = {json.dumps(as_config(replace(e, reducer=UniformStride(1.0)))): e for e in experiments}
    for experiment in by_context.values():
        yield Setting(replace(experiment, reducer=UniformStride(1.0)), "full tokens", "full")
    by_budget: dict[str, Experiment] = {}
    for experiment in experiments:
        strided = replace_strategy(experiment.reducer, UniformStride)
        if strided is not None:
            by_budget[json.dumps(as_config(replace(experiment, reducer=strided)))] = experiment
    for experiment in by_budget.values():
        budget = as_config(experiment.reducer.budget_label)
        makers: list[tuple[str, Callable[..., TokenReducer]]] = [
            *((f", seed {seed}", partial(Random.seeded, seed=seed)) for seed in range(seeds)),
            ("", UniformStride),
        ]
        parts = experiment.reducer.list_parts()
        if len(parts) == 1 and not isinstance(parts[0], DecoderReducer):
            makers += [("", kind) for kind in (BaseTileOnly, SpatialPooling, ImageDownsample)]
        for suffix, make in makers:
            reducer = replace_strategy(experiment.reducer, make)
            if reducer is not None:
                name = f"{reducer.label}{suffix}, budget={format_value(budget)}"
                yield Setting(replace(experiment, reducer=reducer), name, "baseline", {"reducer.budget": budget})


def replace_strategy(reducer: TokenReducer, make: Callable[..., TokenReducer]) -> TokenReducer | None:
    """Return another strategy with the budgets and cuts of a strategy; None if a part has several cuts.

    Args:
        reducer: the strategy; each part of a composition is replaced, except parts before and inside the vision tower.
        make: returns a strategy of the projector stage with a budget.
    """
    parts: list[TokenReducer] = []
    is_composed = len(reducer.list_parts()) > 1
    for part in reducer.list_parts():
        if is_composed and part.stage.reduces_patches:
            parts.append(part)
        elif not isinstance(part, DecoderReducer):
            parts.append(make(part.budget))
        elif len(part.cuts) == 1:
            parts.append(AtLayer(part.cuts[0].layer, make(part.cuts[0].budget), positions=part.positions))
        else:
            return None
    return parts[0] if len(parts) == 1 else Composed(parts)


def load_config(path: str) -> dict[str, Any]:
    """Return the content of the YAML file of an ablation.

    Raises:
        ValueError: if there is no such file, or it holds no mapping.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give the YAML file of an ablation")
    try:
        config = read_yaml(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not config:
        raise ValueError(f"{path} holds no mapping; an ablation has keys such as model, task, reducer and grid")
    return config


def hash_settings(settings: Sequence[Setting]) -> str:
    """Return a 12-character hash of the experiments of an ablation; the notation in its file does not change it."""
    return hashlib.sha256(" ".join(sorted(setting.experiment.hash() for setting in settings)).encode()).hexdigest()[:12]


def claim_directory(out: Path, config: Mapping[str, Any], settings: Sequence[Setting]) -> None:
    """Write the configuration of an ablation into its run directory, or compare it with the file there.

    Args:
        out: the run directory.
        config: the content of the YAML file.
        settings: the result of `expand`.

    Raises:
        ValueError: if the directory belongs to another ablation.
    """
    file = out / "ablation.yaml"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, yaml.safe_dump(dict(config), sort_keys=True))
        return
    existing = load_config(str(file))
    if existing == config:
        return
    try:
        old = hash_settings(expand(existing))
    except (ValueError, LookupError):
        old = "not known: it is not valid any more"
    if old != hash_settings(settings):
        raise ValueError(
            f"{out} holds another ablation (hash {old}, this one is {hash_settings(settings)}); give another --out"
        )


def group_by_model(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Return the settings in groups that share encodings: equal model, dtype and task, and equal or no text model."""
    groups: dict[str, list[Setting]] = {}
    first: dict[str, str] = {}
    for setting in sorted(settings, key=lambda setting: setting.experiment.reducer.text_model is None):
        experiment = setting.experiment
        key = json.dumps([experiment.model, experiment.dtype, as_config(experiment.task)], sort_keys=True)
        text_model = experiment.reducer.text_model or first.setdefault(key, "")
        first.setdefault(key, text_model)
        groups.setdefault(f"{key} {text_model}", []).append(setting)
    position = {id(setting): number for number, setting in enumerate(settings)}
    ordered = [sorted(group, key=lambda setting: position[id(setting)]) for group in groups.values()]
    return sorted(ordered, key=lambda group: position[id(group[0])])


def check_groups(groups: Sequence[Sequence[Setting]]) -> None:
    """Check all models and tasks of a grid before the first sample.

    Args:
        groups: the result of `group_by_model`.

    Raises:
        ValueError: if a model or the data of a task cannot be loaded, or a model lacks a signal of a strategy.
    """
    problems: list[str] = []
    models: dict[str, Any] = {}
    for group in groups:
        shared = group[0].experiment
        try:
            shared.task.check()
            if len(groups) == 1:  # the run checks the model before its first sample
                break
            if shared.model not in models:
                models[shared.model] = build_without_weights(shared.model)
            problems += list_unsupported(models[shared.model], group)
        except (ValueError, LookupError, TypeError, OSError) as error:
            problems.append(format_error(error))
    if problems:
        raise MultipleUserError("these settings cannot run", list(dict.fromkeys(problems)))


def select_shard(settings: Sequence[Setting], shard: str | None) -> list[Setting]:
    """Return every n-th setting from the i-th on, for a shard ``i/n`` with i from 0; all settings for None.

    Raises:
        ValueError: if `shard` has another form.
    """
    if shard is None:
        return list(settings)
    number, slash, total = shard.partition("/")
    if not (slash and number.isdigit() and total.isdigit() and int(number) < int(total)):
        raise ValueError(f"--shard {shard}: write i/n with i from 0 to n - 1, e.g. 0/4")
    return list(settings)[int(number) :: int(total)]


def load_groups(path: str, shard: str | None) -> list[list[Setting]]:
    """Return the settings of a shard of an ablation file, grouped by model and task.

    Args:
        path: the YAML file; its plug-ins are loaded.
        shard: ``i/n`` takes every n-th setting from the i-th on.
    """
    return group_by_model(select_shard(expand(load_config(path)), shard))


def ablate(
    path: str,
    out: Path,
    shard: str | None = None,
    workers: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    retry_errors: bool = False,
    images: int = IMAGES,
    fresh: bool = False,
) -> Progress:
    """Run an ablation, or continue it.

    Under torchrun or accelerate (``RANK`` and ``WORLD_SIZE`` are set), this process runs its part of the images.

    Args:
        path: the YAML file.
        out: the run directory.
        shard: ``i/n`` takes every n-th setting from the i-th on.
        workers: number of processes that share the images, one per GPU if there are GPUs.
        on_progress: called after every record.
        retry_errors: run samples again that failed before.
        images: number of images of a model and task that are stored for reports.
        fresh: delete existing records, and run all samples again.

    Raises:
        ValueError: if the configuration is not valid.
        IdentityError: if existing records belong to another model, data set, code or library version.
        InUseError: if another process runs the same settings.
        RuntimeError: if a worker failed.
    """
    config = load_config(path)
    settings = expand(config)
    rank, world = rank_and_world()
    if workers < 1:
        raise ValueError(f"--workers {workers}: give the number of processes, at least 1")
    if retry_errors and world > 1:
        raise ValueError("--retry-errors cannot be used under torchrun; run the command once without torchrun")
    if fresh and world > 1:
        raise ValueError("--fresh cannot be used under torchrun; run the command once without torchrun")
    groups = group_by_model(select_shard(settings, shard))
    check_groups(groups)
    claim_directory(out, config, settings)
    if fresh:
        discard_records(list(itertools.chain(*groups)), out)
    if retry_errors:
        for setting in itertools.chain(*groups):
            remove_failed(setting.folder(out))
    for group in groups:  # all groups before the first one runs
        check_records(group, out)
    if workers > 1 and world == 1:
        return run_workers(partial(load_groups, path, shard), out, workers, on_progress, images)
    return run_groups(groups, out, rank, world, on_progress, images)
