"""Checks that a strategy keeps the promises of the library: `check_reducer(MyReducer())`.

Each check stands for itself, runs on a CPU without a hub, and says what was done, expected and seen. Most run on
encoded images built by hand; two run on tiny random models of the real classes.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapter import Adapter, adapters
from tokenprune.image import (
    CLS_SIGNALS,
    NEWLINE,
    ROW_SIGNALS,
    TEXT_SIGNALS,
    USED_WHEN_ATTACHED,
    EncodedImage,
    MissingSignalError,
    TileGeometry,
)
from tokenprune.layers import resolve_layers
from tokenprune.pipeline import call_generate, missing_signals
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run
from tokenprune.selection import Selection

LAYERS, FEATURE_LAYER, HEADS, DIM = 24, 22, 4, 8
"""The tower that hand-built images come from; as deep as CLIP-L, so that its layer numbers exist."""

QUESTION = "what is in the image"
"""Asked of example models by strategies that read the question."""

LAYOUTS: Mapping[str, TileGeometry] = {
    "one tile": TileGeometry.single((6, 6)),
    "2 x 2 sub-images": TileGeometry.anyres((112, 112), (2, 2), (6, 6), 56),
    "1 x 3 sub-images with padding": TileGeometry.anyres((60, 240), (1, 3), (6, 6), 56),
    "3 x 1 sub-images with padding": TileGeometry.anyres((200, 50), (3, 1), (6, 6), 56),
}


class CheckError(Exception):
    """A check did not hold; the message says what was done, expected and seen."""


class NotApplicableError(Exception):
    """A check has nothing to look at."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Args:
        name: what was checked.
        passed: whether it held; None if there was nothing to look at.
        detail: what was done, expected and seen if it did not hold; the reason if there was nothing to look at.
    """

    name: str
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """The outcome of all checks of one strategy."""

    strategy: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(result.passed is not False for result in self.results)

    def __str__(self) -> str:
        """Return one line per check."""
        marks = {True: "ok  ", False: "FAIL", None: "-   "}
        lines = [f"{marks[r.passed]} {r.name}{': ' + r.detail if r.detail else ''}" for r in self.results]
        return "\n".join([self.strategy, *lines])


class _Watched(dict[tuple[str, int], Tensor]):
    """Signals that remember which of them were read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[tuple[str, int]] = set()

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


def wanted(reducer: TokenReducer) -> set[tuple[str, int]]:
    """Return the (kind, layer) pairs that a strategy declares, on the hand-built tower."""
    return {(s.kind, layer) for s in reducer.needs for layer in resolve_layers(s.layer, LAYERS, FEATURE_LAYER)}


