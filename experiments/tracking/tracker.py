"""Tracks experiments on Weights & Biases, without ever failing or blocking an experiment.

A `Tracker` logs records, selections and numbers, and does not depend on the code that runs experiments. Without an API
key it logs offline and prints the command for a later upload. If wandb raises an error, the tracker logs one warning
and is inactive from then on.

Names in the run: `eval/*` (over `eval/tokens_kept`) and `perf/*` hold the results, `progress/*` the progress of the
run, `samples/predictions` the table of answers, and `vis/*` images. Images are not in `eval/`, because wandb's metric
rules for `eval/*` would also apply to them.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec
from urllib.parse import urlsplit

from tokenprune.experiments.analysis.pareto import pareto_front
from tokenprune.experiments.tracking.values import (
    CLASSES,
    STEP,
    TIMES,
    flatten_summary,
    image_and_mask,
    is_number,
    summarize_records,
    to_cell,
    to_path_name,
)

if TYPE_CHECKING:
    from tokenprune.selection import Selection


P = ParamSpec("P")
log = logging.getLogger(__name__)
COLUMNS = (
    *("sample", "group", "question", "answer", "prediction", "score", "correct", "type", "split"),
    *("asked", "kept", "valid", "prompt_length", "prompt_length_full", "image", "error"),
)
"""Columns of the table of answers, equal to the names of record fields."""
MAX_IMAGES = 50
"""Maximum number of overlays of one run; with more, wandb's pages become slow."""
MAX_ROWS = 10_000
"""Maximum number of rows that wandb shows of a table; the files of the run hold all records."""
INIT_TIMEOUT, FINISH_TIMEOUT = 30.0, 300.0
"""Seconds to wait for the server before the run goes offline, and for the upload at the end (wandb >= 0.31)."""


