"""Weights & Biases, in a way that no experiment ever fails or waits because of it.

A `Tracker` knows records, selections and numbers, and nothing of how experiments are run. Without a key it works
offline and says how to upload later. Whatever wandb does wrong becomes one warning, and the tracker does nothing from
then on.

Names in the run: `eval/*` (over `eval/tokens_kept`) and `perf/*` hold the results, `progress/*` the course of the run,
`samples/predictions` the table of answers, `vis/*` images. Media stay out of `eval/`, since wandb's rules for
`eval/*` would catch them too.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec
from urllib.parse import urlsplit

import numpy as np

from tokenprune.experiments.analysis.stats import pareto

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tokenprune.selection import Selection

P = ParamSpec("P")

log = logging.getLogger(__name__)

STEP = "eval/tokens_kept"
"""The x-axis of all results: what a method keeps is what it costs."""
COLUMNS = (
    *("sample", "group", "question", "answer", "prediction", "score", "correct", "type", "split"),
    *("asked", "kept", "valid", "prompt_length", "prompt_length_full", "image", "error"),
)
"""Columns of the table of answers; the fields of a record by the same names."""
TIMES = ("encode_ms", "select_ms", "generate_ms")
CLASSES = {1: "kept", 2: "dropped", 3: "padding"}
"""Classes of the mask over an image; 0 is the space between tiles."""
GAP = 8
"""Pixels between tiles."""
MAX_IMAGES = 50
"""Overlays of one run; with more, wandb's pages get slow."""
MAX_ROWS = 10_000
"""Rows of a table that wandb shows; all records belong in the files of the run."""
INIT_TIMEOUT, FINISH_TIMEOUT = 30.0, 300.0
"""Seconds to wait for the server before the run goes offline, and for the upload at the end (wandb >= 0.31)."""


