"""PixelPrune: the rule against a written-out coder, and the vision tower against masked columns of the full tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.helpers.emulated_device import EmulatedDevice, move_model, to_device
from tests.helpers.families import FAMILIES
from tests.helpers.oracle import collect_state, kept_mask, oracle_inputs
from tests.helpers.published import CASES, Case
from tests.helpers.truncation import prepare_both
from tokenprune import Composed
from tokenprune.adapter import find_adapter
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.models._capture.hooks import replaced_forward
from tokenprune.reducer import TokenReducer
from tokenprune.run import DRAWABLE, Run
from tokenprune.selection import Selection
from tokenprune.strategies import FastV, HiRED, ImageDownsample, PixelPrune, Random
from tokenprune.strategies.encoder import RandomPatches
from tokenprune.strategies.pixelprune import lossless_errors, prediction_errors

NATIVE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "pixtral", "mistral3"]


@pytest.fixture(params=[pytest.param(name, marks=[] if "2_5" in name else pytest.mark.slow) for name in NATIVE])
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


def reconstruct(pixels: Tensor, kept: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the pixels that a decoder of the kept tokens computes, and the tokens that a coder keeps.

    Both loop over tokens and store the pixels of each; differences are the largest of all pixels.
    """
    decoded, expected = torch.zeros_like(pixels), torch.zeros_like(kept)
    for y, x in torch.cartesian_prod(torch.arange(len(pixels)), torch.arange(pixels.shape[1])).tolist():
        prediction = None
        if x and y:
            left, above, corner = decoded[y, x - 1], decoded[y - 1, x], decoded[y - 1, x - 1]
            is_edge = (corner - left).abs().max() <= threshold < (corner - above).abs().max()
            prediction = above if is_edge else left
        elif x or y:
            prediction = decoded[y, x - 1] if x else decoded[y - 1, x]
        expected[y, x] = prediction is None or (pixels[y, x] - prediction).abs().max() > threshold
        decoded[y, x] = pixels[y, x] if kept[y, x] or prediction is None else prediction
    return decoded, expected


def encoded(pixels: Tensor) -> EncodedImage:
    """Return an image with the pixels of each token, `[height, width, pixels]`, as features."""
    return EncodedImage(TileGeometry.single((pixels.shape[0], pixels.shape[1])), pixels.flatten(0, 1)[None])


def select(pixels: Tensor, **options: Any) -> Tensor:
    """Return the tokens that PixelPrune keeps, bool `[height, width]`."""
    return PixelPrune(**options).reduce(encoded(pixels)).kept.view(pixels.shape[:2])


@settings(max_examples=20, deadline=None)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    levels=st.integers(2, 6),
    threshold=st.sampled_from([0.0, 0.2, 0.5]),
    seed=st.integers(0, 1000),
)
def test_a_decoder_restores_the_image_up_to_the_threshold(size, levels, threshold, seed) -> None:
    colors = torch.randint(levels, (*size, 2), generator=torch.Generator().manual_seed(seed)) / levels
    kept = select(colors, threshold=threshold)
    decoded, expected = reconstruct(colors, kept, threshold)
    assert torch.equal(kept, expected)
    assert (decoded - colors).abs().max() <= threshold


@pytest.mark.parametrize("number", CASES)
def test_kept_tokens_equal_the_official_code(number: int) -> None:
    case = Case("pixelprune", number)
    kept = select(case["pixels"], metric=case["metric"], threshold=case["threshold"])
    assert torch.equal(kept, case["kept"])
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("metric", ["max", "mae", "rmse"])
def test_one_step_equals_the_loop_over_diagonals(metric: Any) -> None:
    colors = torch.randint(2, (6, 9, 3), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(lossless_errors(colors, 0.0, metric), prediction_errors(colors, 0.0, metric))


def test_metrics_are_the_largest_the_mean_and_the_root_mean_square_difference() -> None:
    colors = torch.tensor([[[0.0, 0.0], [0.6, 0.8]]])
    errors = [float(prediction_errors(colors, 0.0, metric)[0, 1]) for metric in ("max", "mae", "rmse")]
    assert errors == pytest.approx([0.8, 0.7, 0.5**0.5])


def test_a_rectangle_keeps_tokens_at_its_corners() -> None:
    """Edges are predicted from above and from the left, so that only corners count, whatever the length of the edges.

    The lower right corner is predicted, too: its left and its upper neighbor are equal.
    """
    colors = torch.zeros(9, 11, 1)
    colors[2:6, 3:8] = 1.0
    kept = select(colors)
    assert kept.nonzero().tolist() == [[0, 0], [2, 3], [2, 8], [6, 3]]


def test_larger_thresholds_drop_more_tokens_of_a_ramp() -> None:
    ramp = torch.arange(64.0).view(1, 64, 1) / 63
    numbers = [int(select(ramp, threshold=threshold).sum()) for threshold in (0.0, 0.02, 0.05, 0.1, 0.3, 1.0)]
    assert numbers == sorted(numbers, reverse=True)
    assert (numbers[0], numbers[-1]) == (64, 1)
    assert len(set(numbers)) == len(numbers)


def test_a_budget_keeps_the_tokens_with_the_largest_errors() -> None:
    colors = torch.tensor([0.0, 0.1, 0.4, 0.4, 1.0]).view(1, 5, 1)
    assert select(colors, budget=0.6).tolist() == [[True, False, True, False, True]]


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="threshold=-1"):
        PixelPrune(threshold=-1)
    model = FAMILIES["qwen2_vl"].model()
    with pytest.raises(ValueError, match="image_std"), PixelPrune(threshold=0.1)(model):
        pass
    with pytest.raises(ValueError, match="patch_removal"), PixelPrune()(FAMILIES["llava"].model()):
        pass
    with pytest.raises(ValueError, match="resizes images"):
        Composed([ImageDownsample(0.5), HiRED(0.2)])


