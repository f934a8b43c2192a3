"""Test vision inputs and prompts: embeddings, adjacent images, missing inputs and inputs of a wrong shape."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.models._base.tiled import TiledAdapter, recover_ids
from tokenprune.models.qwen2_5_vl import Qwen25VLAdapter
from tokenprune.strategies import HiRED
from tokenprune.testing.examples import find_example
from tokenprune.testing.examples.configs import MROPE_IDS, build_mrope_config
from tokenprune.testing.families.base import Family
from tokenprune.testing.families.mllama import FAMILY as MLLAMA
from tokenprune.testing.tiny_models import random_image

ALL_FAMILIES = {**FAMILIES, MLLAMA.name: MLLAMA}
TILED_FAMILIES = [name for name, family in FAMILIES.items() if issubclass(family.adapter, TiledAdapter)]
RUNNABLE_TILED = [name for name in TILED_FAMILIES if FAMILIES[name].adapter.supports_transformers()]
RUNNABLE = [name for name, family in FAMILIES.items() if family.adapter.supports_transformers()]
REQUIRED_INPUTS = [
    (name, required) for name, family in ALL_FAMILIES.items() for required in family.adapter.required_inputs
]


@cache
def build_model(name: str) -> Any:
    return ALL_FAMILIES[name].model()


def kept_masks(run: Any) -> list[Tensor]:
    return [selection.kept.cpu() for selection in run.selections]


def assert_same_layouts(layouts: list[Any], expected: list[Any]) -> None:
    assert len(layouts) == len(expected)
    for layout, reference in zip(layouts, expected, strict=True):
        assert tuple(layout.tile_grid) == tuple(reference.tile_grid)
        assert tuple(layout.token_grid) == tuple(reference.token_grid)
        assert torch.equal(layout.packed, reference.packed)
        assert torch.equal(layout.regions, reference.regions)


# --- embeddings in place of ids ---------------------------------------------------------------------------------------


def replace_ids_by_embeddings(model: Any, inputs: Any) -> dict[str, Any]:
    """Return the inputs with `inputs_embeds` in place of `input_ids`."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return {**{name: value for name, value in inputs.items() if name != "input_ids"}, "inputs_embeds": embeds}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_embeddings_have_the_layouts_of_their_ids(name: str) -> None:
    family, model = FAMILIES[name], build_model(name)
    adapter, inputs = find_adapter(model), family.batch(*family.rows)
    assert_same_layouts(adapter.layouts(replace_ids_by_embeddings(model, inputs)), adapter.layouts(inputs))


@pytest.mark.parametrize("name", RUNNABLE)
@torch.no_grad()
def test_embeddings_keep_the_tokens_of_their_ids(name: str) -> None:
    """The kept tokens are equal; the logits of Phi-4-multimodal differ, because it encodes no image without ids."""
    family, model = FAMILIES[name], build_model(name)
    inputs = family.batch(*family.rows[:2])
    embedded = replace_ids_by_embeddings(model, inputs)
    with HiRED(0.3)(model) as run:
        expected = model(**inputs).logits
    with HiRED(0.3)(model) as embedded_run:
        logits = model(**embedded).logits
    assert name == "phi4_multimodal" or torch.equal(logits, expected)
    assert all(map(torch.equal, kept_masks(embedded_run), kept_masks(run)))
    if name == "llama4":  # the unmodified model rejects pixels together with embeddings
        return
    plain = model(**embedded).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**embedded).logits, plain)


@torch.no_grad()
def test_soft_prompts_have_no_id_and_change_no_layout() -> None:
    family, model = FAMILIES["idefics3"], build_model("idefics3")
    adapter, inputs = find_adapter(model), family.batch([family.sizes[1]])
    embedded = replace_ids_by_embeddings(model, inputs)
    soft = torch.randn(1, 3, embedded["inputs_embeds"].shape[-1], generator=torch.Generator().manual_seed(0))
    extended = {**embedded, "inputs_embeds": torch.cat([soft, embedded["inputs_embeds"]], dim=1)}
    assert adapter.prompt_ids(extended)[0].tolist() == [-1] * 3 + inputs["input_ids"][0].tolist()  # type: ignore[attr-defined]
    assert_same_layouts(adapter.layouts(extended), adapter.layouts(inputs))


@torch.no_grad()
def test_ids_and_embeddings_together() -> None:
    """`generate` accepts ids and embeddings in one call."""
    family, model = FAMILIES["internvl"], build_model("internvl")
    inputs = family.batch([family.sizes[0]])
    options = {"max_new_tokens": 2, "suppress_tokens": [find_adapter(model).image_token_id]}
    with HiRED(0.3)(model) as run_with_both:
        model.generate(**inputs, inputs_embeds=replace_ids_by_embeddings(model, inputs)["inputs_embeds"], **options)
    with HiRED(0.3)(model) as run_with_ids:
        model.generate(**inputs, **options)
    assert all(map(torch.equal, kept_masks(run_with_both), kept_masks(run_with_ids)))


