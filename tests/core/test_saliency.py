"""A second model looks at the tiles: timm's CLS attention against full maps, laid over the tokens, on live models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.adapter import find_adapter
from tokenprune.configuration import as_config
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.tasks import Boards
from tokenprune.image import Signal
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.models.qwen2_vl import Qwen2VLAdapter
from tokenprune.pipeline import Pipeline
from tokenprune.reducer import TokenReducer
from tokenprune.saliency import resample_attention
from tokenprune.strategies import GlobalCom2, HiRED
from tokenprune.strategies.components import GlobalTopAllocation, RandomSelection, TimmSaliency, TopAttentionSelection
from tokenprune.strategies.components.saliency_model import cls_attention
from tokenprune.testing import tiny_models as tiny

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
LOOK = TimmSaliency("test_vit", pretrained=False, image_mean=MEAN, image_std=STD)


# --- the row ----------------------------------------------------------------------------------------------------------


def sharp(name: str) -> Any:
    """A timm ViT whose attention rows are far from uniform; small whatever its name."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, embed_dim=48, depth=3, num_heads=3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("qkv.weight", "q_proj.weight", "k_proj.weight")):
                parameter.normal_(std=0.4)
    return model.eval()


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_224", "deit_small_distilled_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"],
)
def test_rows_are_those_of_the_full_map(name: str) -> None:
    """One prefix token and several, rotary and relative positions; the map is that of timm's own unfused attention."""
    model, pixels = sharp(name), torch.randn(2, 3, 64, 64)
    for block in model.blocks:
        block.attn.fused_attn = True
    found = cls_attention(model, pixels, {0, 2})
    assert set(found) == {0, 2}
    maps = {}
    for index, block in enumerate(model.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, a, out, index=index: maps.update({index: out}))
    with torch.no_grad():
        model.forward_features(pixels)
    for index, rows in found.items():
        own = maps[index][:, :, 0, model.num_prefix_tokens :]
        assert rows.shape == (2, 3, 16)
        torch.testing.assert_close(rows, own, atol=1e-5, rtol=1e-4)
        assert own.amax() > 3 * own.mean()


def test_no_hook_stays_on_the_second_model() -> None:
    model = sharp("vit_small_patch16_224")
    for block in model.blocks:
        block.attn.fused_attn = True
    with pytest.raises(AssertionError):
        cls_attention(model, torch.randn(1, 3, 32, 32), {0, 1})
    cls_attention(model, torch.randn(1, 3, 64, 64), {0, 1})
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# --- laid over the tokens ---------------------------------------------------------------------------------------------

SIDES = st.integers(1, 20)