def draw(size: tuple[int, int]) -> Image.Image:
    """Return a white image with a red rectangle and a line of noise."""
    image = Image.new("RGB", size[::-1], "white")
    ImageDraw.Draw(image).rectangle([size[1] // 2, size[0] // 3, size[1] - 20, size[0]], fill="red")
    return image


def batch(family: Any) -> Any:
    """Return inputs of two prompts with drawn images of three sizes."""
    images = [[draw((168, 224))], [draw((112, 196)), draw((196, 140))]]
    return family.inputs(images, [family.text(len(row), number) for number, row in enumerate(images)])


class MaskedColumns(TorchFunctionMode):
    """Masks keys of dropped patches in consecutive calls of torch's attention function over a sequence.

    A window or image without a kept patch is not masked: nothing else reads its output.
    """

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept, self.start = kept, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **options)
        length = args[1].shape[2]
        part = self.kept[self.start : self.start + length]
        self.start = (self.start + length) % len(self.kept)
        mask = options.get("attn_mask")
        if part.any():
            allowed = part[None, None, None]
            if mask is None:
                mask = allowed
            else:
                mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -1e9)
        return func(*args, **{**options, "attn_mask": mask})


@contextmanager
def masked_tower(model: Any, inputs: Any, selections: Sequence[Selection]) -> Iterator[None]:
    """Mask the columns of the dropped patches in every layer of the vision tower inside the block."""
    adapter: Any = find_adapter(model)
    layouts = adapter.layouts(inputs)
    positions = torch.cat(adapter.select_patches(selections, layouts, inputs))
    kept = torch.zeros(sum(layout.tokens for layout in layouts) * adapter.pooling**2, dtype=torch.bool)
    kept[positions] = True
    forward = adapter.tower.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with MaskedColumns(kept):
            return forward(*args, **kwargs)

    with replaced_forward(adapter.tower, run):
        yield


@torch.no_grad()
def test_dropped_patches_equal_masked_columns_of_the_full_tower(family: Any) -> None:
    model, inputs = family.model(), batch(family)
    with PixelPrune()(model) as run:
        actual = model(**inputs)
    kept = torch.cat([selection.kept.flatten() for selection in run.selections])
    assert 0.02 < kept.float().mean() < 0.7
    with masked_tower(model, inputs, run.selections):
        expected = model(**oracle_inputs(model, inputs, run, "preserve"))
    only_prompt = model(**oracle_inputs(model, inputs, run, "preserve"))
    positions = kept_mask(model, inputs, run)
    assert (actual.logits - expected.logits)[positions].abs().max() <= 1e-5
    assert (actual.logits - only_prompt.logits)[positions].abs().max() > 1e-3