def test_ids_are_recovered_from_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are recovered across chunks, for equal rows, negative zeros and rows that differ only in unhashed columns."""
    monkeypatch.setattr("tokenprune.models._base.tiled.VOCABULARY_CHUNK", 7)
    embedding = nn.Embedding(50, 300)
    with torch.no_grad():
        embedding.weight[9] = embedding.weight[4]
        embedding.weight[20:23] = embedding.weight[20]
        embedding.weight[20:23, 1] = torch.tensor([1.0, 2.0, 3.0])
        embedding.weight[30] = 0.0
    ids = torch.tensor([49, 4, 9, 22, 21, 20, 30, 0])
    vectors = torch.cat([embedding(ids), -embedding(torch.tensor([30])), torch.full((1, 300), torch.nan)])
    assert recover_ids(vectors, embedding).tolist() == [49, 4, 4, 22, 21, 20, 30, 0, 30, -1]
    assert recover_ids(vectors[:0], embedding).tolist() == []


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    ],
    ids=["LoRA", "copy", "trainable tokens"],
)
@torch.no_grad()
def test_embeddings_of_a_wrapped_embedding_module(options: dict[str, Any]) -> None:
    """Ids are recovered if peft replaces the module that embeds ids."""
    peft = pytest.importorskip("peft")
    family = FAMILIES["internvl"]
    model = peft.get_peft_model(family.model(), peft.LoraConfig(r=2, **options)).eval()
    inputs = family.batch([family.sizes[0]])
    embedded = replace_ids_by_embeddings(model, inputs)
    adapter = find_adapter(model.get_base_model())
    assert adapter.prompt_ids(embedded).equal(inputs["input_ids"])  # type: ignore[attr-defined]
    plain = model(**embedded).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**embedded).logits, plain)
    with HiRED(0.3)(model) as run:
        model(**inputs)
    with HiRED(0.3)(model) as embedded_run:
        model(**embedded)
    assert all(map(torch.equal, kept_masks(embedded_run), kept_masks(run)))


def test_a_call_without_prompt_is_refused() -> None:
    family, model = FAMILIES["internvl"], build_model("internvl")
    inputs = {"pixel_values": family.batch([family.sizes[0]])["pixel_values"]}
    with pytest.raises(ValueError, match="pass input_ids"):
        find_adapter(model).layouts(inputs)


# --- adjacent images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_images_without_text_between_them(name: str) -> None:
    """Each image has the layout of a single-image prompt; LLaVA-OneVision does not tile several images."""
    family, model = FAMILIES[name], build_model(name)
    adapter = find_adapter(model)
    images = [random_image(*size, seed=seed) for seed, size in enumerate(family.sizes[:3])]
    inputs = family.inputs([images], ["USER: " + family.image * 3 + "describe the image ASSISTANT:"])
    layouts = adapter.layouts(inputs)
    if name == "llava_onevision":
        assert [layout.tiles for layout in layouts] == [1, 1, 1]
    else:
        single_inputs = [family.inputs([[image]], [family.text(1)]) for image in images]
        assert_same_layouts(layouts, [layout for single in single_inputs for layout in adapter.layouts(single)])
    if adapter.supports_transformers():
        check_full_and_reduced_run(model, inputs)


def check_full_and_reduced_run(model: Any, inputs: Any) -> None:
    """Check that a budget of 100 % changes no logits and that a budget of 30 % drops tokens."""
    plain = model(**inputs).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**inputs).logits, plain)
    with HiRED(0.3)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    assert short.shape[1] < plain.shape[1]
    assert bool(short.isfinite().all())
    assert run.account.kept > 0


def build_free_prompt(adapter: Any, inputs: Any, kind: str) -> dict[str, Any]:
    """Return inputs with the same images in a prompt that no processor writes."""
    token = adapter.image_token_id
    count, tile = int((inputs["input_ids"] == token).sum()), adapter.token_grid[0] * adapter.token_grid[1]
    text_ids = range(40, 47)
    prompts = {
        "nothing after": [1, 40, *[token] * count],
        "nothing before": [*[token] * count, 40, 41],
        "text inside a tile": [1, *[token] * (count - 1), 40, token, 41, 42],
        "text after each tile": [
            1,
            *(
                token_id
                for index in range(count)
                for token_id in ([token, text_ids[index // tile % 7]] if index % tile == tile - 1 else [token])
            ),
            47,
        ],
    }
    ids = torch.tensor([prompts[kind]])
    types = {name: (ids == token).to(value.dtype) for name, value in inputs.items() if name.endswith("token_type_ids")}
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), **types}


@pytest.mark.parametrize("kind", ["nothing after", "nothing before", "text inside a tile", "text after each tile"])
@pytest.mark.parametrize("name", RUNNABLE_TILED)
@torch.no_grad()
def test_prompts_that_no_processor_writes(name: str, kind: str) -> None:
    """The unmodified model accepts these prompts, because it only counts placeholders."""
    family, model = FAMILIES[name], build_model(name)
    inputs = family.batch([family.sizes[0], family.sizes[0]])
    check_full_and_reduced_run(model, build_free_prompt(find_adapter(model), inputs, kind))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@torch.no_grad()
def test_idefics3_images_that_are_not_split(name: str) -> None:
    """An image is one tile, also without surrounding text and with one marker token instead of two between images."""
    family, model = FAMILIES[name], build_model(name)
    adapter, token = find_adapter(model), find_adapter(model).image_token_id
    inputs = dict(family.batch([family.sizes[0]]))
    inputs["pixel_values"] = inputs["pixel_values"][:, :3]
    inputs.pop("pixel_attention_mask")
    tile = [token] * 4
    for ids in ([1, *tile * 3, 5, 6], [1, *tile, *tile, 7, *tile], [1, 8, 9, *tile, 8, 9, *tile, 8, 9, *tile, 8, 5]):
        prompt = {**inputs, "input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        assert [layout.tiles for layout in adapter.layouts(prompt)] == [1, 1, 1]
        check_full_and_reduced_run(model, prompt)


@torch.no_grad()
def test_smolvlm_encodes_an_image_of_zeros() -> None:
    model, token = build_model("smolvlm"), find_adapter(build_model("smolvlm")).image_token_id
    ids = torch.tensor([[1, *[token] * 4, 5, 6]])
    check_full_and_reduced_run(model, {"input_ids": ids, "pixel_values": torch.zeros(1, 1, 3, 56, 56)})


@pytest.mark.parametrize("name", TILED_FAMILIES)
def test_placeholders_that_do_not_fit_are_refused(name: str) -> None:
    """The adapter raises; for Idefics2 and PerceptionLM, whose layouts read only the pixels, the pipeline raises."""
    family, model = FAMILIES[name], build_model(name)
    adapter, inputs = find_adapter(model), dict(family.batch([family.sizes[0]]))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((1, 1), adapter.image_token_id)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    message = r"Image features and image tokens do not match.*the processor that belongs to the model"
    if adapter.family not in ("idefics2", "perception_lm"):
        with pytest.raises(ValueError, match=message):
            adapter.layouts(inputs)
    if adapter.supports_transformers():
        with pytest.raises(ValueError, match=message), HiRED(0.3)(model), torch.no_grad():
            model(**inputs)


# --- vision inputs ----------------------------------------------------------------------------------------------------


def test_families_that_require_more_than_pixels() -> None:
    expected = {
        "image_sizes": {"llava_next", "llava_next_video", "llava_onevision", "granite4_vision", "phi4_multimodal"},
        "image_grid_thw": {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"},
        "spatial_shapes": {"lfm2_vl"},
        "image_attention_mask": {"phi4_multimodal"},
        "aspect_ratio_ids": {"mllama"},
        "aspect_ratio_mask": {"mllama"},
    }
    families: dict[str, set[str]] = {}
    for name, required in REQUIRED_INPUTS:
        families.setdefault(required, set()).add(ALL_FAMILIES[name].adapter.family)
    assert families == expected


def batch_of_one_image(family: Family) -> dict[str, Any]:
    return dict(family.batch([(112, 112)] if family is MLLAMA else [family.sizes[0]]))


@pytest.mark.parametrize(("name", "missing"), [*REQUIRED_INPUTS, ("mistral3", "image_sizes")])
@torch.no_grad()
def test_a_missing_input_is_named(name: str, missing: str) -> None:
    """The error names the model and its processor before the model runs; calls without images require no input."""
    family, model = ALL_FAMILIES[name], build_model(name)
    adapter, inputs = find_adapter(model), batch_of_one_image(family)
    adapter.check_inputs(inputs)
    adapter.check_inputs({"input_ids": inputs["input_ids"]})
    message = (
        rf"^{type(model).__name__} needs {missing} besides {adapter.pixels}; make the inputs with the processor that "
        r"belongs to the model \(\w+Processor\)$"
    )
    for incomplete in ({**inputs, missing: None}, {key: value for key, value in inputs.items() if key != missing}):
        for method in (adapter.check_inputs, adapter.layouts):
            with pytest.raises(ValueError, match=message):
                method(incomplete)
        with pytest.raises(ValueError, match=message), HiRED(0.3)(model):
            model(**incomplete)


@pytest.mark.parametrize(
    ("name", "optional"),
    [
        ("idefics2", "pixel_attention_mask"),
        ("idefics3", "pixel_attention_mask"),
        ("smolvlm", "pixel_attention_mask"),
        ("lfm2_vl", "pixel_attention_mask"),
        ("pixtral", "image_sizes"),
        ("llava_onevision", "batch_num_images"),
        ("mllama", "cross_attention_mask"),
    ],
)
@torch.no_grad()
def test_an_input_that_the_model_does_not_need(name: str, optional: str) -> None:
    model = build_model(name)
    inputs = batch_of_one_image(ALL_FAMILIES[name])
    del inputs[optional]
    plain = model(**inputs).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**inputs).logits, plain)
    with HiRED(0.3)(model) as run:
        model(**inputs)
    assert 0 < run.account.kept < int(sum(selection.geometry.valid.sum() for selection in run.selections))


@pytest.mark.parametrize(
    ("name", "required"), [*REQUIRED_INPUTS, ("pixtral", "image_sizes"), ("mistral3", "image_sizes")]
)
@torch.no_grad()
def test_a_misshapen_input_is_refused(name: str, required: str) -> None:
    family, model = ALL_FAMILIES[name], build_model(name)
    adapter, inputs = find_adapter(model), batch_of_one_image(family)
    value = inputs[required]
    misshapen_values = [value[..., :-1], torch.cat([value, value]), value.flatten()]
    message = rf"{required}.*make the inputs with the processor that belongs to the model"
    for misshapen in misshapen_values:
        with pytest.raises(ValueError, match=message):
            adapter.layouts({**inputs, required: misshapen})


ACCEPTS_LISTS = {"llava_next", "llava_next_video", "llava_onevision", "granite4_vision", "pixtral", "mistral3"}


@pytest.mark.parametrize("name", sorted({name for name, _ in REQUIRED_INPUTS} | ACCEPTS_LISTS))
@torch.no_grad()
def test_lists_in_place_of_tensors(name: str) -> None:
    """A list is read if the unmodified model accepts it; otherwise it raises an error that names the expected shape."""
    family, model = ALL_FAMILIES[name], build_model(name)
    adapter, inputs = find_adapter(model), batch_of_one_image(family)
    required = [
        *(key for family_name, key in REQUIRED_INPUTS if family_name == name),
        *(["image_sizes"] if name in ACCEPTS_LISTS else []),
    ]
    for key in dict.fromkeys(required):
        listed = {**inputs, key: inputs[key].tolist()}
        if adapter.family in ACCEPTS_LISTS:
            assert_same_layouts(adapter.layouts(listed), adapter.layouts(inputs))
            assert_same_layouts(adapter.layouts({**inputs, key: list(inputs[key])}), adapter.layouts(inputs))
            with pytest.raises(ValueError, match=f"needs {key} as a tensor"):
                adapter.layouts({**inputs, key: ["large"]})
        else:
            with pytest.raises(ValueError, match=rf"needs {key} as a tensor of shape \[.*\], but it is a list"):
                adapter.layouts(listed)


def test_sizes_that_do_not_fit_the_pixels() -> None:
    family, model = FAMILIES["mistral3"], build_model("mistral3")
    adapter, inputs = find_adapter(model), family.batch([(56, 56)])
    with pytest.raises(ValueError, match="exceed the 56 x 56 pixels of pixel_values"):
        adapter.layouts({**inputs, "image_sizes": torch.tensor([[112, 56]])})
    inputs = batch_of_one_image(FAMILIES["qwen2_vl"])
    with pytest.raises(ValueError, match=r"names 192 patches, but pixel_values of Qwen2VL\w+ holds 64"):
        find_adapter(build_model("qwen2_vl")).layouts({**inputs, "image_grid_thw": torch.tensor([[1, 8, 24]])})
    inputs = batch_of_one_image(MLLAMA)
    with pytest.raises(ValueError, match="exceed the 8 known aspect ratios"):
        find_adapter(build_model("mllama")).layouts({**inputs, "aspect_ratio_ids": torch.tensor([[99]])})


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "full_layers", "source_layers"),
    [(2, [7, 15, 23, 31], [0, 1]), (12, [7, 15, 23, 31], [7] * 12), (4, [], [0, 1, 2, 3]), (3, [1, 5], [1, 1, 1])],
)
@torch.no_grad()
def test_full_attention_layers_beyond_the_tower(depth: int, full_layers: list[int], source_layers: list[int]) -> None:
    vision = {"depth": depth, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": full_layers},
        text_config=build_mrope_config(),
        **MROPE_IDS,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    adapter = Qwen25VLAdapter(model)
    inputs = find_example(Qwen25VLAdapter)(adapter).build_inputs([[(112, 112)]])
    assert adapter.tower_parts(adapter.layouts(inputs)).rows_from == dict(enumerate(source_layers))
    check_full_and_reduced_run(model, inputs)