def has_key() -> bool:
    """Whether wandb would find an API key or a token by itself."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    given = os.environ.get("NETRC")
    for file in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            return host in netrc.netrc(file).hosts
    return False


def chosen_mode() -> str:
    """Return wandb's mode: WANDB_MODE if set, otherwise online with a key and offline without one."""
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def _harmless(method: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    """Turn an exception of a method of an active tracker into a warning, after which the tracker does nothing."""

    @wraps(method)
    def guarded(self: Tracker, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if not self.active:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # whatever it is, results matter more
            self._give_up(error)

    return guarded


@dataclass
class Tracker:
    """One run on Weights & Biases.

    Args:
        project: the project; None tracks nothing, unless a sweep agent runs the program, which names the project.
        group: what belongs together, such as the name of an ablation.
        tags: words to filter by, such as strategy and model.
        job_type: what the run does.
        name: name of the run; wandb makes one up if left out.
        config: the resolved configuration, nested.
        directory: folder in which wandb makes its folder `wandb`.
    """

    project: str | None
    group: str | None = None
    tags: Sequence[str] = ()
    job_type: str = "evaluate"
    name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    directory: str | Path = "."

    def __post_init__(self) -> None:
        """Begin without a run and without records."""
        self.active = False
        self._run: Any = None
        self._offline = False
        self._records: list[dict[str, Any]] = []
        self._score = 0.0
        self._errors = self._images = 0

    @property
    def folder(self) -> Path | None:
        """Folder of the run on this machine; what `wandb sync` takes if the run is offline."""
        return None if self._run is None else Path(self._run.dir).parent

    def start(self) -> None:
        """Start the run; nothing happens under WANDB_MODE=disabled or without a project."""
        if self.active or chosen_mode() == "disabled":
            return
        self.active = bool(self.project or os.environ.get("WANDB_SWEEP_ID"))
        self._start()

    @_harmless
    def _start(self) -> None:
        mode = chosen_mode()
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._init(mode)
        except ImportError:
            raise
        except Exception as error:
            # A key but no server: what is recorded now can still be uploaded later.
            if mode != "online":
                raise
            self._run = self._init("offline")
            mode = f"offline ({_one_line(error)})"
        self._offline = mode.startswith("offline")
        # A sweep owns its parameters; wandb would drop ours of the same name with a warning each.
        owned = set(self._run.config.keys())
        own = {f"resolved.{key}" if key in owned else key: value for key, value in self.config.items()}
        self._run.config.update(own)
        self._run.define_metric(STEP)
        self._run.define_metric("eval/*", step_metric=STEP)
        self._run.define_metric("perf/*", step_metric=STEP)
        self._run.define_metric("progress/samples")
        self._run.define_metric("progress/*", step_metric="progress/samples")
        if self._offline:  # a warning, since without it nobody finds the run
            log.warning("W&B works %s; upload later with: wandb sync %s", mode, self.folder)

    def _init(self, mode: str) -> Any:
        import wandb

        wanted: dict[str, Any] = {
            "console": "off",  # the program's output is not ours to redirect
            "quiet": True,
            "silent": mode == "offline",  # start() says where it is; online, wandb prints the address of the run
            "init_timeout": INIT_TIMEOUT,
            "finish_timeout": FINISH_TIMEOUT,
        }
        known = getattr(wandb.Settings, "model_fields", wanted)
        return wandb.init(
            project=self.project,
            group=self.group,
            tags=[tag[:64] for tag in self.tags],  # wandb refuses longer ones
            job_type=self.job_type,
            name=self.name,
            dir=str(self.directory),
            mode=mode,  # type: ignore[arg-type]  # wandb says itself what it does not know
            reinit="create_new",  # a run of the caller's own stays what it is
            settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
        )

    @_harmless
    def record(self, record: Mapping[str, Any]) -> None:
        """Note the result of one sample.

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
    def overlay(self, name: str, selection: Selection) -> None:
        """Log an image whose kept tokens, dropped tokens and padding can be switched on and off.

        Args:
            name: name of the sample.
            selection: the selection, with pixels; without them nothing is logged.
        """
        if selection.pixels is None:
            log.info("W&B: %s has no image: the selection carries no pixels", name)
            return
        self._images += 1
        if self._images > MAX_IMAGES:
            if self._images == MAX_IMAGES + 1:
                log.warning("W&B gets the first %d images of a run only", MAX_IMAGES)
            return
        import wandb

        pixels, mask = image_and_mask(selection)
        caption = f"{name}: {selection.kept_tokens} kept of {selection.asked} asked {selection.kept_per_tile}"
        masks = {"tokens": {"mask_data": mask, "class_labels": CLASSES}}
        self._run.log({f"vis/selection/{_plain(name)}": wandb.Image(pixels, caption=caption, masks=masks)})

    @_harmless
    def pareto(self, points: Sequence[Mapping[str, Any]], name: str = "pareto") -> None:
        """Log score over kept tokens of several experiments, as a table and as a plot.

        Args:
            points: mappings with name, kept and score, and whatever else belongs in the table.
            name: name of the plot.
        """
        if not points:
            return
        import wandb

        columns = list(dict.fromkeys(key for point in points for key in point))
        front = set(pareto([(point["kept"], point["score"]) for point in points]))
        rows = [
            [*(_setting(point.get(key)) for key in columns), number in front] for number, point in enumerate(points)
        ]
        table = wandb.Table(columns=[*columns, "front"], data=rows, allow_mixed_types=True)
        title = "Score over kept visual tokens"
        self._run.log({f"vis/{_plain(name)}": wandb.plot.scatter(table, x="kept", y="score", title=title)})

    def finish(self, summary: Mapping[str, Any] | None = None, files: Sequence[str | Path] = ()) -> None:
        """Log the results and end the run.

        Numbers of the summary become `perf/NAME` if the name says a time, a size or a rate, and `eval/NAME` otherwise;
        mappings in it become `NAME/KEY`; the rest is kept in wandb's summary as it is. `eval/score`, `eval/errors`,
        `eval/tokens_kept` and the median times come from the records unless the summary has them.

        Args:
            summary: results of the whole run.
            files: files to keep beside it, such as the configuration and the records.
        """
        self._finish(summary or {}, files)
        self.close()

    @_harmless
    def _finish(self, summary: Mapping[str, Any], files: Sequence[str | Path]) -> None:
        import wandb

        results = from_records(self._records) | metrics(summary)
        numbers = {key: value for key, value in results.items() if _is_number(value)}
        if numbers:
            self._run.log(numbers)
        self._run.summary.update({key: _setting(value) for key, value in results.items() if key not in numbers})
        if self._records:
            if len(self._records) > MAX_ROWS:
                log.warning("W&B shows the first %d of %d answers in its table", MAX_ROWS, len(self._records))
            rows = [[_setting(one.get(key)) for key in COLUMNS] for one in self._records[:MAX_ROWS]]
            table = wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)
            self._run.log({"samples/predictions": table})
        there = [Path(file) for file in files if Path(file).is_file()]
        for file in files:
            if Path(file) not in there:
                log.warning("W&B: %s is not there to be kept", file)
        if there:
            artifact = wandb.Artifact(f"experiment-{self._run.id}", type="experiment")
            for file in there:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)

    def close(self, failed: bool = False) -> None:
        """End the run if it has not ended.

        Args:
            failed: whether it is marked as failed.
        """
        self._close(1 if failed else 0)
        self.active = False

    @_harmless
    def _close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def _give_up(self, error: Exception) -> None:
        self.active = False
        hint = "; pip install wandb" if isinstance(error, ModuleNotFoundError) and error.name == "wandb" else ""
        log.warning("W&B does not work, so the run goes on without it: %s%s", _one_line(error), hint)
        with suppress(Exception):  # what was logged before may still be saved
            if self._run is not None:
                self._run.finish(exit_code=1)


@contextmanager
def tracked(project: str | None, **options: Any) -> Iterator[Tracker]:
    """Track what happens inside the block; a run that ends by an exception is marked as failed.

    Args:
        project: the project; None tracks nothing, unless a sweep agent runs the program.
        options: the other arguments of `Tracker`.
    """
    tracker = Tracker(project, **options)
    tracker.start()
    try:
        yield tracker
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close()


def metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary under wandb's names: `eval/...` and `perf/...`.

    Args:
        summary: results; nested mappings become paths, and a name with a slash stays as it is.
    """
    flat: dict[str, Any] = {}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}/", value)
            else:
                flat[f"{prefix}{key}"] = value

    walk("", summary)
    return {_place(key): value for key, value in flat.items()}


def from_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the records say by themselves: mean score, errors, kept tokens and median times in milliseconds.

    Args:
        records: records; those with an error count as errors only.
    """
    valid = [one for one in records if not one.get("error")]

    def column(key: str) -> list[float]:
        return [one[key] for one in valid if _is_number(one.get(key))]

    found: dict[str, Any] = {"eval/samples": len(records), "eval/errors": len(records) - len(valid)} if records else {}
    means = {"eval/score": "score", STEP: "kept"}
    found |= {name: fmean(values) for name, key in means.items() if (values := column(key))}
    return found | {f"perf/{key}": median(values) for key in TIMES if (values := column(key))}


def image_and_mask(selection: Selection) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Lay the tiles out as the image was cut: the base tile at the left, the sub-images in their grid.

    Args:
        selection: the selection, with pixels.

    Returns:
        Pixels `[height, width, 3]` and the class of each pixel `[height, width]`, see `CLASSES`.

    Raises:
        ValueError: if the selection carries no pixels.
    """
    if selection.pixels is None:
        raise ValueError("this selection carries no pixels")
    tiles = selection.pixels.cpu().numpy()
    height, width = tiles.shape[1:3]
    rows, cols = selection.geometry.tile_grid
    token_rows, token_cols = selection.geometry.token_grid
    across = width + (2 * GAP + cols * (width + GAP) if rows else 0)
    down = max(rows, 1) * (height + GAP) - GAP
    pixels = np.full((down, across, 3), 255, dtype=np.uint8)
    mask = np.zeros((down, across), dtype=np.uint8)
    kept, valid = selection.kept.cpu().numpy(), selection.geometry.valid.cpu().numpy()
    row_of, col_of = np.arange(height) * token_rows // height, np.arange(width) * token_cols // width
    for number, tile in enumerate(tiles):
        row, col = divmod(number - 1, cols) if number else (0, 0)
        top = row * (height + GAP)
        left = width + 3 * GAP + col * (width + GAP) if number else 0
        classes = np.where(valid[number], np.where(kept[number], 1, 2), 3).reshape(token_rows, token_cols)
        pixels[top : top + height, left : left + width] = tile
        mask[top : top + height, left : left + width] = classes[row_of][:, col_of]
    return pixels, mask


def _place(key: str) -> str:
    """Return wandb's name for a key of a summary."""
    if key.startswith(("eval/", "perf/")):
        return key
    if key in ("kept", "tokens_kept", "mean_kept"):
        return STEP
    cost = re.search(r"(_ms|_s|_mb|_gb|_bytes|_flops|_per_second|throughput|memory|speedup)$", key)
    return f"{'perf' if cost else 'eval'}/{key}"


def _setting(value: Any) -> Any:
    """Return a value as something a table can hold: lists become text."""
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _plain(name: str) -> str:
    """Return a name as one part of a path."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "selection"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
