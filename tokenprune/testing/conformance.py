"""Checks that a strategy fulfills the contract of the library: `check_reducer(MyReducer())`.

The checks are independent of each other and run on a CPU without network access. A failed check reports the action, the
expected result and the actual result. Most checks run on synthetic encoded images; `MODEL_CHECKS` run on tiny random
models of the real classes.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapter import Adapter, adapters
from tokenprune.decoder.strategy import BoundDecoderReducer
from tokenprune.decoder_reducer import DecoderReducer
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image import (
    APPLICATION_SIGNALS,
    BEFORE_TOWER,
    LLM_SIGNALS,
    ROW_SIGNALS,
    TEXT_ROW_SIGNALS,
    EncodedImage,
    MissingSignalError,
)
from tokenprune.pipeline import call_generate
from tokenprune.reducer import TokenReducer
from tokenprune.requirements import describe_missing_steps, list_missing_signals
from tokenprune.run import Run
from tokenprune.selection import Selection
from tokenprune.source_code import locate_error
from tokenprune.testing.check_errors import CheckError, NotApplicableError
from tokenprune.testing.encoded_images import random_encoded_image
from tokenprune.testing.encoder_checks import ENCODER_CHECKS, find_tile_layout, select_patches
from tokenprune.testing.examples import Example, build_example, find_example

LAYERS, FEATURE_LAYER, HEADS, DIM = 24, 22, 4, 8
"""The vision tower of synthetic images; it is as deep as CLIP-L, so that the layer numbers of strategies are valid."""

QUESTION = "what is in the image"
"""The question for strategies that read one."""

LAYOUTS: Mapping[str, TileGeometry] = {
    "one tile": TileGeometry.single((6, 6)),
    "2 x 2 sub-images": TileGeometry.anyres((112, 112), (2, 2), (6, 6), 56),
    "1 x 3 sub-images with padding": TileGeometry.anyres((60, 240), (1, 3), (6, 6), 56),
    "3 x 1 sub-images with padding": TileGeometry.anyres((200, 50), (3, 1), (6, 6), 56),
}


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Args:
        name: name of the check.
        passed: whether the check passed; None if it does not apply.
        detail: action, expected result and actual result of a failed check; the reason if the check does not apply.
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


class _RecordingSignals(dict[tuple[str, int], Tensor]):
    """Signals that record which keys are read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[tuple[str, int]] = set()

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


def resolve_signals(reducer: TokenReducer) -> set[tuple[str, int]]:
    """Return the (kind, layer) pairs of the signals that a strategy declares, for the tower of synthetic images."""
    return {(s.kind, layer) for s in reducer.needs for layer in s.resolve(LAYERS, FEATURE_LAYER)}


