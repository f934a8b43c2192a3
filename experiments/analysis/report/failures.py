"""Samples that one of two settings has right and the other wrong, with what each of them saw."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from tokenprune.experiments.analysis.report.blocks import Block, Heading, Sides, Text
from tokenprune.experiments.analysis.report.formatting import budget_text
from tokenprune.experiments.analysis.report.rows import budgets, contexts, rows
from tokenprune.experiments.analysis.stats import Record, Results, Setting, full_of
from tokenprune.experiments.evaluation.stored_images import from_record
from tokenprune.selection import Selection

SHOWN = 3
"""So many failures of each of the two settings."""
LONGEST = 600
"""Letters of a question or an answer that are shown."""


@dataclass(frozen=True, eq=False)
class Failure:
    """A sample that exactly one of two settings has right.

    Args:
        records: the records of the two settings.
        full: the record with full tokens, if there is one.
        number: its number in the report, from 1.
        selections: what each of the two kept, with pixels; empty if a report cannot show it.
    """

    records: tuple[Record, Record]
    full: Record | None
    number: int
    selections: tuple[Selection, ...] = ()

    def images(self) -> dict[str, Image.Image]:
        """Return the image and the kept tokens of both settings by the path of their files in the report."""
        if not self.selections:
            return {}
        drawn = [whole(self.selections[0]), *(selection.overlay() for selection in self.selections)]
        return dict(zip(self.paths, drawn, strict=True))

    @property
    def paths(self) -> list[str]:
        """Paths of the files in the report."""
        return [f"figures/failure-{self.number}-{name}.png" for name in ("image", "first", "second")]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two settings side by side.

    Args:
        settings: the two experiments.
        names: what their rows are called.
        why: why these two.
        full: whether there are full tokens to compare with.
        alone: samples that only the first and only the second has right, and full tokens too where there are any.
        common: samples that all of them answered.
        shown: the failures to show.
        unseen: why no image can be shown; empty if one can.
    """

    settings: tuple[Setting, Setting]
    names: tuple[str, str]
    why: str
    full: bool
    alone: tuple[int, int]
    common: int
    shown: Sequence[Failure] = field(default_factory=list)
    unseen: str = ""


def side_by_side(results: Results, names: Sequence[str] | None = None) -> list[Comparison]:
    """Return two settings side by side, for each model and task that has two.

    Args:
        results: what was read.
        names: names or hashes of the two settings; left out, the best two at the smallest budget.

    Raises:
        ValueError: if a name is not known or not of one setting, or the two differ in model or task.
    """
    if names is not None:
        first, second = (_named(name, results.settings) for name in names)
        if first is second:
            raise ValueError(f"{names[0]} and {names[1]} are the same setting, {first.name}; give two to compare")
        if first.context != second.context:
            raise ValueError(f"{first.name} and {second.name} differ in model or task; give two that share them")
        part = contexts(results.settings)[first.context]
        return [_compared(first, second, part, "as asked for", results.directory, 1)]
    found: list[Comparison] = []
    for part in contexts(results.settings).values():
        pair = best_two(part)
        if pair is not None:
            first, second, why = pair
            shown = sum(len(one.shown) for one in found)
            found.append(_compared(first, second, part, why, results.directory, 1 + shown))
    return found


def best_two(settings: Sequence[Setting]) -> tuple[Setting, Setting, str] | None:
    """Return the best setting of the smallest budget and the best of those that answer otherwise, and why these.

    Settings of the grid come before baselines. The smallest budget is where methods differ most.

    Args:
        settings: experiments of one setting.
    """
    for budget in budgets(settings):
        there = [c for c in settings if c.budget == budget and c.role != "full" and c.score.n]
        there.sort(key=lambda setting: (setting.role != "grid", -setting.score.mean))
        if len(there) < 2:
            continue
        first, others = there[0], there[1:]
        second = next((setting for setting in others if any(_alone(first, setting))), others[0])
        place = others.index(second)
        passed = f" ({place} between them answer{'s' * (place == 1)} like the best)" if place else ""
        return first, second, f"the best two at the smallest budget{passed}"
    return None


def _alone(first: Setting, second: Setting) -> tuple[int, int]:
    """Return how many samples only the first, and only the second has right."""
    pairs = [(one, second.answered[s]) for s, one in first.answered.items() if s in second.answered]
    return (
        sum(bool(a["correct"]) and not b["correct"] for a, b in pairs),
        sum(bool(b["correct"]) and not a["correct"] for a, b in pairs),
    )