@settings(max_examples=60, deadline=None)
@given(grid=st.tuples(SIDES, SIDES), token_grid=st.tuples(SIDES, SIDES), seed=st.integers(0, 99))
def test_what_is_paid_stays(grid: tuple[int, int], token_grid: tuple[int, int], seed: int) -> None:
    attention = torch.rand(2, 3, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    laid = resample_attention(attention, grid, token_grid)
    assert laid.shape == (2, 3, token_grid[0] * token_grid[1])
    assert bool((laid >= 0).all())
    torch.testing.assert_close(laid.sum(-1), attention.sum(-1))


@settings(max_examples=40, deadline=None)
@given(grid=st.tuples(SIDES, SIDES), token_grid=st.tuples(SIDES, SIDES), place=st.tuples(SIDES, SIDES))
def test_a_peak_stays_where_it_is(grid: tuple[int, int], token_grid: tuple[int, int], place: tuple[int, int]) -> None:
    row, col = place[0] % grid[0], place[1] % grid[1]
    attention = torch.zeros(1, 1, *grid)
    attention[..., row, col] = 1
    laid = resample_attention(attention.flatten(2), grid, token_grid).view(token_grid)
    for axis, (one, old, new) in enumerate(zip((row, col), grid, token_grid, strict=True)):
        middle = float((laid.sum(1 - axis) * (torch.arange(new) + 0.5) / new).sum())
        assert abs(middle - (one + 0.5) / old) <= 0.5 / min(old, new) + 1e-6


def test_a_whole_number_of_patches_is_added_up() -> None:
    attention = torch.rand(2, 3, 8 * 6)
    blocks = attention.view(2, 3, 4, 2, 3, 2).sum((3, 5)).flatten(2)
    torch.testing.assert_close(resample_attention(attention, (8, 6), (4, 3)), blocks)


# --- on live models ---------------------------------------------------------------------------------------------------

ROWS = ([(112, 112), (60, 170)], [(100, 41)])


def by_hand(pixels: torch.Tensor, token_grid: tuple[int, int], index: int) -> torch.Tensor:
    """What the second look should see in the tiles of an image, from timm alone."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    colors = (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
    shown = F.interpolate(colors, (160, 160), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    maps: list[torch.Tensor] = []
    model.blocks[index].attn.attn_drop.register_forward_hook(lambda m, a, out: maps.append(out))
    with torch.no_grad():
        model.forward_features((shown - mean) / std)
    return resample_attention(maps[0][:, :, 0, 1:], (10, 10), token_grid)


@torch.no_grad()
def test_hired_runs_on_a_model_without_cls() -> None:
    """It keeps what it keeps if timm's attention is called the tower's; layers count in the second model."""
    model, inputs = tiny.tiny_model("llava_next", tower="siglip"), tiny.batch("llava_next", *ROWS, tower="siglip")
    with HiRED(0.2, attention=LOOK)(model) as run:
        model(**inputs)
    plain = find_adapter(model).encode(inputs, ()).images
    depth = len(timm.create_model("test_vit").blocks)
    tower = plain[0]
    assert (run.attention, depth, tower.layers, tower.feature_layer) == (LOOK.name, 6, 4, 2)
    for image, pixels, selection in zip(plain, inputs["pixel_values"], run.selections, strict=True):
        tiles = pixels[: image.geometry.tiles]
        signals = {
            ("cls_attention", at): by_hand(tiles, (4, 4), index)
            for at, index in ((0, 0), (tower.feature_layer, depth - 1))
        }
        expected = HiRED(0.2).reduce(replace(image, signals=signals))
        assert torch.equal(expected.kept, selection.kept)
    received = HiRED(0.2)(model)
    with received as other:
        model(**inputs)
    assert any(not torch.equal(a.kept, b.kept) for a, b in zip(run.selections, other.selections, strict=True))


@torch.no_grad()
def test_what_looking_costs_is_counted() -> None:
    """Against torch's counter on the real run."""
    model, inputs = tiny.tiny_model("llava_next", tower="siglip"), tiny.batch("llava_next", *ROWS, tower="siglip")
    with HiRED(0.2, attention=LOOK)(model) as run:
        model(**inputs)
    vit = timm.create_model("test_vit").eval()
    for block in vit.blocks:
        block.attn.fused_attn = False
    tiles = sum(selection.geometry.tiles for selection in run.selections)
    with FlopCounterMode(display=False) as counter:
        vit.forward_features(torch.randn(tiles, 3, 160, 160))
    assert run.account.saliency_flops == counter.get_total_flops()
    assert run.account.summary()["second_look_flops"] == counter.get_total_flops()
    assert run.account.attention == "TimmSaliency(test_vit)"
    assert "attention: TimmSaliency(test_vit); saliency model: " in str(run.account)
    with HiRED(0.2)(model) as other:
        model(**inputs)
    assert other.account.saliency_flops == 0
    assert str(other.account).endswith("of full; attention: received_attention")


@torch.no_grad()
def test_layers_are_those_of_the_second_model() -> None:
    """Two choices that are one layer of the tower can be two of the second model; all forms are understood."""
    model, inputs = tiny.tiny_model("llava", tower="siglip"), tiny.batch("llava", [(90, 120)], tower="siglip")
    seen = {}
    for layer in ("feature", -2, 5, 1.0, [0, -1]):
        reducer = HiRED(0.3, attention=LOOK, selection=TopAttentionSelection(layer=layer))
        with reducer(model) as run:
            model(**inputs)
        seen[str(layer)] = run.selections[0].scores
    last, first = (by_hand(inputs["pixel_values"], (4, 4), index).sum(1) for index in (5, 0))
    for layer in ("feature", "5", "1.0"):
        torch.testing.assert_close(seen[layer], last)
    torch.testing.assert_close(seen["[0, -1]"], (first + last) / 2)
    assert not torch.equal(seen["-2"], seen["feature"])
    with (
        pytest.raises(ValueError, match="6 is no layer of a vision tower with 6 layers"),
        HiRED(0.3, attention=LOOK, selection=TopAttentionSelection(layer=6))(model),
    ):
        model(**inputs)


@torch.no_grad()
def test_native_resolution_and_one_pool_of_tokens() -> None:
    """Images are put together from their patches; alone and in a batch the same tokens stay."""
    model = Qwen2VLAdapter.example()
    adapter = Qwen2VLAdapter(model)
    reducer = HiRED(0.3, attention=LOOK, allocation=GlobalTopAllocation())
    with reducer(model) as together:
        model(**adapter.example_inputs([[(60, 170)], [(112, 112)]]))
    for number, size in enumerate([(60, 170), (112, 112)]):
        with reducer(model) as alone:
            model(**adapter.example_inputs([[size]]))
        assert torch.equal(alone.selections[0].kept, together.selections[number].kept)
        assert torch.equal(alone.selections[0].scores, together.selections[number].scores)
    tiles = adapter.read_tiles(inputs := adapter.example_inputs([[(60, 170)]]), adapter.layouts(inputs))
    assert [one.shape for one in tiles] == [(1, 3, 56, 168)]
    expected = by_hand(tiles[0], (2, 6), 5).sum(1)
    torch.testing.assert_close(together.selections[0].scores, expected)
    model, inputs = tiny.tiny_model("llava_next", tower="siglip"), tiny.batch("llava_next", *ROWS, tower="siglip")
    with reducer(model) as run:  # tiles in one pool
        model(**inputs)
    assert run.account.kept == run.account.asked


@torch.no_grad()
def test_a_model_in_bfloat16_is_looked_at_in_float32() -> None:
    model = tiny.tiny_model("llava_next", dtype=torch.bfloat16, tower="siglip")
    inputs = tiny.batch("llava_next", *ROWS, tower="siglip")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with HiRED(0.2, attention=LOOK)(model) as run:
        model(**inputs)
    assert run.selections[0].scores is not None
    assert run.selections[0].scores.dtype == torch.float32
    assert run.account.kept == run.account.asked


def test_only_what_reads_cls_attention_is_given_another() -> None:
    model, inputs = tiny.tiny_model("llava_next", tower="siglip"), tiny.batch("llava_next", *ROWS, tower="siglip")
    with torch.no_grad(), HiRED(0.2, attention=LOOK, selection=RandomSelection())(model) as run:
        model(**inputs)
    assert run.account.attention is not None  # the allocation reads it
    with pytest.raises(ValueError, match="missing: cls_logits"):
        GlobalCom2(0.2, attention=LOOK)(model).__enter__()


# --- configuration ----------------------------------------------------------------------------------------------------


def test_a_second_look_is_configuration() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reducer", type=TokenReducer)
    reducer = HiRED(0.2, attention=LOOK)
    text = parser.dump(parser.parse_object({"reducer": as_config(reducer)}))
    assert parser.instantiate(parser.parse_string(text)).reducer == reducer


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (
            replace(LOOK, model_name="vit_smal_patch16_224"),
            r"no model 'vit_smal_patch16_224'\. Did you mean vit_small_p",
        ),
        (replace(LOOK, model_name="resnet18"), "resnet18 is no plain ViT with a CLS token"),
        (replace(LOOK, model_name="vit_base_patch16_siglip_224"), "no plain ViT with a CLS token"),
        (replace(LOOK, model_name="cait_xxs24_224"), "no plain ViT with a CLS token"),
        (replace(LOOK, checkpoint="nowhere.pth"), "weights of test_vit cannot be loaded from nowhere.pth"),
        (replace(LOOK, image_mean=None, image_std=None), "from ''.*pass image_mean and image_std"),
    ],
)
def test_what_cannot_be_looked_with_is_said(look: TimmSaliency, message: str) -> None:
    model, inputs = tiny.tiny_model("llava", tower="siglip"), tiny.batch("llava", [(90, 120)], tower="siglip")
    with pytest.raises(ValueError, match=message), HiRED(0.2, attention=look)(model):
        model(**inputs)