def example_image(reducer: TokenReducer, layout: TileGeometry, seed: int = 0) -> EncodedImage:
    """Return an encoded image with random features and the signals that a strategy declares.

    Values are exactly representable in bfloat16, and attention rows of a token all differ, so that precision decides
    nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    tiles, tokens = layout.tiles, layout.tokens

    def attention(heads: int) -> Tensor:
        ranks = torch.rand(tiles, heads, tokens, generator=generator).argsort(dim=-1)
        return (ranks + 1) / 1024

    def shape(kind: str) -> tuple[int, ...]:
        if kind == "keys":
            return tiles, HEADS, tokens, DIM
        if kind in TEXT_SIGNALS:
            return {"question": (1, DIM), "question_tokens": (5, DIM), "question_positions": (1, 12, DIM)}[kind]
        return tiles, 1 if kind in CLS_SIGNALS else tokens, DIM

    made: dict[tuple[str, int], Tensor] = {}
    for kind, layer in sorted(wanted(reducer)):
        if kind in ROW_SIGNALS:
            made[kind, layer] = attention(1 if kind == "joint_attention" else HEADS)
        elif kind != "resolution":
            made[kind, layer] = torch.randn(shape(kind), generator=generator).bfloat16().float()
    features = torch.randn(tiles, tokens, DIM, generator=generator).bfloat16().float() * layout.valid[..., None]
    return EncodedImage(layout, features, made, layers=LAYERS, feature_layer=FEATURE_LAYER)


def images(reducer: TokenReducer) -> Iterator[tuple[str, EncodedImage]]:
    """Yield an example image of each layout that the strategy accepts, by name; `layouts` reports the others.

    Raises:
        NotApplicableError: if the strategy accepts none.
    """
    accepted = 0
    for name, layout in LAYOUTS.items():
        try:
            reducer.reduce(example_image(reducer, layout))
        except Exception:
            continue
        accepted += 1
        yield name, example_image(reducer, layout)
    if not accepted:
        raise NotApplicableError("it fails on every layout")


def expect_same(what: str, one: Selection, other: Selection) -> None:
    """Raise if two selections keep different tokens.

    Args:
        what: what was done, for the message.
        one: a selection.
        other: the selection that should equal it.
    """
    same_order = (one.order is None) == (other.order is None)
    if same_order and one.order is not None and other.order is not None:
        same_order = torch.equal(one.order, other.order)
    if not same_order:
        raise CheckError(f"{what}: expected the same order of tokens, saw another one")
    if not torch.equal(one.kept, other.kept):
        count = int((one.kept != other.kept).sum())
        raise CheckError(f"{what}: expected the same tokens, saw {count} of {one.kept.numel()} decided otherwise")


def exact_budget(reducer: TokenReducer) -> None:
    """The budget is spent exactly: none, one, few, a share, all and more than there is.

    Strategies that call it a ceiling (`TokenReducer.exact` is false) may spend less.
    """
    for budget in (0, 1, 7, 0.2, 0.5, 1.0, 10_000):
        asked = replace(reducer, budget=budget)
        for name, image in images(asked):
            selection = asked.reduce(image)
            expected, kept = min(selection.asked, int(image.geometry.valid.sum())), selection.kept_tokens
            if kept > expected or (kept < expected and asked.exact):
                limit = "" if asked.exact else "at most "
                raise CheckError(f"budget {budget!r} on {name}: expected {limit}{expected} kept tokens, saw {kept}")


def deterministic(reducer: TokenReducer) -> None:
    """The same image gives the same tokens, whatever the global random state."""
    for name, image in images(reducer):
        torch.manual_seed(1)
        first = reducer.reduce(image)
        torch.manual_seed(2)
        again = reducer.reduce(image)
        expect_same(f"reduced {name} twice with other global seeds", first, again)


def stateless(reducer: TokenReducer) -> None:
    """An image gives the same tokens after other images have been seen."""
    image = example_image(reducer, LAYOUTS["2 x 2 sub-images"])
    first = reducer.reduce(image)
    for seed in range(1, 4):
        reducer.reduce(example_image(reducer, LAYOUTS["2 x 2 sub-images"], seed))
    again = reducer.reduce(image)
    expect_same("reduced an image, three others, and it again", first, again)


def layouts(reducer: TokenReducer) -> None:
    """Single tiles, non-square grids and padding are accepted; padding is never kept."""
    for name, layout in LAYOUTS.items():
        try:
            reducer.reduce(example_image(reducer, layout))
        except MissingSignalError:  # a signal that was not declared; `needs_are_read` reports it
            continue
        except Exception as error:
            raise CheckError(f"reduced {name}: expected a selection, saw {type(error).__name__}: {error}") from error


def spatial_order(reducer: TokenReducer) -> None:
    """Tokens enter the LLM in the model's own order, and a merged token stands where one of its parts stood."""
    for name, image in images(reducer):
        selection = reducer.reduce(image)
        if selection.order is not None and bool((selection.order.diff() < 0).any()):
            raise CheckError(f"reduced {name}: expected the model's own order of tokens, saw another one")
        if selection.mixing is None:
            continue
        packed = selection.geometry.packed
        own = packed[packed != NEWLINE]
        own = own[selection.kept.flatten()[own]]
        weights = selection.mixing.to_dense().gather(1, own[:, None])[:, 0]
        if strangers := int((weights == 0).sum()):
            raise CheckError(
                f"reduced {name}: expected every merged token in the place of a token it is made of, saw {strangers} "
                "elsewhere"
            )