def has_key() -> bool:
    """Return whether wandb can find an API key or a token in the environment or in a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    netrc_file = os.environ.get("NETRC")
    for file in [Path(netrc_file)] if netrc_file else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            return host in netrc.netrc(file).hosts
    return False


def wandb_mode() -> str:
    """Return wandb's mode: WANDB_MODE if set, otherwise online with a key and offline without one."""
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def _harmless(method: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    """Return a method that turns an exception into a warning and deactivates the tracker; skipped if inactive."""

    @wraps(method)
    def guarded(self: Tracker, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if not self.active:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # no error of wandb may stop the experiment
            self._deactivate(error)

    return guarded


@dataclass
class Tracker:
    """One run on Weights & Biases.

    Args:
        project: the project. None disables tracking, unless a sweep agent runs the program and sets the project.
        group: name of a group of runs, such as the name of an ablation.
        tags: words to filter by, such as strategy and model.
        job_type: kind of the run.
        name: name of the run; by default, wandb generates a name.
        config: the resolved configuration, nested.
        directory: folder in which wandb creates its folder `wandb`.

    Example:
        >>> with track_run("my-project", directory="runs") as tracker:  # doctest: +SKIP
        ...     tracker.log_record({"sample": "a", "score": 1.0, "kept": 58})
        ...     tracker.finish()
    """

    project: str | None
    group: str | None = None
    tags: Sequence[str] = ()
    job_type: str = "evaluate"
    name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    directory: str | Path = "."

    def __post_init__(self) -> None:
        """Initialize an inactive tracker without records."""
        self.active = False
        self._run: Any = None
        self._offline = False
        self._records: list[dict[str, Any]] = []
        self._score = 0.0
        self._errors = self._images = 0

    @property
    def folder(self) -> Path | None:
        """Local folder of the run, the argument of `wandb sync` for an offline run."""
        return None if self._run is None else Path(self._run.dir).parent

    def start(self) -> None:
        """Start the run. Does nothing with WANDB_MODE=disabled or without a project."""
        if self.active or wandb_mode() == "disabled":
            return
        self.active = bool(self.project or os.environ.get("WANDB_SWEEP_ID"))
        self._start()

    @_harmless
    def _start(self) -> None:
        mode = wandb_mode()
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._init(mode)
        except ImportError:
            raise
        except Exception as error:
            # There is a key, but the server does not respond: log offline for a later upload.
            if mode != "online":
                raise
            self._run = self._init("offline")
            mode = f"offline ({_one_line(error)})"
        self._offline = mode.startswith("offline")
        # Sweep parameters are read-only; wandb drops other values of the same name, with one warning each.
        sweep_keys = set(self._run.config.keys())
        config = {f"resolved.{key}" if key in sweep_keys else key: value for key, value in self.config.items()}
        self._run.config.update(config)
        self._run.define_metric(STEP)
        self._run.define_metric("eval/*", step_metric=STEP)
        self._run.define_metric("perf/*", step_metric=STEP)
        self._run.define_metric("progress/samples")
        self._run.define_metric("progress/*", step_metric="progress/samples")
        if self._offline:  # a warning, so that it is shown and the run can be found
            log.warning("W&B logs %s; upload later with: wandb sync %s", mode, self.folder)

    def _init(self, mode: str) -> Any:
        import wandb

        options: dict[str, Any] = {
            "console": "off",  # do not redirect the output of the program
            "quiet": True,
            "silent": mode == "offline",  # start() logs the folder; online, wandb prints the address of the run
            "init_timeout": INIT_TIMEOUT,
            "finish_timeout": FINISH_TIMEOUT,
        }
        supported = getattr(wandb.Settings, "model_fields", options)
        return wandb.init(
            project=self.project,
            group=self.group,
            tags=[tag[:64] for tag in self.tags],  # wandb rejects longer tags
            job_type=self.job_type,
            name=self.name,
            dir=str(self.directory),
            mode=mode,  # type: ignore[arg-type]  # wandb validates the mode
            reinit="create_new",  # do not change an existing run of the caller
            settings=wandb.Settings(**{key: value for key, value in options.items() if key in supported}),
        )

    @_harmless
    def log_record(self, record: Mapping[str, Any]) -> None:
        """Log the result of one sample.

        Args:
            record: a record of an experiment: sample, question, answer, prediction, score, kept, error, ...
        """
        self._records.append(dict(record))
        values: dict[str, Any] = {"progress/samples": len(self._records)}
        if record.get("error"):
            self._errors += 1
        else:
            self._score += record.get("score", 0.0)
            values["progress/score"] = self._score / (len(self._records) - self._errors)
            values |= {f"progress/{key}": record[key] for key in ("kept", *TIMES) if record.get(key) is not None}
        values["progress/errors"] = self._errors
        self._run.log(values)

    @_harmless
    def log_overlay(self, name: str, selection: Selection) -> None:
        """Log an image with masks of its kept tokens, dropped tokens and padding.

        Args:
            name: name of the sample.
            selection: the selection, with pixels; without pixels, nothing is logged.
        """
        if selection.pixels is None:
            log.info("W&B: no image of %s, because the selection has no pixels", name)
            return
        self._images += 1
        if self._images > MAX_IMAGES:
            if self._images == MAX_IMAGES + 1:
                log.warning("W&B receives only the first %d images of a run", MAX_IMAGES)
            return
        import wandb

        pixels, mask = image_and_mask(selection)
        caption = f"{name}: {selection.kept_tokens} kept of {selection.asked} asked {selection.kept_per_tile}"
        masks = {"tokens": {"mask_data": mask, "class_labels": CLASSES}}
        self._run.log({f"vis/selection/{to_path_name(name)}": wandb.Image(pixels, caption=caption, masks=masks)})

    @_harmless
    def log_pareto(self, points: Sequence[Mapping[str, Any]], name: str = "pareto") -> None:
        """Log the score over kept tokens of several experiments as a table and as a plot.

        Args:
            points: mappings with name, kept, score and further columns of the table.
            name: name of the plot.
        """
        if not points:
            return
        import wandb

        columns = list(dict.fromkeys(key for point in points for key in point))
        front = set(pareto_front([(point["kept"], point["score"]) for point in points]))
        rows = [[*(to_cell(point.get(key)) for key in columns), number in front] for number, point in enumerate(points)]
        table = wandb.Table(columns=[*columns, "front"], data=rows, allow_mixed_types=True)
        title = "Score over kept visual tokens"
        self._run.log({f"vis/{to_path_name(name)}": wandb.plot.scatter(table, x="kept", y="score", title=title)})

    def finish(self, summary: Mapping[str, Any] | None = None, files: Sequence[str | Path] = ()) -> None:
        """Log the results and end the run.

        A number of the summary becomes `perf/NAME` if its name denotes a time, a size or a rate, and `eval/NAME`
        otherwise. Nested mappings become `NAME/KEY`. Values that are no numbers are stored in wandb's summary. Unless
        the summary has them, `eval/score`, `eval/errors`, `eval/tokens_kept` and the median times come from the
        records.

        Args:
            summary: results of the run.
            files: files to upload with the run, such as the configuration and the records.
        """
        self._finish(summary or {}, files)
        self.close()

    @_harmless
    def _finish(self, summary: Mapping[str, Any], files: Sequence[str | Path]) -> None:
        import wandb

        results = summarize_records(self._records) | flatten_summary(summary)
        numbers = {key: value for key, value in results.items() if is_number(value)}
        if numbers:
            self._run.log(numbers)
        self._run.summary.update({key: to_cell(value) for key, value in results.items() if key not in numbers})
        if self._records:
            if len(self._records) > MAX_ROWS:
                log.warning("The W&B table shows the first %d of %d answers", MAX_ROWS, len(self._records))
            rows = [[to_cell(record.get(key)) for key in COLUMNS] for record in self._records[:MAX_ROWS]]
            table = wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)
            self._run.log({"samples/predictions": table})
        existing = [Path(file) for file in files if Path(file).is_file()]
        for file in files:
            if Path(file) not in existing:
                log.warning("W&B: %s does not exist and is not uploaded", file)
        if existing:
            artifact = wandb.Artifact(f"experiment-{self._run.id}", type="experiment")
            for file in existing:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)

    def close(self, failed: bool = False) -> None:
        """End the run if it is active.

        Args:
            failed: whether to mark the run as failed.
        """
        self._close(1 if failed else 0)
        self.active = False

    @_harmless
    def _close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def _deactivate(self, error: Exception) -> None:
        self.active = False
        hint = "; pip install wandb" if isinstance(error, ModuleNotFoundError) and error.name == "wandb" else ""
        log.warning("W&B failed, so the run continues without it: %s%s", _one_line(error), hint)
        with suppress(Exception):  # earlier values can still be saved
            if self._run is not None:
                self._run.finish(exit_code=1)


@contextmanager
def track_run(project: str | None, **options: Any) -> Iterator[Tracker]:
    """Start a tracker for a block and end it afterwards; after an exception, the run is marked as failed.

    Args:
        project: the project; None disables tracking, unless a sweep agent runs the program.
        options: further arguments of `Tracker`.
    """
    tracker = Tracker(project, **options)
    tracker.start()
    try:
        yield tracker
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