def test_weights_without_a_network_are_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"weights of vit_tiny_patch16_224 cannot be loaded from the hub .*checkpoint; pretrained=Fa"
    ):
        TimmSaliency("vit_tiny_patch16_224").compute_attention(torch.rand(1, 3, 56, 56), (4, 4), ["first"])


def test_a_file_of_weights_is_read(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    images = torch.rand(1, 3, 160, 160)
    own = (
        TimmSaliency("test_vit", checkpoint=str(tmp_path / "own.pth"))
        .compute_attention(images, (10, 10), ["first"])
        .rows[0]
    )
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    for block in model.blocks:
        block.attn.fused_attn = True
    torch.testing.assert_close(own, cls_attention(model, (images - mean) / std, {0})[0])
    assert not torch.equal(own, LOOK.compute_attention(images, (10, 10), ["first"]).rows[0])


def test_mean_and_deviation_belong_together() -> None:
    with pytest.raises(ValueError, match="image_mean and image_std belong together"):
        TimmSaliency("test_vit", image_mean=MEAN)
    with pytest.raises(ValueError, match=r"attention='probe' is not known; use one of 'auto', .* or a SaliencyModel"):
        HiRED(0.2, attention="probe")  # type: ignore[arg-type]


# --- experiments ------------------------------------------------------------------------------------------------------


def test_settings_of_a_model_without_cls_share_an_encoding(tmp_path: Path) -> None:
    """Received attention, the pooling head and a second look, in one grid; the environment says what each read."""
    place = tmp_path / "siglip"
    model, processor = tiny.tiny_model("llava_next", tower="siglip"), tiny.tiny_processor("llava_next", "siglip")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    own = processor.image_processor
    assert list(map(list, LlavaNextAdapter(type(model).from_pretrained(place)).pixel_mean_std())) == [
        list(own.image_mean),
        list(own.image_std),
    ]
    look = TimmSaliency("test_vit", pretrained=False)
    reducers = {
        "received_attention": HiRED(0.2),
        "pooling_attention": HiRED(0.2, attention="pooling"),
        "TimmSaliency(test_vit)": HiRED(0.2, attention=look),
    }
    cells = [
        Setting(Experiment(str(place), reducer, Boards(number=1), max_new_tokens=1, batch_size=32), name)
        for name, reducer in reducers.items()
    ]
    progress = run_settings(cells, tmp_path / "out")
    assert (progress.errors, progress.encodes) == (0, 1)
    for cell in cells:
        folder = cell.folder(tmp_path / "out")
        assert json.loads((folder / "environment.json").read_text())["attention"] == cell.name
        rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        assert rows
        assert all(row["error"] is None and row["kept"] == row["asked"] > 0 for row in rows)
    insisting = replace(cells[0].experiment, reducer=HiRED(0.2, attention="cls"))
    with pytest.raises(ValueError, match="gives no cls_attention"):
        run_settings([Setting(insisting, "insisting")], tmp_path / "other")


def test_signals_that_stand_in_are_what_is_captured() -> None:
    """A second look takes nothing from the tower."""
    adapter = find_adapter(tiny.tiny_model("llava", tower="siglip"))
    assert Pipeline(HiRED(0.2, attention=LOOK), adapter).needs == []
    layers = ("first", "feature")
    assert Pipeline(HiRED(0.2), adapter).needs == [Signal("received_attention", layer) for layer in layers]
