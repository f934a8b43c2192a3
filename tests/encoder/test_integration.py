"""Strategies inside the vision tower in calls, compositions, accounts and drawings; nothing is left on the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.encoder import LargestPatches
from tokenprune import Budget, EncodedImage, PatchGroups, TokenReducer
from tokenprune.adapter import find_adapter
from tokenprune.catalog import strategies
from tokenprune.decoder_reducer import AtLayer
from tokenprune.encoder.patches import RemainingPatches
from tokenprune.geometry import TileGeometry
from tokenprune.pipeline import Pipeline
from tokenprune.strategies import IPCV, EViT, HiRED, RandomPatches, ToMe, UniformStride
from tokenprune.testing.encoded_images import random_encoded_image
from tokenprune.testing.families import FAMILIES
from tokenprune.testing.tiny_models import batch, tiny_model
from tokenprune.viz import TOWER, overlay

SIZES = [(112, 112)], [(60, 160)]
PROJECTOR = sorted(name for name, kind in strategies().items() if kind.stage.name == "projector")


def describe_modules(model: nn.Module) -> list[Any]:
    """Return hooks, replaced forwards, children and configs of all modules of a model."""
    return [
        (
            name,
            sorted(vars(module)),
            list(module._modules),
            [type(child).__name__ for child in module._modules.values()],
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    ]


@dataclass
class Fails(LargestPatches):
    """Raises an error at the second step."""

    error: str = "ValueError"

    def group(self, image: EncodedImage, number: int) -> PatchGroups:
        if image.feature_layer == 2:
            raise {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[self.error]("at the second step")
        return super().group(image, number)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "phi4_multimodal"])
@pytest.mark.parametrize(
    ("reducer", "error"),
    [
        (LargestPatches(), None),
        (Fails(schedule=((1, 0.5), (2, 0.4))), ValueError),
        (Fails(schedule=((1, 0.5), (2, 0.4)), error="KeyboardInterrupt"), KeyboardInterrupt),
    ],
    ids=["success", "error", "interrupt"],
)
def test_nothing_is_left_on_the_model(name: str, reducer: TokenReducer, error: type[BaseException] | None) -> None:
    family = FAMILIES[name]
    model, inputs = family.model(torch.float32), family.batch(*family.rows[:1])
    with torch.no_grad():
        expected = model(**inputs).logits
        before = describe_modules(model)  # after a call, because transformers places hooks of its own
        if error is None:
            with reducer(model):
                assert not torch.equal(model(**inputs).logits, expected)
        else:
            with pytest.raises(error, match="at the second step"), reducer(model):
                model(**inputs)
        assert describe_modules(model) == before
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)


@pytest.mark.parametrize("name", PROJECTOR)
def test_later_strategies_select_among_the_patches_of_the_tower(name: str) -> None:
    """A strategy before the LLM spends its budget among the tokens whose patches remain in the tower."""
    model, inputs = tiny_model("llava_next"), batch("llava_next", *SIZES)
    later: Any = strategies()[name](9)
    if later.reads_question:
        pytest.skip("the tiny models have no text tower")
    with torch.no_grad(), (ToMe(0.5) >> later)(model) as run:
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    for number, selection in enumerate(run.selections):
        mask = run.find_tower_mask(number)
        assert mask is not None
        assert mask.sum(dim=1).tolist() == [8] * len(mask)
        assert not bool((selection.kept & ~mask).any())
        assert selection.kept_tokens == 9 if later.exact else 0 < selection.kept_tokens <= 9


@pytest.mark.parametrize("newlines", ["keep_rows", "drop", "keep"])
def test_newline_tokens_belong_to_rows_with_a_remaining_token(newlines: Any) -> None:
    model, inputs = tiny_model("llava_next"), batch("llava_next", *SIZES)
    with torch.no_grad(), RandomPatches(0.1, newlines=newlines)(model) as alone:
        model(**inputs)
    with torch.no_grad(), (RandomPatches(0.1) >> UniformStride(1.0, newlines=newlines))(model) as composed:
        model(**inputs)
    for first, second in zip(alone.selections, composed.selections, strict=True):
        assert first.kept_newlines == second.kept_newlines
        layout, mask = first.geometry, first.newline_mask
        assert mask is not None
        if newlines == "keep_rows":
            rows = layout.token_newline[first.kept.flatten()[layout.token_order]]
            expected = torch.zeros(layout.newlines + 1, dtype=torch.bool).scatter(0, rows, True)[:-1]
            assert torch.equal(mask, torch.where(layout.ends_row, expected, True))
            assert 0 < first.kept_newlines < layout.newlines
        else:
            assert first.kept_newlines == (layout.newlines if newlines == "keep" else 0)


@pytest.mark.parametrize(("of", "expected"), [("unpadded", 28), ("encoded", 32)])
def test_budgets_of_later_strategies_refer_to_all_tokens(of: Any, expected: int) -> None:
    """A ratio means the same number of tokens with and without a strategy inside the tower."""
    model, inputs = tiny_model("llava_next"), batch("llava_next", [(60, 160)])
    for reducer in (HiRED(Budget(0.5, of=of)), RandomPatches(0.8) >> HiRED(Budget(0.5, of=of))):
        with torch.no_grad(), reducer(model) as run:
            model(**inputs)
        assert run.selections[0].asked == expected


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_and_dtypes(kernel: str, dtype: torch.dtype) -> None:
    inputs = batch("llava_next", *SIZES)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    reducer = ToMe(r=2) >> HiRED(0.3) >> AtLayer(1, UniformStride(0.5))
    model, reference = tiny_model("llava_next", kernel, dtype), tiny_model("llava_next")
    with torch.no_grad(), reducer(model) as run:
        logits = model(**inputs).logits
        sequences = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=True)
    assert logits.isfinite().all()
    assert sequences.shape[1] <= inputs["input_ids"].shape[1] + 3
    assert len(run.cuts) == 1
    if dtype == torch.float32:
        with torch.no_grad(), reducer(reference):
            assert torch.allclose(reference(**batch("llava_next", *SIZES)).logits, logits, atol=1e-5)


def test_training_text_rows_and_calls_in_a_row() -> None:
    model = tiny_model("llava_next")
    inputs = batch("llava_next", [(112, 112)], [], [(60, 160), (40, 40)])
    with EViT()(model) as run:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        counts = run.account.tower_patches
        with torch.no_grad():
            model(**inputs)
    assert loss.isfinite()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.model.language_model.parameters())
    assert run.account.tower_patches == 2 * counts
    assert len(run.selections) == 6


def test_shared_encodings_equal_encodings_of_their_own() -> None:
    """Evaluation encodes an image once for all strategies; a strategy in the tower encodes it again."""
    model, inputs = tiny_model("llava_next"), batch("llava_next", SIZES[0])
    text = {name: torch.cat([inputs[name]] * 2) for name in ("input_ids", "attention_mask")}
    encoding = Pipeline(HiRED(), find_adapter(model)).encode(inputs)
    pixels = torch.zeros(len(encoding.images[0].features), 2, 2, 3, dtype=torch.uint8)
    encoding = replace(encoding, images=[replace(encoding.images[0], pixels=pixels)])
    for reducer in (ToMe(r=2) >> HiRED(0.3), EViT(), ToMe(1.0)):
        pipeline = Pipeline(reducer, find_adapter(model))
        shared = pipeline.prepare(text, for_generate=True, encoding=encoding.repeat(2))
        expected = Pipeline(reducer, find_adapter(model)).prepare(inputs, for_generate=True)
        assert shared.selections[0].pixels is pixels
        assert [torch.equal(s.kept, expected.selections[0].kept) for s in shared.selections] == [True, True]
        assert shared.selections[0].kept_tokens > 0


def count_by_layer(reducer: Any, patches: int, layers: int) -> int:
    steps, number, total = reducer.list_steps(patches, layers), patches, 0
    for layer in range(layers):
        number = steps.get(layer, number)
        total += number
    return total


@pytest.mark.parametrize(
    "reducer", [ToMe(r=2), EViT(), RandomPatches(0.5, schedule=((2, 0.5),))], ids=lambda r: r.label
)
def test_account_counts_patches_of_all_layers(reducer: Any) -> None:
    model, inputs = tiny_model("llava_next"), batch("llava_next", SIZES[0])
    with torch.no_grad(), reducer(model) as run:
        model(**inputs)
    account, tiles = run.account, 5
    assert account.tower_patches_full == tiles * 16 * 3  # three of four layers run
    assert account.tower_patches == tiles * count_by_layer(reducer, 16, 3)
    assert f"{account.tower_patches / (tiles * 48):.1%} of patches x layers (saved in tower and LLM)" in str(account)
    assert account.summary()["tower_patches"] == account.tower_patches
    with torch.no_grad(), type(reducer)(1.0)(model) as unreduced:
        model(**inputs)
    assert unreduced.account.tower_patches == unreduced.account.tower_patches_full == account.tower_patches_full
    assert "vision tower: 100.0% of patches x layers" in str(unreduced.account)
    assert "saved in" not in str(unreduced.account)
    assert "vision tower" in account._repr_html_()


@pytest.mark.parametrize(("name", "reducer"), [("qwen2_5_vl", RandomPatches()), ("llava_next", IPCV())])
def test_account_says_that_all_tokens_enter(name: str, reducer: Any) -> None:
    """All tokens enter the LLM if a token is several patches, or if dropped patches are restored."""
    family = FAMILIES[name]
    model, inputs = family.model(torch.float32), family.batch(*family.rows[:1])
    with torch.no_grad(), reducer(model) as run:
        model(**inputs)
    assert run.account.kept == run.account.valid
    assert "of patches x layers (saved in the tower only)" in str(run.account)
    assert run.find_tower_mask(0) is None


def test_overlay_shows_the_patches_that_left_inside_the_tower() -> None:
    model, inputs = tiny_model("llava_next"), batch("llava_next", SIZES[0])
    with torch.no_grad(), (RandomPatches(0.5) >> HiRED(0.3))(model) as run:
        model(**inputs)
    mask, selection = run.find_tower_mask(0), run.selections[0]
    drawn, plain = run.overlay(), overlay(selection)
    assert drawn.height > plain.height  # a legend
    color = tuple(int(TOWER[start : start + 2], 16) for start in (1, 3, 5))
    assert color in {pixel for _, pixel in drawn.getcolors(1 << 24)}
    assert mask is not None
    assert mask.sum() == 40
    every_token = overlay(selection, tower_mask=torch.ones_like(selection.kept))
    assert every_token.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ToMe(0.3, r=2), "got budget=0.3 and r=2; set the patches that remain, or"),
        (lambda: ToMe(r=-1), "r=-1 is no number of patches"),
        (lambda: EViT(schedule=((1, 0.5), (2, 0.7))), "a later step keeps at most the patches of an earlier step"),
        (lambda: EViT(schedule=()), "a schedule needs at least one step"),
        (lambda: EViT(Budget(0.3)), "refers to the tokens of an image"),
        (lambda: HiRED() >> ToMe(), "the parts act at the stages projector, encoder"),
    ],
)
def test_errors_of_options(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_errors_of_models_and_layers() -> None:
    family = FAMILIES["qwen2_5_vl"]
    with pytest.raises(ValueError, match="ToMe needs to merge patches inside the vision tower of Qwen2_5"):
        ToMe()(family.model(torch.float32)).__enter__()
    model, inputs = tiny_model("llava_next"), batch("llava_next", SIZES[0])
    with (
        pytest.raises(ValueError, match="layer 3 of the schedule does not run"),
        RandomPatches(schedule=((3, 0.5),))(model),
    ):
        model(**inputs)


def test_evit_fuses_the_dropped_patches() -> None:
    """The last patch is the sum of the dropped patches, weighted by the CLS attention."""
    image, number = random_encoded_image(TileGeometry.single((4, 5))), 6
    scores = image.cls_attention("feature").mean(dim=1)[0]
    patches = RemainingPatches.all(1, 20, "first", image.device)
    states = torch.randn(1, 21, 3)
    remaining, sequence = patches.apply(EViT(fuse=True).group(image, number), states)
    order = scores.argsort(descending=True)
    kept, dropped = order[: number - 1].sort().values, order[number - 1 :]
    assert remaining.index[0].tolist() == [*kept.tolist(), int(dropped[0])]
    assert torch.equal(sequence[0, :number], states[0, [0, *(kept + 1)]])
    expected = sum(scores[n] * states[0, n + 1] for n in dropped)
    assert torch.allclose(sequence[0, number], expected)
    assert EViT().group(image, number).group is None


@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_evit_with_a_fused_patch_in_a_tower(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.model(torch.float32), family.batch(*family.rows[:1])
    logits = []
    with torch.no_grad():
        for reducer in (EViT(fuse=True), EViT(), EViT(fuse=True) >> HiRED(0.3)):
            with reducer(model) as run:
                logits.append(model(**inputs).logits)
            assert run.account.tower_patches < run.account.tower_patches_full
    assert not torch.equal(logits[0][:, -1], logits[1][:, -1])
    with pytest.raises(ValueError, match="EViT needs to merge patches"):
        EViT(fuse=True)(FAMILIES["qwen2_5_vl"].model(torch.float32)).__enter__()


def test_wrapped_models() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny_model("llava_next"), batch("llava_next", SIZES[0])
    with torch.no_grad(), ToMe(r=2)(model):
        expected = model(**inputs).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=True))
    with torch.no_grad(), ToMe(r=2)(wrapped):
        assert torch.equal(wrapped(**inputs).logits, expected)


def test_scores_are_used() -> None:
    """The scores of a strategy decide which patches remain."""

    @dataclass
    class LastPatches(LargestPatches):
        def score(self, image: EncodedImage) -> Tensor:
            return torch.arange(image.geometry.tokens).expand(image.geometry.tiles, -1)

    model, inputs = tiny_model("llava"), batch("llava", SIZES[0])
    with torch.no_grad(), LastPatches(4)(model) as run:
        model(**inputs)
    assert run.selections[0].kept[0].nonzero()[:, 0].tolist() == [12, 13, 14, 15]