def build_image(reducer: TokenReducer, layout: TileGeometry, seed: int = 0) -> EncodedImage:
    """Return an encoded image with random features and the signals that a strategy declares.

    Values are exactly representable in bfloat16, and attention values of a row all differ. The selection therefore does
    not depend on the precision.
    """

    def draw(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if kind in ROW_SIGNALS | TEXT_ROW_SIGNALS | {"token_transition"}:
            dim = 1 if kind == "token_transition" else -1
            return (torch.rand(shape, generator=generator).argsort(dim=dim) + 1) / 1024
        return torch.randn(shape, generator=generator).bfloat16().float()

    return random_encoded_image(
        find_tile_layout(layout) if isinstance(reducer.list_parts()[0], EncoderReducer) else layout,
        seed,
        HEADS,
        DIM,
        keys=[(kind, layer) for kind, layer in sorted(resolve_signals(reducer)) if kind not in BEFORE_TOWER],
        draw=draw,
        text_shapes={"question": (1,), "question_tokens": (5,), "question_positions": (1, 12)},
        layers=LAYERS,
        feature_layer=FEATURE_LAYER,
    )


def select_tokens(reducer: TokenReducer, image: EncodedImage) -> Selection:
    """Return the selection of a strategy; inside the vision tower, the patches that remain after one step.

    Args:
        reducer: the strategy; of a composition, its first part acts.
        image: the encoded image.
    """
    first = reducer.list_parts()[0]
    return select_patches(first, image) if isinstance(first, EncoderReducer) else reducer.reduce(image)


def iterate_images(reducer: TokenReducer) -> Iterator[tuple[str, EncodedImage]]:
    """Yield the name and an image of each layout that the strategy accepts.

    `check_layouts` reports layouts that it does not accept.

    Raises:
        NotApplicableError: if the strategy accepts no layout.
    """
    accepted = 0
    for name, layout in LAYOUTS.items():
        try:
            select_tokens(reducer, build_image(reducer, layout))
        except Exception:
            continue
        accepted += 1
        yield name, build_image(reducer, layout)
    if not accepted:
        raise NotApplicableError("it fails on every layout, as another check reports")


def format_failure(error: BaseException) -> str:
    """Return the type and the message of an error of a strategy as one line, with file and line of the user's code."""
    place = locate_error(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}{f' ({place})' if place else ''}"


def identify_cause(error: BaseException) -> str:
    """Return a text that is equal for errors of one cause: the failure without its numbers, such as shapes."""
    return re.sub(r"\d+", "", str(error)) + type(error).__name__ + locate_error(error)


def require_equal(action: str, expected: Selection, actual: Selection) -> None:
    """Raise a `CheckError` if two selections keep different tokens.

    Args:
        action: description of the action, for the message.
        expected: the expected selection.
        actual: the selection to compare.
    """
    is_same_order = (expected.order is None) == (actual.order is None)
    if is_same_order and expected.order is not None and actual.order is not None:
        is_same_order = torch.equal(expected.order, actual.order)
    if not is_same_order:
        raise CheckError(f"{action}: expected the same order of tokens, got a different order")
    if not torch.equal(expected.kept, actual.kept):
        count = int((expected.kept != actual.kept).sum())
        raise CheckError(
            f"{action}: expected the same tokens, got different decisions for {count} of {expected.kept.numel()}"
        )


def check_exact_budget(reducer: TokenReducer) -> None:
    """Check that budgets of no, one, a few, a share of, all and too many tokens are spent exactly.

    If `TokenReducer.exact` is false, the budget is an upper limit.
    """
    for budget in (0, 1, 7, 0.2, 0.5, 1.0, 10_000):
        strategy = reducer.with_options(budget=budget)
        for name, image in iterate_images(strategy):
            selection = select_tokens(strategy, image)
            expected, kept = min(selection.asked, int(image.geometry.valid.sum())), selection.kept_tokens
            if kept > expected or (kept < expected and strategy.exact):
                limit = "" if strategy.exact else "at most "
                raise CheckError(f"budget {budget!r} on {name}: expected {limit}{expected} kept tokens, got {kept}")


def check_determinism(reducer: TokenReducer) -> None:
    """Check that the same image keeps the same tokens for every global random state."""
    for name, image in iterate_images(reducer):
        torch.manual_seed(1)
        expected = select_tokens(reducer, image)
        torch.manual_seed(2)
        require_equal(f"reduced {name} twice with different global seeds", expected, select_tokens(reducer, image))


def check_statelessness(reducer: TokenReducer) -> None:
    """Check that an image keeps the same tokens after other images were reduced."""
    for name, image in iterate_images(reducer):
        expected = select_tokens(reducer, image)
        for seed in range(1, 4):
            select_tokens(reducer, build_image(reducer, LAYOUTS[name], seed))
        require_equal(f"reduced {name} before and after three other images", expected, select_tokens(reducer, image))


def check_layouts(reducer: TokenReducer) -> None:
    """Check that single tiles, non-square grids and padding are accepted, and that padding is never kept.

    Each cause of a failure is reported once, with the number of layouts.
    """
    failures: dict[str, dict[str, Exception]] = {}
    for name, layout in LAYOUTS.items():
        try:
            select_tokens(reducer, build_image(reducer, layout))
        except MissingSignalError:  # an undeclared signal; `check_needs` reports it
            continue
        except Exception as error:
            failures.setdefault(identify_cause(error), {})[name] = error
    if failures:
        texts = []
        for by_layout in failures.values():
            names = "" if len(by_layout) == len(LAYOUTS) else f" ({', '.join(by_layout)})"
            texts.append(
                f"reduced {len(by_layout)} of {len(LAYOUTS)} layouts{names}: expected a selection, got "
                f"{format_failure(next(iter(by_layout.values())))}"
            )
        first_error = next(error for by_layout in failures.values() for error in by_layout.values())
        raise CheckError("; ".join(texts)) from first_error


def check_spatial_order(reducer: TokenReducer) -> None:
    """Check that tokens keep the packed order, and that a merged token has the position of one of its sources."""
    for name, image in iterate_images(reducer):
        selection = select_tokens(reducer, image)
        if selection.order is not None and bool((selection.order.diff() < 0).any()):
            raise CheckError(f"reduced {name}: expected the packed order of tokens, got a different order")
        if selection.mixing is None:
            continue
        packed = selection.geometry.packed
        indices = packed[packed != NEWLINE]
        indices = indices[selection.kept.flatten()[indices]]
        weights = selection.mixing.to_dense().gather(1, indices[:, None])[:, 0]
        if misplaced := int((weights == 0).sum()):
            raise CheckError(
                f"reduced {name}: expected every merged token at the position of one of its sources, got {misplaced} "
                "at other positions"
            )


def check_precision(reducer: TokenReducer) -> None:
    """Check that bfloat16, float16 and float32 keep the same tokens for values that all three represent exactly."""
    for name, image in iterate_images(reducer):
        expected = select_tokens(reducer, image)
        for dtype in (torch.bfloat16, torch.float16):
            signals = {key: value.to(dtype) for key, value in image.signals.items()}
            cast = replace(image.with_features(image.features.to(dtype)), signals=signals)
            try:
                require_equal(f"reduced {name} in {dtype} instead of float32", expected, select_tokens(reducer, cast))
            except CheckError as error:
                raise CheckError(
                    f"{error}; compute scores in float32, such as image.features.float().norm(dim=-1)"
                ) from None


def check_extreme_signals(reducer: TokenReducer) -> None:
    """Check that constant, one-hot and huge signals give a selection without NaN."""
    for name, image in iterate_images(reducer):
        one_hot = {key: torch.zeros_like(value) for key, value in image.signals.items()}
        for value in one_hot.values():
            value.view(-1)[0] = 1.0
        for label, signals in {
            "zero": {key: torch.zeros_like(value) for key, value in image.signals.items()},
            "constant": {key: torch.ones_like(value) for key, value in image.signals.items()},
            "one-hot": one_hot,
            "huge": {key: value * 1e30 for key, value in image.signals.items()},
        }.items():
            level = {"zero": 0.0, "huge": 1e18}.get(label, 1.0)
            extreme = replace(image.with_features(torch.full_like(image.features, level)), signals=signals)
            try:
                selection = select_tokens(reducer, extreme)
            except Exception as error:
                raise CheckError(
                    f"reduced {name} with {label} signals: expected a selection, got {format_failure(error)}"
                ) from error
            if selection.mixing is not None and not bool(selection.mixing.to_dense().isfinite().all()):
                raise CheckError(f"reduced {name} with {label} signals: expected finite mixtures, got NaN or infinity")


def check_inputs_unchanged(reducer: TokenReducer) -> None:
    """Check that a strategy does not change its image."""
    for name, image in iterate_images(reducer):
        before = {key: value.clone() for key, value in image.signals.items()}
        features = image.features.clone()
        select_tokens(reducer, image)
        changed = [
            f"{kind} of layer {layer}"
            for (kind, layer), v in before.items()
            if not torch.equal(v, image.signals[kind, layer])
        ]
        changed += [] if torch.equal(features, image.features) else ["features"]
        if changed:
            raise CheckError(f"reduced {name}: expected an unchanged image, got changed {', '.join(changed)}")


def check_needs(reducer: TokenReducer) -> None:
    """Check that a strategy reads every declared signal and no undeclared signal."""
    read: set[tuple[str, int]] = set()
    for layout in LAYOUTS.values():
        image = build_image(reducer, layout)
        signals = _RecordingSignals(image.signals)
        try:
            for part in reducer.list_parts():
                select_tokens(part, replace(image, signals=signals))
        except MissingSignalError as error:
            raise CheckError(f"reduced with the declared signals only: expected a selection, got: {error}") from error
        except Exception:  # `check_layouts` reports it
            continue
        read |= signals.read
    used_later = {pair for pair in resolve_signals(reducer) if pair[0] in APPLICATION_SIGNALS}
    if unread := resolve_signals(reducer) - read - used_later:
        names = ", ".join(f"{kind} of layer {layer}" for kind, layer in sorted(unread))
        raise CheckError(f"recorded the signals that are read: expected all declared signals, got no read of {names}")


def check_round_trips(reducer: TokenReducer) -> None:
    """Check that a strategy can be pickled, and that its fields are its whole configuration."""
    fields = {f.name: getattr(reducer, f.name) for f in dataclasses.fields(reducer) if f.init}
    builders: Mapping[str, Callable[[], TokenReducer]] = {
        "pickled and loaded": lambda: pickle.loads(pickle.dumps(reducer)),
        "built again from its fields": lambda: type(reducer)(**fields),
        "printed as a configuration and parsed": lambda: _reload_from_config(reducer),
    }
    for action, build in builders.items():
        try:
            restored = build()
        except Exception as error:
            raise CheckError(
                f"{action}: expected an equal strategy, got {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        if restored != reducer:
            raise CheckError(f"{action}: expected {reducer!r}, got {restored!r}")
        for name, image in iterate_images(reducer):
            message = f"{action} (all state must be in fields), then reduced {name}"
            require_equal(message, select_tokens(reducer, image), select_tokens(restored, image))


def _reload_from_config(reducer: TokenReducer) -> TokenReducer:
    from jsonargparse import ArgumentParser

    from tokenprune.configuration import as_config

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reducer", type=TokenReducer)
    text = parser.dump(parser.parse_object({"reducer": as_config(reducer)}))
    return parser.instantiate(parser.parse_string(text)).reducer


def _list_adapters(families: Collection[str] | None) -> list[type[Adapter]]:
    """Return the adapters of the families that work with the installed transformers; None means all families."""
    classes = [kind for kind in adapters().values() if families is None or kind.family in families]
    return [kind for kind in classes if kind.supports_transformers()]


def _find_examples(families: Collection[str] | None) -> tuple[list[type[Example]], dict[str, str]]:
    """Return the examples of the adapters of the families, and the error of each adapter without an example by name."""
    examples, errors = list[type[Example]](), dict[str, str]()
    for adapter_class in _list_adapters(families):
        try:
            examples.append(find_example(adapter_class))
        except LookupError as error:
            errors[adapter_class.__name__] = str(error)
    return examples, errors


def _list_fitting_examples(reducer: TokenReducer, families: Collection[str] | None) -> list[Example]:
    """Return the examples whose adapters provide the signals of a strategy, each bound to a new model.

    `check_reducer` reports adapters without an example.

    Raises:
        NotApplicableError: if no adapter with an example provides the signals.
    """
    encoder_parts = [part for part in reducer.list_parts() if isinstance(part, EncoderReducer)]
    examples = [build_example(example.adapter_class) for example in _find_examples(families)[0]]
    fitting = [example for example in examples if not list_missing_signals(reducer, example.adapter)]
    fitting = [example for example in fitting if describe_missing_steps(reducer, example.adapter) is None]
    if not fitting:
        needs = ", ".join(sorted({signal.kind for signal in reducer.needs})) or "features"
        steps = sorted({"merge" if part.merges else "drop" for part in encoder_parts})
        needs += f" and steps that {' and '.join(steps)} patches" if steps else ""
        raise NotApplicableError(f"no adapter provides {needs}")
    parts = [part for part in reducer.list_parts() if isinstance(part, DecoderReducer)]
    fitting = [example for example in fitting if can_cut(example.adapter, parts)]
    if not fitting:
        layers = ", ".join(str(cut.layer) for part in parts for cut in part.cuts)
        raise NotApplicableError(f"no example has an LLM with cuts at the layers {layers}")
    return fitting


def can_cut(adapter: Adapter, parts: Sequence[DecoderReducer]) -> bool:
    """Return whether the LLM of a model has the layers that strategies inside it cut at and read.

    Args:
        adapter: the adapter of the model.
        parts: the strategies inside the LLM.
    """
    if parts and not adapter.provides >= LLM_SIGNALS:
        return False
    try:
        for part in parts:
            BoundDecoderReducer(part, adapter)
    except ValueError:
        return False
    return True


def _attach(reducer: TokenReducer, example: Example) -> AbstractContextManager[Run]:
    """Attach a strategy to an example model, with a question and a text tower if the strategy reads the question."""
    model = example.adapter.model
    if not reducer.reads_question:
        return reducer(model)
    return reducer.with_options(text_model=example.build_text_model())(model, question=QUESTION)


def check_batch_invariance(reducer: TokenReducer, families: Collection[str] | None = None) -> None:
    """Check that an image keeps the same tokens in a batch and in a call of its own, on every fitting model."""
    sizes = [(112, 112), (60, 160), (150, 50)]
    for example in _list_fitting_examples(reducer, families):
        adapter = example.adapter
        with torch.no_grad(), _attach(reducer, example) as batch_run:
            adapter.model(**example.build_inputs([[sizes[0]], [sizes[1], sizes[2]]]))
        for number, size in enumerate(sizes):
            with torch.no_grad(), _attach(reducer, example) as single_run:
                adapter.model(**example.build_inputs([[size]]))
            action = f"ran an image on {adapter.model_class} in a call of its own and in a batch"
            require_equal(action, single_run.selections[0], batch_run.selections[number])


def check_cuts(reducer: TokenReducer, families: Collection[str] | None = None) -> None:
    """Check that cuts inside the LLM spend their budget, and keep the same tokens of a prompt in every batch."""
    if not any(isinstance(part, DecoderReducer) for part in reducer.list_parts()):
        raise NotApplicableError("it drops no tokens inside the LLM")
    sizes = [(112, 112), (60, 160)]
    for example in _list_fitting_examples(reducer, families):
        adapter = example.adapter
        with torch.no_grad(), _attach(reducer, example) as batch_run:
            adapter.model(**example.build_inputs([[size] for size in sizes]))
        for number, size in enumerate(sizes):
            with torch.no_grad(), _attach(reducer, example) as single_run:
                adapter.model(**example.build_inputs([[size]]))
            for layer, selection in batch_run.find_cuts(number).items():
                action = f"ran an image on {adapter.model_class} with a cut at layer {layer}"
                require_equal(
                    f"{action} in a call of its own and in a batch", single_run.find_cuts(0)[layer], selection
                )
                expected, kept = min(selection.asked, selection.geometry.valid_tokens), selection.kept_tokens
                if kept > expected or (kept < expected and reducer.exact):
                    raise CheckError(f"{action}: expected {expected} kept tokens, got {kept}")


def check_all_patches(reducer: TokenReducer, families: Collection[str] | None = None) -> None:
    """Check that a strategy inside the vision tower that keeps all patches gives the logits of the unmodified model.

    Raises:
        NotApplicableError: if the strategy acts at no layer of the vision tower, or no adapter supports it.
    """
    part = reducer.list_parts()[0]
    if not isinstance(part, EncoderReducer):
        raise NotApplicableError("it drops and merges no patches inside the vision tower")
    options = {"budget": 1.0} | ({"r": None} if hasattr(part, "r") else {})
    for example in _list_fitting_examples(part, families):
        adapter, inputs = example.adapter, example.build_inputs([[(112, 112)], [(60, 160)]])
        with torch.no_grad():
            expected = adapter.model(**inputs).logits
            with _attach(part.with_options(**options), example):
                logits = adapter.model(**inputs).logits
        if not torch.equal(logits, expected):
            raise CheckError(
                f"kept all patches of {adapter.model_class} with budget=1.0: expected the logits of the unmodified "
                f"model, got a difference of {float((logits - expected).abs().max()):.1e}"
            )


def check_model_unchanged(reducer: TokenReducer, families: Collection[str] | None = None) -> None:
    """Check that generation runs on every fitting model, and that the logits after the block are bit-identical."""
    for example in _list_fitting_examples(reducer, families):
        adapter, inputs = example.adapter, example.build_inputs([[(112, 112)], [(60, 160)]])
        with torch.no_grad():
            before = adapter.model(**inputs).logits
            try:
                with _attach(reducer, example):
                    suppress = [adapter.image_token_id]
                    options = {
                        "max_new_tokens": 2,
                        "num_beams": 1 + adapter.supports_beams,
                        "suppress_tokens": suppress,
                    }
                    call_generate(adapter.model, inputs, **options)
            except Exception as error:
                raise CheckError(
                    f"generated with {adapter.model_class}: expected answers, got {format_failure(error)}"
                ) from error
            after = adapter.model(**inputs).logits
        if not torch.equal(before, after):
            difference = float((before - after).abs().max())
            raise CheckError(
                f"attached to and detached from {adapter.model_class}: expected the same logits, got a difference of "
                f"{difference:.1e}"
            )


CHECKS: Mapping[str, Callable[..., None]] = {
    "exact budget": check_exact_budget,
    "deterministic": check_determinism,
    "stateless": check_statelessness,
    "layouts": check_layouts,
    "spatial order": check_spatial_order,
    "precision": check_precision,
    "extreme signals": check_extreme_signals,
    "inputs unchanged": check_inputs_unchanged,
    "needs": check_needs,
    "round trips": check_round_trips,
    "batch invariant": check_batch_invariance,
    "cuts": check_cuts,
    "leaves no trace": check_model_unchanged,
}
"""All checks by name, in the order in which they run."""
MODEL_CHECKS = frozenset({"batch invariant", "cuts", "leaves no trace"})
"""Checks that run example models; they take the families."""


def check_reducer(
    reducer: TokenReducer, families: Collection[str] | None = None, on_check: Callable[[str], object] = str
) -> Report:
    """Check a strategy against the contract of the library.

    Args:
        reducer: an instance of the strategy; the check of budgets replaces its budget.
        families: model families (``"llava_next"``, ...) whose example models run; None runs all families.
        on_check: receives the name of each check before it runs.

    Returns:
        The report; print it, or read `Report.passed`. It names the adapters without an example model, which no check
        runs.

    Raises:
        ValueError: if there is no family of a name.
    """
    names = {adapter.family for adapter in adapters().values()}
    if unknown := set(families or ()) - names:
        raise ValueError(
            f"no family is called {', '.join(sorted(unknown))}; the families are {', '.join(sorted(names))}"
        )
    checks = {name: partial(check, reducer, families) for name, check in CHECKS.items() if name in MODEL_CHECKS}
    checks = {name: checks.get(name, partial(check, reducer)) for name, check in CHECKS.items()}
    if isinstance(part := reducer.list_parts()[0], EncoderReducer):
        images = {name: build_image(part, layout) for name, layout in LAYOUTS.items()}
        checks |= {name: partial(check, part, images) for name, check in ENCODER_CHECKS.items()}
        checks["all patches"] = partial(check_all_patches, part, families)
    results: list[Result] = []
    checks_by_cause: dict[str, str] = {}
    with torch.random.fork_rng():
        for name, check in checks.items():
            on_check(name)
            try:
                check()
                results.append(Result(name, True))
            except NotApplicableError as reason:
                results.append(Result(name, None, str(reason)))
            except Exception as error:
                is_described = isinstance(error, CheckError)
                text = str(error) if is_described else f"expected a selection, got {format_failure(error)}"
                reported = checks_by_cause.setdefault(identify_cause(error.__cause__ or error), name)
                results.append(Result(name, False, text if reported == name else f"the same error as in `{reported}`"))
    results += [Result(f"runs on {name}", None, error) for name, error in _find_examples(families)[1].items()]
    return Report(reducer.label, tuple(results))