def _named(name: str, settings: Sequence[Setting]) -> Setting:
    """Return the experiment of a name or of a hash, which may be cut."""
    found = [setting for setting in settings if setting.name == name]
    if not found and re.fullmatch("[0-9a-f]{4,}", name):
        found = [setting for setting in settings if setting.hash.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        hashes = ", ".join(f"{setting.hash}" for setting in found)
        raise ValueError(f"{len(found)} settings are called {name!r}; give the hash of one: {hashes}")
    known = [setting.name for setting in settings]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no setting is called {name!r}.{hint} settings.csv lists the names and hashes of all")


def _compared(
    first: Setting, second: Setting, part: Sequence[Setting], why: str, directory: Path | None, number: int
) -> Comparison:
    full = full_of(first, part)
    common = [s for s in first.answered if s in second.answered and (full is None or s in full.answered)]
    failed = [s for s in common if first.answered[s]["correct"] != second.answered[s]["correct"]]
    if full is not None:
        failed = [s for s in failed if full.answered[s]["correct"]]
    sides = [[s for s in failed if bool(first.answered[s]["correct"]) is right] for right in (True, False)]

    def selections(sample: str) -> tuple[Selection, ...]:
        if directory is None:
            return ()
        one, other = (from_record(directory, setting.answered[sample]) for setting in (first, second))
        return () if one is None or other is None else (one, other)

    def drawable(sample: str) -> bool:
        return all(setting.answered[sample].get("selection") for setting in (first, second))

    shown: list[Failure] = []
    for side in sides:
        for sample in _spread([s for s in side if drawable(s)] or side, first):
            records = first.answered[sample], second.answered[sample]
            last = None if full is None else full.answered[sample]
            shown.append(Failure(records, last, number + len(shown), selections(sample)))
    unseen = ""
    if shown and not any(one.selections for one in shown):
        if any(map(drawable, failed)):
            unseen = "Their images are not in the folder `images` of the run directory: they stand in words only."
        else:
            unseen = (
                "Their records hold no kept tokens, so they stand in words only. Either they were made with "
                "`--images 0`, by an earlier version, or with an adapter that cannot tell its pixels; or their "
                "images are not among those that were stored (`--images N` stores more)."
            )
    named = {entry.hash: name for name, entries in rows(part) for entry in entries.values()}
    names = [named.get(setting.hash, setting.name) for setting in (first, second)]
    return Comparison(
        (first, second),
        (names[0], names[1]),
        why,
        full is not None,
        (len(sides[0]), len(sides[1])),
        len(common),
        shown,
        unseen,
    )


def _spread(samples: Sequence[str], setting: Setting) -> list[str]:
    """Return a few samples, of different images where possible, evenly spread over the task."""
    firsts: dict[str, str] = {}
    for sample in samples:
        firsts.setdefault(str(setting.answered[sample]["group"]), sample)
    rest = [sample for sample in samples if sample not in firsts.values()]
    chosen = list(firsts.values())
    if len(chosen) >= SHOWN:
        return [chosen[number * len(chosen) // SHOWN] for number in range(SHOWN)]
    return [*chosen, *rest][:SHOWN]


def whole(selection: Selection) -> Image.Image:
    """Return the image at the highest resolution that the model saw, without padding.

    Args:
        selection: a selection with pixels.
    """
    assert selection.pixels is not None
    (rows_, cols), (height, width) = selection.geometry.tile_grid, selection.geometry.token_grid
    if not rows_:
        return Image.fromarray(selection.pixels[0].numpy())
    pixels = rearrange(
        selection.pixels[1:].numpy(), "(rows cols) height width rgb -> (rows height) (cols width) rgb", rows=rows_
    )
    valid = rearrange(
        selection.geometry.valid[1:].cpu().numpy(),
        "(rows cols) (height width) -> (rows height) (cols width)",
        rows=rows_,
        height=height,
    )
    if not valid.any():
        return Image.fromarray(selection.pixels[0].numpy())
    down, across = (np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0))
    tall, wide = pixels.shape[0] / (rows_ * height), pixels.shape[1] / (cols * width)
    top, bottom, left, right = down[0] * tall, (down[-1] + 1) * tall, across[0] * wide, (across[-1] + 1) * wide
    return Image.fromarray(pixels[round(top) : round(bottom), round(left) : round(right)])


# --- blocks -----------------------------------------------------------------------------------------------------------


def failure_blocks(found: Sequence[Comparison], several: bool) -> list[Block]:
    """Return the section of the failures.

    Args:
        found: the pairs of settings.
        several: whether there are several models or tasks, so that each pair needs a heading.
    """
    blocks: list[Block] = [Heading("Failures side by side")]
    if not found:
        return [*blocks, Text(["No budget has two settings to compare."])]
    for one in found:
        titles = [f"{name} at {budget_text(c.budget)}" for name, c in zip(one.names, one.settings, strict=True)]
        if several:
            blocks.append(Heading(f"{titles[0]} and {titles[1]}", 3))
        condition = "full tokens have right" if one.full else "were answered (there are no full tokens to ask)"
        blocks.append(
            Text(
                [
                    f"**{titles[0]}** and **{titles[1]}**, {one.why}: of {one.common} samples in common, and among "
                    f"those that {condition}, only the first has {one.alone[0]} right, only the second {one.alone[1]}. "
                    f"Shown: up to {SHOWN} of each, spread over the images and not picked by eye."
                ]
            )
        )
        if one.unseen:
            blocks.append(Text([one.unseen]))
        elif one.shown:
            blocks.append(
                Text(
                    [
                        "Kept tokens are clear and outlined, dropped ones faded, padding hatched. Methods that merge "
                        "are drawn with the places at which their mixtures stand."
                    ]
                )
            )
        for failure in one.shown:
            blocks += _failure(failure, one, 4 if several else 3)
    return blocks


def _failure(failure: Failure, one: Comparison, level: int) -> list[Block]:
    record = failure.records[0]
    kind = ", ".join(str(record[name]) for name in ("type", "split") if record.get(name))
    answers = record.get("answer")
    expected = " or ".join(map(_code, answers if isinstance(answers, list) else [answers]))
    line = f"{record['sample']}{f' ({kind})' if kind else ''}. Expected: {expected}."
    if failure.full is not None:
        line += f" Full tokens: {_code(failure.full.get('prediction'))}."
    blocks: list[Block] = [Heading(_cut(record.get("question") or record["sample"]), level), Text([line])]
    heads = list(one.names)
    captions = [
        f"{'right' if r['correct'] else '**wrong**'}: {_code(r.get('prediction'))}; {r.get('kept')} tokens kept"
        for r in failure.records
    ]
    if failure.selections:
        heads, captions = ["the image", *heads], ["as the model saw it", *captions]
    return [*blocks, Sides(heads, captions, failure.paths if failure.selections else ())]


def _code(value: object) -> str:
    return f"`{_cut(value).replace('`', chr(39)) or ' '}`"


def _cut(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
