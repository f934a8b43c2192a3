"""Samples that only one of two settings answers correctly, with the tokens that each setting kept."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from tokenprune.experiments.analysis.report.blocks import Block, Heading, ImageRow, Text
from tokenprune.experiments.analysis.report.formatting import format_budget
from tokenprune.experiments.analysis.report.rows import group_by_context, list_budgets, method_rows
from tokenprune.experiments.analysis.results import Record, Results, Setting, find_full_setting
from tokenprune.experiments.evaluation.stored_images import cuts_from_record, selection_from_record
from tokenprune.selection import Selection
from tokenprune.viz import overlay

MAX_FAILURES = 3
"""Number of failures shown for each of the two settings."""
MAX_CHARACTERS = 600
"""Number of characters shown of a question or an answer."""


@dataclass(frozen=True, eq=False)
class Failure:
    """A sample that exactly one of two settings answers correctly.

    Args:
        records: the records of the two settings.
        full: the record with full tokens; `None` without a setting with full tokens.
        number: number of the failure in the report, from 1.
        selections: the selections of the two settings, with pixels; empty if they were not stored.
    """

    records: tuple[Record, Record]
    full: Record | None
    number: int
    selections: tuple[Selection, ...] = ()

    def images(self) -> dict[str, Image.Image]:
        """Return the image and the drawings of both selections, by path relative to the report."""
        if not self.selections:
            return {}
        pairs = zip(self.records, self.selections, strict=True)
        drawings = [overlay(selection, cuts=cuts_from_record(record, selection)) for record, selection in pairs]
        images = [full_resolution_image(self.selections[0]), *drawings]
        return dict(zip(self.paths, images, strict=True))

    @property
    def paths(self) -> list[str]:
        """Paths of the image files, relative to the report."""
        return [f"figures/failure-{self.number}-{name}.png" for name in ("image", "first", "second")]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two settings with the samples that only one of them answers correctly.

    Args:
        settings: the two settings.
        names: names of their table rows.
        reason: reason for the choice of these settings.
        has_full: whether a setting with full tokens exists.
        only_correct: number of samples that only the first, and only the second setting answers correctly. If there
            are full tokens, only samples that they answer correctly count.
        n_common: number of samples that all compared settings have without an error.
        failures: the failures to show.
        missing_images: reason why no image is shown; empty if images are shown.
    """

    settings: tuple[Setting, Setting]
    names: tuple[str, str]
    reason: str
    has_full: bool
    only_correct: tuple[int, int]
    n_common: int
    failures: Sequence[Failure] = field(default_factory=list)
    missing_images: str = ""


def compare_failures(results: Results, names: Sequence[str] | None = None) -> list[Comparison]:
    """Return a comparison of the failures of two settings for each context, or only for the named settings.

    Args:
        results: the settings of a run directory.
        names: names or hashes of two settings. By default, `choose_pair` selects two settings of each context.

    Raises:
        ValueError: if a name matches no setting or several settings, or the settings differ in model or task.
    """
    if names is not None:
        first, second = (_find_setting(name, results.settings) for name in names)
        if first is second:
            raise ValueError(f"{names[0]} and {names[1]} are the same setting, {first.name}; give two to compare")
        if first.context != second.context:
            raise ValueError(f"{first.name} and {second.name} differ in model or task; give two that share them")
        members = group_by_context(results.settings)[first.context]
        return [_compare_pair(first, second, members, "as requested", results.directory, 1)]
    comparisons: list[Comparison] = []
    for members in group_by_context(results.settings).values():
        pair = choose_pair(members)
        if pair is not None:
            first, second, reason = pair
            n_failures = sum(len(comparison.failures) for comparison in comparisons)
            comparisons.append(_compare_pair(first, second, members, reason, results.directory, 1 + n_failures))
    return comparisons


def choose_pair(settings: Sequence[Setting]) -> tuple[Setting, Setting, str] | None:
    """Return the best setting at the smallest budget, the next setting with different answers, and the reason.

    Settings of the grid come before baselines. Methods differ most at the smallest budget. If a budget has fewer than
    two settings, the next budget is used. The result is `None` if no budget has two settings.

    Args:
        settings: the settings of one context.
    """
    for budget in list_budgets(settings):
        ranked = [s for s in settings if s.budget == budget and s.role != "full" and s.score.n]
        ranked.sort(key=lambda setting: (setting.role != "grid", -setting.score.mean))
        if len(ranked) < 2:
            continue
        first, candidates = ranked[0], ranked[1:]
        second = next((s for s in candidates if any(_count_only_correct(first, s))), candidates[0])
        n_skipped = candidates.index(second)
        note = f" ({n_skipped} between them answer{'s' * (n_skipped == 1)} like the best)" if n_skipped else ""
        return first, second, f"the best two at the smallest budget{note}"
    return None