@torch.no_grad()
def test_kept_tokens_are_the_places_of_the_changes(family: Any) -> None:
    """The selection is in the order of the image, also if the tower orders patches by windows."""
    model = family.model()
    with PixelPrune()(model) as run:
        model(**batch(family))
    for selection in run.selections:
        rows, cols = selection.geometry.token_grid
        kept = selection.kept.view(rows, cols)
        assert kept[0].nonzero().tolist() == [[0]]
        assert not kept[:, : cols // 2 - 1].flatten()[1:].any()
        assert kept[:, cols // 2 - 1 :].any()


@torch.no_grad()
def test_nothing_changes_if_all_tokens_differ_from_their_prediction(family: Any) -> None:
    model, inputs = family.model(), family.batch([(112, 112)], [(60, 160)])
    expected, state = model(**inputs, output_hidden_states=True), collect_state(model)
    hooks: list[bool] = []
    layer = find_adapter(model).tower_layers[0]  # type: ignore[attr-defined]
    watch = layer.register_forward_hook(lambda *_: hooks.append("forward" in vars(layer)))
    with PixelPrune()(model) as run:
        actual = model(**inputs, output_hidden_states=True)
    watch.remove()
    assert hooks == [False]
    assert all(selection.is_identity for selection in run.selections)
    assert torch.equal(actual.logits, expected.logits)
    assert all(map(torch.equal, actual.hidden_states, expected.hidden_states))
    with PixelPrune()(model):
        model(**batch(family))
    assert collect_state(model) == state


@torch.no_grad()
def test_compositions_with_later_stages(family: Any) -> None:
    model, inputs = family.model(), batch(family)

    def run_selections(reducer: TokenReducer) -> tuple[list[Selection], Run]:
        with reducer(model) as run:
            model(**inputs)
        return run.selections, run

    pixels = [selection.kept for selection in run_selections(PixelPrune())[0]]
    numbers = [int(kept.sum()) for kept in pixels]
    for later in (HiRED(0.1), Random(0.1)):
        selections, _ = run_selections(Composed([PixelPrune(), later]))
        assert [s.kept_tokens for s in selections] == [
            min(s.asked, n) for s, n in zip(selections, numbers, strict=True)
        ]
        assert not any((s.kept & ~kept).any() for s, kept in zip(selections, pixels, strict=True))
    _, run = run_selections(PixelPrune() >> FastV(layer=1, budget=0.5))
    assert [selection.kept_tokens for selection in run.cuts[0].selections] == [number // 2 for number in numbers]
    selections, _ = run_selections(PixelPrune() >> RandomPatches(schedule=((1, 0.5),)))
    expected = [number // 2 if find_adapter(model).pooling == 1 else number for number in numbers]  # type: ignore[attr-defined]
    assert [selection.kept_tokens for selection in selections] == expected
    assert not any((s.kept & ~kept).any() for s, kept in zip(selections, pixels, strict=True))


MERGED = ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_vl", "qwen2_5_vl", "glm4v"))]


@pytest.mark.parametrize("name", MERGED)
@torch.no_grad()
def test_mergers_run_on_kept_tokens(name: str) -> None:
    model, inputs = FAMILIES[name].model(), batch(FAMILIES[name])
    adapter, rows = find_adapter(model), []

    def store_rows(module: Any, args: Any, output: Tensor) -> None:
        rows.append(len(output))

    mergers = adapter.mergers  # type: ignore[attr-defined]
    hooks = [list(merger.children())[-1].register_forward_hook(store_rows) for merger in mergers]
    with PixelPrune()(model) as run:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    assert rows == [sum(selection.kept_tokens for selection in run.selections)] * len(mergers)
    assert len(mergers) == (3 if name == "qwen3_vl" else 1)


@torch.no_grad()
def test_a_budget_of_zero_keeps_only_text(family: Any) -> None:
    model, inputs = family.model(), batch(family)
    outputs = []
    for reducer in (PixelPrune(0), Random(0, positions="preserve"), Composed([PixelPrune(0), HiRED(0.5)])):
        with reducer(model) as run:
            outputs.append(model(**inputs).logits[:, -1])
        assert [selection.kept_tokens for selection in run.selections] == [0, 0, 0]
    assert torch.equal(outputs[0], outputs[1])


def test_a_shared_encoding_is_reduced(family: Any) -> None:
    shared, separate = prepare_both(find_adapter(family.model()), PixelPrune(), batch(family))  # type: ignore[arg-type]
    assert shared.is_shortened
    for selection, expected in zip(shared.selections, separate.selections, strict=True):
        assert torch.equal(selection.kept, expected.kept)
    for features, expected in zip(
        *(c.inputs["mm_encoder_outputs"]["image"].pooler_output for c in (shared, separate)), strict=True
    ):
        assert torch.equal(features, expected)


@pytest.mark.slow
def test_the_numbers_of_tokens_are_read_from_an_accelerator_once() -> None:
    """A random selection whose numbers follow from the budget needs one read less."""
    model, inputs = move_model(FAMILIES["pixtral"].model()), dict(batch(FAMILIES["pixtral"]))

    def count_reads(reducer: TokenReducer) -> int:
        with torch.no_grad(), EmulatedDevice(), reducer(model):
            for _ in range(1 + DRAWABLE // 3):  # the first calls copy tables and keep pixels for drawing
                model(**to_device(inputs))
            with EmulatedDevice() as device:
                model(**to_device(inputs))
        return sum(device.reads.values())

    assert count_reads(PixelPrune()) == count_reads(Random(0.3, positions="preserve")) + 1
