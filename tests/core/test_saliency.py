"""Test saliency models: CLS attention of timm models, its resampling to the token grid, and runs with a reducer."""

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
from tokenprune.testing.examples import build_example

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SALIENCY_MODEL = TimmSaliency("test_vit", pretrained=False, image_mean=MEAN, image_std=STD)


# --- CLS attention ----------------------------------------------------------------------------------------------------


def build_sharp_vit(name: str) -> Any:
    """Build a small timm ViT of the named architecture whose attention rows are far from uniform."""
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
def test_cls_rows_equal_the_full_attention_map(name: str) -> None:
    """The rows equal timm's unfused attention for one or more prefix tokens and rotary or relative positions."""
    model, pixels = build_sharp_vit(name), torch.randn(2, 3, 64, 64)
    for block in model.blocks:
        block.attn.fused_attn = True
    rows_by_layer = cls_attention(model, pixels, {0, 2})
    assert set(rows_by_layer) == {0, 2}
    maps = {}
    for index, block in enumerate(model.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(
            lambda module, args, output, index=index: maps.update({index: output})
        )
    with torch.no_grad():
        model.forward_features(pixels)
    for index, rows in rows_by_layer.items():
        expected = maps[index][:, :, 0, model.num_prefix_tokens :]
        assert rows.shape == (2, 3, 16)
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
        assert expected.amax() > 3 * expected.mean()


def test_no_hook_stays_on_the_saliency_model() -> None:
    model = build_sharp_vit("vit_small_patch16_224")
    for block in model.blocks:
        block.attn.fused_attn = True
    with pytest.raises(AssertionError):
        cls_attention(model, torch.randn(1, 3, 32, 32), {0, 1})
    cls_attention(model, torch.randn(1, 3, 64, 64), {0, 1})
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# --- resampling to the token grid -------------------------------------------------------------------------------------

SIDES = st.integers(1, 20)


@settings(max_examples=60, deadline=None)
@given(grid=st.tuples(SIDES, SIDES), token_grid=st.tuples(SIDES, SIDES), seed=st.integers(0, 99))
def test_resampling_preserves_the_sum(grid: tuple[int, int], token_grid: tuple[int, int], seed: int) -> None:
    attention = torch.rand(2, 3, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    resampled = resample_attention(attention, grid, token_grid)
    assert resampled.shape == (2, 3, token_grid[0] * token_grid[1])
    assert bool((resampled >= 0).all())
    torch.testing.assert_close(resampled.sum(-1), attention.sum(-1))


@settings(max_examples=40, deadline=None)
@given(grid=st.tuples(SIDES, SIDES), token_grid=st.tuples(SIDES, SIDES), position=st.tuples(SIDES, SIDES))
def test_resampling_preserves_the_position_of_a_peak(
    grid: tuple[int, int], token_grid: tuple[int, int], position: tuple[int, int]
) -> None:
    row, col = position[0] % grid[0], position[1] % grid[1]
    attention = torch.zeros(1, 1, *grid)
    attention[..., row, col] = 1
    resampled = resample_attention(attention.flatten(2), grid, token_grid).view(token_grid)
    for axis, (index, source_size, target_size) in enumerate(zip((row, col), grid, token_grid, strict=True)):
        center = float((resampled.sum(1 - axis) * (torch.arange(target_size) + 0.5) / target_size).sum())
        assert abs(center - (index + 0.5) / source_size) <= 0.5 / min(source_size, target_size) + 1e-6


def test_integer_ratios_sum_the_patches_of_a_token() -> None:
    attention = torch.rand(2, 3, 8 * 6)
    blocks = attention.view(2, 3, 4, 2, 3, 2).sum((3, 5)).flatten(2)
    torch.testing.assert_close(resample_attention(attention, (8, 6), (4, 3)), blocks)


# --- runs with a reducer ----------------------------------------------------------------------------------------------

ROWS = ([(112, 112), (60, 170)], [(100, 41)])


def compute_expected_attention(pixels: torch.Tensor, token_grid: tuple[int, int], index: int) -> torch.Tensor:
    """Compute the CLS attention of a layer in the tiles of an image directly with timm."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    colors = (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
    resized = F.interpolate(colors, (160, 160), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    maps: list[torch.Tensor] = []
    model.blocks[index].attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.no_grad():
        model.forward_features((resized - mean) / std)
    return resample_attention(maps[0][:, :, 0, 1:], (10, 10), token_grid)


@torch.no_grad()
def test_hired_runs_on_a_model_without_cls() -> None:
    """HiRED keeps the same tokens if the CLS attention of the saliency model is passed as tower signals."""
    model, inputs = tiny.tiny_model("llava_next", tower="siglip"), tiny.batch("llava_next", *ROWS, tower="siglip")
    with HiRED(0.2, attention=SALIENCY_MODEL)(model) as run:
        model(**inputs)
    images = find_adapter(model).encode(inputs, ()).images
    depth = len(timm.create_model("test_vit").blocks)
    tower = images[0]
    assert (run.attention, depth, tower.layers, tower.feature_layer) == (SALIENCY_MODEL.name, 6, 4, 2)
    for image, pixels, selection in zip(images, inputs["pixel_values"], run.selections, strict=True):
        tiles = pixels[: image.geometry.tiles]
        signals = {
            ("cls_attention", layer): compute_expected_attention(tiles, (4, 4), index)
            for layer, index in ((0, 0), (tower.feature_layer, depth - 1))
        }
        expected = HiRED(0.2).reduce(replace(image, signals=signals))
        assert torch.equal(expected.kept, selection.kept)
    received = HiRED(0.2)(model)
    with received as received_run:
        model(**inputs)
    assert any(
        not torch.equal(selection.kept, received_selection.kept)
        for selection, received_selection in zip(run.selections, received_run.selections, strict=True)
    )


@torch.no_grad()
def test_flops_of_the_saliency_model_are_counted() -> None:
    """The count equals the result of torch's FLOP counter on the saliency model."""
    model, inputs = tiny.tiny_model("llava_next", tower="siglip"), tiny.batch("llava_next", *ROWS, tower="siglip")
    with HiRED(0.2, attention=SALIENCY_MODEL)(model) as run:
        model(**inputs)
    vit = timm.create_model("test_vit").eval()
    for block in vit.blocks:
        block.attn.fused_attn = False
    tiles = sum(selection.geometry.tiles for selection in run.selections)
    with FlopCounterMode(display=False) as counter:
        vit.forward_features(torch.randn(tiles, 3, 160, 160))
    assert run.account.saliency_flops == counter.get_total_flops()
    assert run.account.summary()["saliency_flops"] == counter.get_total_flops()
    assert run.account.attention == "TimmSaliency(test_vit)"
    assert "attention: TimmSaliency(test_vit); saliency model: " in str(run.account)
    with HiRED(0.2)(model) as run_without_saliency_model:
        model(**inputs)
    assert run_without_saliency_model.account.saliency_flops == 0
    assert str(run_without_saliency_model.account).endswith("of full; attention: received_attention")


@torch.no_grad()
def test_layer_choices_refer_to_the_saliency_model() -> None:
    """Every form of a layer choice resolves with the depth of the saliency model, not of the tower."""
    model, inputs = tiny.tiny_model("llava", tower="siglip"), tiny.batch("llava", [(90, 120)], tower="siglip")
    scores = {}
    for layer in ("feature", -2, 5, 1.0, [0, -1]):
        reducer = HiRED(0.3, attention=SALIENCY_MODEL, selection=TopAttentionSelection(layer=layer))
        with reducer(model) as run:
            model(**inputs)
        scores[str(layer)] = run.selections[0].scores
    last, first = (compute_expected_attention(inputs["pixel_values"], (4, 4), index).sum(1) for index in (5, 0))
    for layer in ("feature", "5", "1.0"):
        torch.testing.assert_close(scores[layer], last)
    torch.testing.assert_close(scores["[0, -1]"], (first + last) / 2)
    assert not torch.equal(scores["-2"], scores["feature"])
    with (
        pytest.raises(ValueError, match="6 is no layer of a vision tower with 6 layers"),
        HiRED(0.3, attention=SALIENCY_MODEL, selection=TopAttentionSelection(layer=6))(model),
    ):
        model(**inputs)


@torch.no_grad()
def test_native_resolution_and_one_pool_of_tokens() -> None:
    """Images of native resolution are rebuilt from patches, and the kept tokens do not depend on the batch."""
    example = build_example(Qwen2VLAdapter)
    adapter, model = example.adapter, example.adapter.model
    reducer = HiRED(0.3, attention=SALIENCY_MODEL, allocation=GlobalTopAllocation())
    with reducer(model) as batch_run:
        model(**example.build_inputs([[(60, 170)], [(112, 112)]]))
    for index, size in enumerate([(60, 170), (112, 112)]):
        with reducer(model) as single_run:
            model(**example.build_inputs([[size]]))
        assert torch.equal(single_run.selections[0].kept, batch_run.selections[index].kept)
        assert torch.equal(single_run.selections[0].scores, batch_run.selections[index].scores)
    tiles = adapter.read_tiles(inputs := example.build_inputs([[(60, 170)]]), adapter.layouts(inputs))
    assert [image.shape for image in tiles] == [(1, 3, 56, 168)]
    expected = compute_expected_attention(tiles[0], (2, 6), 5).sum(1)
    torch.testing.assert_close(batch_run.selections[0].scores, expected)
    model, inputs = tiny.tiny_model("llava_next", tower="siglip"), tiny.batch("llava_next", *ROWS, tower="siglip")
    with reducer(model) as run:  # tiles in one pool
        model(**inputs)
    assert run.account.kept == run.account.asked


@torch.no_grad()
def test_the_saliency_model_computes_in_float32() -> None:
    model = tiny.tiny_model("llava_next", dtype=torch.bfloat16, tower="siglip")
    inputs = tiny.batch("llava_next", *ROWS, tower="siglip")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with HiRED(0.2, attention=SALIENCY_MODEL)(model) as run:
        model(**inputs)
    assert run.selections[0].scores is not None
    assert run.selections[0].scores.dtype == torch.float32
    assert run.account.kept == run.account.asked


def test_a_saliency_model_only_replaces_cls_attention() -> None:
    model, inputs = tiny.tiny_model("llava_next", tower="siglip"), tiny.batch("llava_next", *ROWS, tower="siglip")
    with torch.no_grad(), HiRED(0.2, attention=SALIENCY_MODEL, selection=RandomSelection())(model) as run:
        model(**inputs)
    assert run.account.attention is not None  # the allocation reads it
    with pytest.raises(ValueError, match="missing: cls_logits"):
        GlobalCom2(0.2, attention=SALIENCY_MODEL)(model).__enter__()


# --- configuration ----------------------------------------------------------------------------------------------------


def test_a_saliency_model_is_part_of_the_configuration() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reducer", type=TokenReducer)
    reducer = HiRED(0.2, attention=SALIENCY_MODEL)
    text = parser.dump(parser.parse_object({"reducer": as_config(reducer)}))
    assert parser.instantiate(parser.parse_string(text)).reducer == reducer


@pytest.mark.parametrize(
    ("saliency_model", "message"),
    [
        (
            replace(SALIENCY_MODEL, model_name="vit_smal_patch16_224"),
            r"no model 'vit_smal_patch16_224'\. Did you mean vit_small_p",
        ),
        (replace(SALIENCY_MODEL, model_name="resnet18"), "resnet18 is no plain ViT with a CLS token"),
        (replace(SALIENCY_MODEL, model_name="vit_base_patch16_siglip_224"), "no plain ViT with a CLS token"),
        (replace(SALIENCY_MODEL, model_name="cait_xxs24_224"), "no plain ViT with a CLS token"),
        (replace(SALIENCY_MODEL, checkpoint="nowhere.pth"), "weights of test_vit cannot be loaded from nowhere.pth"),
        (replace(SALIENCY_MODEL, image_mean=None, image_std=None), "from ''.*pass image_mean and image_std"),
    ],
)
def test_unsupported_saliency_models_raise(saliency_model: TimmSaliency, message: str) -> None:
    model, inputs = tiny.tiny_model("llava", tower="siglip"), tiny.batch("llava", [(90, 120)], tower="siglip")
    with pytest.raises(ValueError, match=message), HiRED(0.2, attention=saliency_model)(model):
        model(**inputs)


def test_missing_weights_without_a_network_raise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"weights of vit_tiny_patch16_224 cannot be loaded from the hub .*checkpoint; pretrained=Fa"
    ):
        TimmSaliency("vit_tiny_patch16_224").compute_attention(torch.rand(1, 3, 56, 56), (4, 4), ["first"])


def test_weights_are_loaded_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    images = torch.rand(1, 3, 160, 160)
    attention = (
        TimmSaliency("test_vit", checkpoint=str(tmp_path / "weights.pth"))
        .compute_attention(images, (10, 10), ["first"])
        .rows[0]
    )
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    for block in model.blocks:
        block.attn.fused_attn = True
    torch.testing.assert_close(attention, cls_attention(model, (images - mean) / std, {0})[0])
    assert not torch.equal(attention, SALIENCY_MODEL.compute_attention(images, (10, 10), ["first"]).rows[0])


def test_image_mean_requires_image_std() -> None:
    with pytest.raises(ValueError, match="image_mean and image_std belong together"):
        TimmSaliency("test_vit", image_mean=MEAN)
    with pytest.raises(ValueError, match=r"attention='probe' is not known; use one of 'auto', .* or a SaliencyModel"):
        HiRED(0.2, attention="probe")  # type: ignore[arg-type]


# --- experiments ------------------------------------------------------------------------------------------------------


def test_settings_of_a_model_without_cls_share_an_encoding(tmp_path: Path) -> None:
    """Settings with three attention signals encode once, and each environment file names the signal that it read."""
    model_folder = tmp_path / "siglip"
    model, processor = tiny.tiny_model("llava_next", tower="siglip"), tiny.tiny_processor("llava_next", "siglip")
    model.save_pretrained(model_folder)
    processor.save_pretrained(model_folder)
    image_processor = processor.image_processor
    assert list(map(list, LlavaNextAdapter(type(model).from_pretrained(model_folder)).pixel_mean_std())) == [
        list(image_processor.image_mean),
        list(image_processor.image_std),
    ]
    saliency_model = TimmSaliency("test_vit", pretrained=False)
    reducers = {
        "received_attention": HiRED(0.2),
        "pooling_attention": HiRED(0.2, attention="pooling"),
        "TimmSaliency(test_vit)": HiRED(0.2, attention=saliency_model),
    }
    settings_of_grid = [
        Setting(Experiment(str(model_folder), reducer, Boards(number=1), max_new_tokens=1, batch_size=32), name)
        for name, reducer in reducers.items()
    ]
    progress = run_settings(settings_of_grid, tmp_path / "out")
    assert (progress.errors, progress.encodes) == (0, 1)
    for setting in settings_of_grid:
        folder = setting.folder(tmp_path / "out")
        assert json.loads((folder / "environment.json").read_text())["attention"] == setting.name
        rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        assert rows
        assert all(row["error"] is None and row["kept"] == row["asked"] > 0 for row in rows)
    cls_experiment = replace(settings_of_grid[0].experiment, reducer=HiRED(0.2, attention="cls"))
    with pytest.raises(ValueError, match="gives no cls_attention"):
        run_settings([Setting(cls_experiment, "cls_attention")], tmp_path / "other")


def test_captured_signals_of_a_tower_without_cls() -> None:
    """A saliency model requires no signal of the tower; without it the tower captures received attention."""
    adapter = find_adapter(tiny.tiny_model("llava", tower="siglip"))
    assert Pipeline(HiRED(0.2, attention=SALIENCY_MODEL), adapter).needs == []
    layers = ("first", "feature")
    assert Pipeline(HiRED(0.2), adapter).needs == [Signal("received_attention", layer) for layer in layers]