def precision(reducer: TokenReducer) -> None:
    """bfloat16, float16 and float32 give the same tokens for values that all three can hold."""
    for name, image in images(reducer):
        full = reducer.reduce(image)
        for dtype in (torch.bfloat16, torch.float16):
            signals = {key: value.to(dtype) for key, value in image.signals.items()}
            cast = replace(image.with_features(image.features.to(dtype)), signals=signals)
            expect_same(f"reduced {name} in {dtype} instead of float32", full, reducer.reduce(cast))


def extremes(reducer: TokenReducer) -> None:
    """Constant, one-hot and huge signals give a selection without NaN."""
    for name, image in images(reducer):
        one_hot = {key: torch.zeros_like(value) for key, value in image.signals.items()}
        for value in one_hot.values():
            value.view(-1)[0] = 1.0
        for what, made in {
            "zero": {key: torch.zeros_like(value) for key, value in image.signals.items()},
            "constant": {key: torch.ones_like(value) for key, value in image.signals.items()},
            "one-hot": one_hot,
            "huge": {key: value * 1e30 for key, value in image.signals.items()},
        }.items():
            level = {"zero": 0.0, "huge": 1e18}.get(what, 1.0)
            odd = replace(image.with_features(torch.full_like(image.features, level)), signals=made)
            try:
                selection = reducer.reduce(odd)
            except Exception as error:
                raise CheckError(f"reduced {name} with {what} signals: expected a selection, saw {error}") from error
            if selection.mixing is not None and not bool(selection.mixing.to_dense().isfinite().all()):
                raise CheckError(f"reduced {name} with {what} signals: expected finite mixtures, saw NaN or infinity")


def inputs_unchanged(reducer: TokenReducer) -> None:
    """The image is left as it was."""
    for name, image in images(reducer):
        before = {key: value.clone() for key, value in image.signals.items()}
        features = image.features.clone()
        reducer.reduce(image)
        changed = [
            f"{kind} of layer {layer}"
            for (kind, layer), v in before.items()
            if not torch.equal(v, image.signals[kind, layer])
        ]
        changed += [] if torch.equal(features, image.features) else ["features"]
        if changed:
            raise CheckError(f"reduced {name}: expected the image as it was, saw {', '.join(changed)} changed")


def needs_are_read(reducer: TokenReducer) -> None:
    """Every declared signal is read, and no other one."""
    read: set[tuple[str, int]] = set()
    for layout in LAYOUTS.values():
        image = example_image(reducer, layout)
        watched = _Watched(image.signals)
        try:
            reducer.reduce(replace(image, signals=watched))
        except MissingSignalError as error:
            raise CheckError(f"gave it the signals that it declares: expected that to do, saw: {error}") from error
        except Exception:  # `layouts` reports it
            continue
        read |= watched.read
    used_later = {pair for pair in wanted(reducer) if pair[0] in USED_WHEN_ATTACHED}
    if idle := wanted(reducer) - read - used_later:
        names = ", ".join(f"{kind} of layer {layer}" for kind, layer in sorted(idle))
        raise CheckError(f"watched which signals it reads: expected all declared ones, never saw {names}")