def _count_only_correct(first: Setting, second: Setting) -> tuple[int, int]:
    """Return the number of samples that only the first, and only the second setting answers correctly."""
    pairs = [
        (a, second.valid_records[sample]) for sample, a in first.valid_records.items() if sample in second.valid_records
    ]
    return (
        sum(bool(a["correct"]) and not b["correct"] for a, b in pairs),
        sum(bool(b["correct"]) and not a["correct"] for a, b in pairs),
    )


def _find_setting(name: str, settings: Sequence[Setting]) -> Setting:
    """Return the setting with a name, a hash, or the first characters of a hash."""
    matches = [setting for setting in settings if setting.name == name]
    if not matches and re.fullmatch("[0-9a-f]{4,}", name):
        matches = [setting for setting in settings if setting.hash.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        hashes = ", ".join(f"{setting.hash}" for setting in matches)
        raise ValueError(f"{len(matches)} settings are called {name!r}; give one of these hashes: {hashes}")
    names = [setting.name for setting in settings]
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    raise ValueError(f"no setting is called {name!r}.{hint} settings.csv lists the names and hashes of all")


def _compare_pair(
    first: Setting, second: Setting, members: Sequence[Setting], reason: str, directory: Path | None, number: int
) -> Comparison:
    """Return the failures of two settings; `number` is the number of the first failure in the report."""
    full = find_full_setting(first, members)
    common = [s for s in first.valid_records if s in second.valid_records and (full is None or s in full.valid_records)]
    failed = [s for s in common if first.valid_records[s]["correct"] != second.valid_records[s]["correct"]]
    if full is not None:
        failed = [s for s in failed if full.valid_records[s]["correct"]]
    sides = [[s for s in failed if bool(first.valid_records[s]["correct"]) is right] for right in (True, False)]

    def selections(sample: str) -> tuple[Selection, ...]:
        if directory is None:
            return ()
        a, b = (selection_from_record(directory, setting.valid_records[sample]) for setting in (first, second))
        return () if a is None or b is None else (a, b)

    def has_selections(sample: str) -> bool:
        return all(setting.valid_records[sample].get("selection") for setting in (first, second))

    failures: list[Failure] = []
    for side in sides:
        for sample in _spread([s for s in side if has_selections(s)] or side, first):
            records = first.valid_records[sample], second.valid_records[sample]
            full_record = None if full is None else full.valid_records[sample]
            failures.append(Failure(records, full_record, number + len(failures), selections(sample)))
    missing_images = ""
    if failures and not any(failure.selections for failure in failures):
        if any(map(has_selections, failed)):
            missing_images = "Their images are not in the folder `images` of the run directory: only texts are shown."
        else:
            missing_images = (
                "Their records hold no kept tokens, so only texts are shown. Possible reasons: the run used "
                "`--images 0`, an earlier version or an adapter without pixels; or these images were not stored "
                "(`--images N` stores more)."
            )
    row_names = {setting.hash: name for name, by_budget in method_rows(members) for setting in by_budget.values()}
    names = [row_names.get(setting.hash, setting.name) for setting in (first, second)]
    return Comparison(
        (first, second),
        (names[0], names[1]),
        reason,
        full is not None,
        (len(sides[0]), len(sides[1])),
        len(common),
        failures,
        missing_images,
    )


def _spread(samples: Sequence[str], setting: Setting) -> list[str]:
    """Return up to `MAX_FAILURES` samples, evenly spread over the task and of different images if possible."""
    firsts: dict[str, str] = {}
    for sample in samples:
        firsts.setdefault(str(setting.valid_records[sample]["group"]), sample)
    remaining = [sample for sample in samples if sample not in firsts.values()]
    distinct = list(firsts.values())
    if len(distinct) >= MAX_FAILURES:
        return [distinct[number * len(distinct) // MAX_FAILURES] for number in range(MAX_FAILURES)]
    return [*distinct, *remaining][:MAX_FAILURES]


def full_resolution_image(selection: Selection) -> Image.Image:
    """Return the image at the highest resolution that the model encodes, without padding.

    Args:
        selection: a selection with pixels.
    """
    assert selection.pixels is not None
    (n_rows, n_cols), (height, width) = selection.geometry.tile_grid, selection.geometry.token_grid
    if not n_rows:
        return Image.fromarray(selection.pixels[0].numpy())
    pixels = rearrange(
        selection.pixels[1:].numpy(), "(rows cols) height width rgb -> (rows height) (cols width) rgb", rows=n_rows
    )
    valid = rearrange(
        selection.geometry.valid[1:].cpu().numpy(),
        "(rows cols) (height width) -> (rows height) (cols width)",
        rows=n_rows,
        height=height,
    )
    if not valid.any():
        return Image.fromarray(selection.pixels[0].numpy())
    rows, cols = (np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0))
    token_height, token_width = pixels.shape[0] / (n_rows * height), pixels.shape[1] / (n_cols * width)
    top, bottom = rows[0] * token_height, (rows[-1] + 1) * token_height
    left, right = cols[0] * token_width, (cols[-1] + 1) * token_width
    return Image.fromarray(pixels[round(top) : round(bottom), round(left) : round(right)])


# --- blocks -----------------------------------------------------------------------------------------------------------


def failure_blocks(comparisons: Sequence[Comparison], needs_headings: bool) -> list[Block]:
    """Return the section of the failures.

    Args:
        comparisons: the pairs of settings with their failures.
        needs_headings: whether each pair gets a heading, because there are several models or tasks.
    """
    blocks: list[Block] = [Heading("Failures side by side")]
    if not comparisons:
        return [*blocks, Text(["No budget has two settings to compare."])]
    for comparison in comparisons:
        pairs = zip(comparison.names, comparison.settings, strict=True)
        titles = [f"{name} at {format_budget(setting.budget)}" for name, setting in pairs]
        if needs_headings:
            blocks.append(Heading(f"{titles[0]} and {titles[1]}", 3))
        condition = "full tokens answer correctly" if comparison.has_full else "have no error (no full tokens)"
        only_first, only_second = comparison.only_correct
        blocks.append(
            Text(
                [
                    f"**{titles[0]}** and **{titles[1]}**, {comparison.reason}: of {comparison.n_common} samples in "
                    f"common, and among those that {condition}, only the first has {only_first} right, only the second "
                    f"{only_second}. Shown: up to {MAX_FAILURES} of each, spread evenly over the images."
                ]
            )
        )
        if comparison.missing_images:
            blocks.append(Text([comparison.missing_images]))
        elif comparison.failures:
            blocks.append(
                Text(
                    [
                        "Kept tokens are clear and outlined, dropped tokens faded, padding hatched. If a method "
                        "merges tokens, the positions of the merged tokens are drawn."
                    ]
                )
            )
        for failure in comparison.failures:
            blocks += _blocks_of_failure(failure, comparison, 4 if needs_headings else 3)
    return blocks


def _blocks_of_failure(failure: Failure, comparison: Comparison, level: int) -> list[Block]:
    record = failure.records[0]
    kind = ", ".join(str(record[name]) for name in ("type", "split") if record.get(name))
    answers = record.get("answer")
    expected = " or ".join(map(_code, answers if isinstance(answers, list) else [answers]))
    line = f"{record['sample']}{f' ({kind})' if kind else ''}. Expected: {expected}."
    if failure.full is not None:
        line += f" Full tokens: {_code(failure.full.get('prediction'))}."
    blocks: list[Block] = [Heading(_shorten(record.get("question") or record["sample"]), level), Text([line])]
    heads = list(comparison.names)
    captions = [
        f"{'right' if r['correct'] else '**wrong**'}: {_code(r.get('prediction'))}; {r.get('kept')} tokens kept"
        for r in failure.records
    ]
    if failure.selections:
        heads, captions = ["the image", *heads], ["as the model encodes it", *captions]
    return [*blocks, ImageRow(heads, captions, failure.paths if failure.selections else ())]


def _code(value: object) -> str:
    return f"`{_shorten(value).replace('`', chr(39)) or ' '}`"


def _shorten(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."
