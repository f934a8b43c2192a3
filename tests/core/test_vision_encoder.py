"""`VisionEncoder`: the vision side of a checkpoint without its LLM gives the tokens that the LLM would receive."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenprune import Composed, EncodedImage, Selection, TokenReducer, VisionEncoder
from tokenprune.adapter import adapters
from tokenprune.models import mini
from tokenprune.strategies import CDPruner, DivPrune, FastV, HiRED, ImageDownsample, VisionZip
from tokenprune.testing.families import FAMILIES
from tokenprune.testing.tiny_models import random_image
from tokenprune.vision_weights import load_vision_side

SERVED = ("llava", "llava_next", "llava_next (Granite Vision 3)", "llava_onevision", "internvl")
IMAGES = [random_image(*size, seed) for seed, size in enumerate([(112, 112), (60, 160), (150, 50)])]
QUESTIONS = ("what is in the image?", "where is it?", "describe the image")
REDUCERS = [HiRED(0.3), VisionZip(0.4, newlines="drop"), DivPrune(0.5), HiRED(1.0)]
REPRESENTATIVE = [(name, HiRED(0.3)) for name in SERVED] + [("llava_next", reducer) for reducer in REDUCERS[1::2]]


def name_reducer(value: object) -> str | None:
    """Return the test id of a strategy."""
    return f"{value.label}-{value.budget}-{value.newlines}" if isinstance(value, TokenReducer) else None


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves the tiny model of a family once, and returns its folder."""

    @cache
    def save_family(name: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        FAMILIES[name].model().save_pretrained(folder)
        FAMILIES[name].processor().save_pretrained(folder)
        return folder

    return save_family


def embed_prompts(model: Any, processor: Any, reducer: TokenReducer) -> list[Tensor]:
    """Return the prompts that the LLM of the complete model receives, `[length, dim]` each."""
    received: list[Tensor] = []
    texts = [f"USER: {processor.image_token}\n{question} ASSISTANT:" for question in QUESTIONS]
    inputs = processor(images=[[image] for image in IMAGES], text=texts, return_tensors="pt", padding=True)
    llm = model.base_model.language_model
    llm.register_forward_pre_hook(lambda _, args, kwargs: received.append(kwargs["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad(), reducer(model, tokenizer=processor.tokenizer):
        model(**inputs)
    return list(received[0])


def count_occurrences(tokens: Tensor, prompt: Tensor) -> int:
    """Return at how many positions of a prompt a sequence of tokens stands, bit for bit."""
    return sum(torch.equal(window.T, tokens) for window in prompt.unfold(0, len(tokens), 1))


def check_equal_tokens(name: str, reducer: TokenReducer, save: Callable[[str], Path]) -> None:
    """Compare the tokens of an encoder with the prompts of the complete model."""
    encoder = VisionEncoder.from_pretrained(str(save(name)), reducer)
    encoded = encoder.encode(IMAGES, QUESTIONS)
    prompts = embed_prompts(FAMILIES[name].model(), FAMILIES[name].processor(), reducer)
    assert [count_occurrences(*pair) for pair in zip(encoded.tensors, prompts, strict=True)] == [1, 1, 1]
    for tensor, selection, account in zip(encoded.tensors, encoded.selections, encoded.accounts, strict=True):
        assert len(tensor) == account.kept + account.newlines == selection.kept_tokens + selection.kept_newlines
        assert tensor.shape[1] == encoder.hidden_size
    assert encoder.run.account.kept == sum(account.kept for account in encoded.accounts)


@pytest.mark.parametrize(("name", "reducer"), REPRESENTATIVE, ids=name_reducer)
def test_tokens_equal_those_in_the_prompt_of_the_complete_model(
    name: str, reducer: TokenReducer, save: Callable[[str], Path]
) -> None:
    check_equal_tokens(name, reducer, save)


@dataclass
class KeepAll(TokenReducer):
    """Keeps all tokens at every budget."""

    def select(self, image: EncodedImage) -> Selection:
        """Return the selection of all tokens."""
        return Selection.all_tokens(image.geometry)


@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_all_tokens_of_a_strategy_that_could_drop_some(name: str, save: Callable[[str], Path]) -> None:
    """The complete model then encodes the images itself."""
    check_equal_tokens(name, KeepAll(budget=0.5), save)


@pytest.mark.slow
@pytest.mark.parametrize("reducer", REDUCERS, ids=name_reducer)
@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_equal_in_every_family(name: str, reducer: TokenReducer, save: Callable[[str], Path]) -> None:
    check_equal_tokens(name, reducer, save)


@pytest.mark.parametrize("reducer", [CDPruner(0.3, text_model="mini"), ImageDownsample(0.25)], ids=name_reducer)
def test_strategies_that_read_the_question_or_resize(reducer: TokenReducer) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    encoded = VisionEncoder.from_pretrained(str(mini.path()), reducer).encode(IMAGES, QUESTIONS)
    model = AutoModelForImageTextToText.from_pretrained(mini.path()).eval()
    prompts = embed_prompts(model, AutoProcessor.from_pretrained(mini.path()), reducer)
    assert [count_occurrences(*pair) for pair in zip(encoded.tensors, prompts, strict=True)] == [1, 1, 1]


@pytest.mark.parametrize("name", SERVED)
def test_only_the_vision_side_has_memory(name: str, save: Callable[[str], Path]) -> None:
    model = load_vision_side(str(save(name)), "cpu").model
    expected = FAMILIES[name].model().state_dict()
    loaded = {key: tensor for key, tensor in model.state_dict().items() if not tensor.is_meta}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())
    is_llm = {key: ".language_model." in key or key.startswith("lm_head.") for key in expected}
    assert loaded.keys() == {key for key in expected if not is_llm[key]}


MODULE_NAMES = {"language_model.lm_head": "lm_head", "language_model.model": "model.language_model"}


def rename_as_modules(key: str) -> str:
    """Return the name in the model for a saved name."""
    for saved, name in MODULE_NAMES.items():
        key = re.sub(f"^{re.escape(saved)}", name, key)
    return key if key.startswith(("lm_head", "model.")) else f"model.{key}"


NAMES: dict[str, Callable[[str], str]] = {
    "of the modules": rename_as_modules,
    "before transformers 5": lambda key: key.replace("vision_tower.", "vision_tower.vision_model."),
}


def rewrite_names(folder: Path, source: Path, rename: Callable[[str], str], shards: int) -> None:
    """Write a checkpoint with other names, in one file or in shards with an index."""
    for file in source.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    tensors = {rename(key): tensor for key, tensor in load_file(source / "model.safetensors").items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    files = {key: f"model-{number % shards}.safetensors" for number, key in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in files if files[key] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("names", NAMES)
def test_names_of_other_versions_and_shards(
    names: str, shards: int, tmp_path: Path, save: Callable[[str], Path]
) -> None:
    rewrite_names(tmp_path, save("llava_next"), NAMES[names], shards)
    model, expected = load_vision_side(str(tmp_path), "cpu").model, FAMILIES["llava_next"].model()
    loaded = {key: tensor for key, tensor in model.state_dict().items() if not tensor.is_meta}
    assert loaded.keys() == {
        key for key in expected.state_dict() if not key.startswith(("model.language_model.", "lm_head."))
    }
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in loaded.items())
    assert torch.equal(model.model.vision_tower.embeddings.position_ids, torch.arange(17)[None])


def test_shards_of_the_llm_are_not_opened(tmp_path: Path, save: Callable[[str], Path]) -> None:
    rewrite_names(tmp_path, save("llava_next"), rename_as_modules, 1)
    tensors = load_file(tmp_path / "model.safetensors")
    files = {
        key: "llm.safetensors" if "language_model" in key or "lm_head" in key else "vision.safetensors"
        for key in tensors
    }
    vision = {key: tensor for key, tensor in tensors.items() if files[key] == "vision.safetensors"}
    save_file(vision, tmp_path / "vision.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert len(VisionEncoder.from_pretrained(str(tmp_path), HiRED(0.3)).encode(IMAGES).tensors) == len(IMAGES)


def test_dtype(save: Callable[[str], Path]) -> None:
    encoder = VisionEncoder.from_pretrained(str(save("llava_next")), HiRED(0.3), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in encoder.encode(IMAGES).tensors} == {torch.bfloat16}


def test_wrong_input_raises_one_sentence(save: Callable[[str], Path]) -> None:
    encoder = VisionEncoder.from_pretrained(str(mini.path()), CDPruner(0.3, text_model="mini"))
    with pytest.raises(ValueError, match="no image to encode; give at least one"):
        encoder.encode([])
    with pytest.raises(ValueError, match="2 questions were given for 3 images; give one per image"):
        encoder.encode(IMAGES, QUESTIONS[:2])
    with pytest.raises(ValueError, match="CDPruner reads the question; give one question per image"):
        encoder.encode(IMAGES)
    with pytest.raises(ValueError, match="contains the image placeholder <image>; remove it"):
        encoder.encode(IMAGES, "what is <image>?")


@pytest.mark.parametrize(
    "reducer", [FastV(0.5, layer=2), Composed([HiRED(0.4), FastV(0.5, layer=1)])], ids=name_reducer
)
def test_strategies_inside_the_llm_are_refused(reducer: TokenReducer) -> None:
    with pytest.raises(ValueError, match="FastV drops tokens inside the LLM, which the server runs"):
        VisionEncoder.from_pretrained(str(mini.path()), reducer)


def test_images_without_a_token_are_refused(save: Callable[[str], Path]) -> None:
    encoder = VisionEncoder.from_pretrained(str(save("llava")), HiRED(0))
    with pytest.raises(ValueError, match="HiRED keeps no token of image 0, but a server requires at least one"):
        encoder.encode(IMAGES)


def test_families_that_servers_do_not_accept_are_refused(tmp_path: Path) -> None:
    served = {kind.family for kind in adapters().values() if kind.supports_image_embeds}
    assert served == {"internvl", "llava", "llava_next", "llava_onevision"}
    FAMILIES["qwen2_vl"].model().save_pretrained(tmp_path)
    message = (
        "does not accept the visual tokens of qwen2_vl in place of an image; supported families: internvl, llava, "
    )
    with pytest.raises(TypeError, match=message):
        VisionEncoder.from_pretrained(str(tmp_path), HiRED(0.3))


def test_broken_checkpoints_are_refused(tmp_path: Path, save: Callable[[str], Path]) -> None:
    def load() -> None:
        load_vision_side(str(tmp_path), "cpu")

    with pytest.raises(ValueError, match="cannot be loaded as an image-text-to-text checkpoint"):
        load()
    rewrite_names(tmp_path, save("llava_next"), rename_as_modules, 1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.multi_modal_projector.linear_2.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors of its vision side .* model.multi_modal_projector.linear_2.bias"):
        load()
    tensors["model.multi_modal_projector.linear_2.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors of its vision side .* model.multi_modal_projector.linear_2.bias"):
        load()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load()
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(ValueError, match=r"is quantized, .* name the original checkpoint"):
        load()