def round_trips(reducer: TokenReducer) -> None:
    """It survives pickling, and its fields are its whole configuration."""
    fields = {f.name: getattr(reducer, f.name) for f in dataclasses.fields(reducer) if f.init}
    ways: Mapping[str, Callable[[], TokenReducer]] = {
        "pickled and loaded": lambda: pickle.loads(pickle.dumps(reducer)),
        "built anew from its fields": lambda: type(reducer)(**fields),
        "printed as a configuration and parsed": lambda: _through_config(reducer),
    }
    for how, make in ways.items():
        try:
            twin = make()
        except Exception as error:
            raise CheckError(
                f"{how}: expected an equal strategy, saw {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        if twin != reducer:
            raise CheckError(f"{how}: expected {reducer!r}, saw {twin!r}")
        for name, image in images(reducer):
            expect_same(
                f"{how} (all state must be in fields), then reduced {name}", reducer.reduce(image), twin.reduce(image)
            )


def _through_config(reducer: TokenReducer) -> TokenReducer:
    from jsonargparse import ArgumentParser

    from tokenprune.configuration import as_config

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reducer", type=TokenReducer)
    text = parser.dump(parser.parse_object({"reducer": as_config(reducer)}))
    twin: TokenReducer = parser.instantiate(parser.parse_string(text)).reducer
    return twin


def _examples(reducer: TokenReducer) -> list[Adapter]:
    """Return the adapters that provide what a strategy needs, each bound to its example model.

    Raises:
        NotApplicableError: if none does.
    """
    fitting = [adapter for adapter in _bound_examples() if not missing_signals(reducer, adapter)]
    if not fitting:
        raise NotApplicableError(f"no adapter provides {', '.join(sorted({one.kind for one in reducer.needs}))}")
    return fitting


def _bound_examples() -> list[Adapter]:
    """Return every adapter whose family works in the installed transformers, bound to its example model."""
    return [kind(kind.example()) for kind in adapters().values() if kind.runs()]


def _attach(reducer: TokenReducer, adapter: Adapter) -> AbstractContextManager[Run]:
    """Attach the strategy to an example model; one that reads the question gets one, and a text tower."""
    if not reducer.reads_question:
        return reducer(adapter.model)
    return replace(reducer, text_model=adapter.example_text_model())(adapter.model, question=QUESTION)


def batch_invariant(reducer: TokenReducer) -> None:
    """On every fitting model an image keeps the same tokens alone and beside others."""
    sizes = [(112, 112), (60, 160), (150, 50)]
    for adapter in _examples(reducer):
        with torch.no_grad(), _attach(reducer, adapter) as together:
            adapter.model(**adapter.example_inputs([[sizes[0]], [sizes[1], sizes[2]]]))
        for number, size in enumerate(sizes):
            with torch.no_grad(), _attach(reducer, adapter) as alone:
                adapter.model(**adapter.example_inputs([[size]]))
            what = f"ran an image on {adapter.model_class} alone and in a batch"
            expect_same(what, alone.selections[0], together.selections[number])


def leaves_no_trace(reducer: TokenReducer) -> None:
    """On every fitting model generation runs, and afterwards the model is bit-identical to before."""
    for adapter in _examples(reducer):
        inputs = adapter.example_inputs([[(112, 112)], [(60, 160)]])
        with torch.no_grad():
            before = adapter.model(**inputs).logits
            try:
                with _attach(reducer, adapter):
                    suppressed = [adapter.image_token_id]
                    how = {"max_new_tokens": 2, "num_beams": 1 + adapter.beams, "suppress_tokens": suppressed}
                    call_generate(adapter.model, inputs, **how)
            except Exception as error:
                raise CheckError(
                    f"generated with {adapter.model_class}: expected answers, saw {type(error).__name__}: {error}"
                ) from error
            after = adapter.model(**inputs).logits
        if not torch.equal(before, after):
            worst = float((before - after).abs().max())
            raise CheckError(
                f"attached and left {adapter.model_class}: expected the same logits, saw a difference of {worst:.1e}"
            )


CHECKS: Mapping[str, Callable[[TokenReducer], None]] = {
    "exact budget": exact_budget,
    "deterministic": deterministic,
    "stateless": stateless,
    "layouts": layouts,
    "spatial order": spatial_order,
    "precision": precision,
    "extreme signals": extremes,
    "inputs unchanged": inputs_unchanged,
    "needs": needs_are_read,
    "round trips": round_trips,
    "batch invariant": batch_invariant,
    "leaves no trace": leaves_no_trace,
}
"""All checks by name, in the order in which they run."""


def check_reducer(reducer: TokenReducer) -> Report:
    """Check a strategy against the promises of the library.

    Args:
        reducer: an instance of the strategy; its budget is varied where a check is about budgets.

    Returns:
        The report; print it, or look at `Report.passed`.
    """
    results = []
    with torch.random.fork_rng():
        for name, check in CHECKS.items():
            try:
                check(reducer)
                results.append(Result(name, True))
            except CheckError as failure:
                results.append(Result(name, False, str(failure)))
            except NotApplicableError as reason:
                results.append(Result(name, None, str(reason)))
            except Exception as error:
                seen = f"{type(error).__name__}: {' '.join(str(error).split())}"
                results.append(Result(name, False, f"expected a selection, saw {seen}"))
    return Report(type(reducer).__name__, tuple(results))
