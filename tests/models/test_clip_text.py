"""Questions: extraction from the prompt, the `question` argument, and embedding by the text tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

from research.mini_training.evaluate import build_inputs
from tokenprune.adapter import find_adapter
from tokenprune.image import EncodedImage, Signal
from tokenprune.models import mini
from tokenprune.models._base.clip_text import TextTowerWarning, load_text_tower
from tokenprune.models._base.question import extract_question
from tokenprune.models.mini.boards import boards
from tokenprune.reducer import ScoreReducer
from tokenprune.strategies import EADP, HERO, TRIM, CDPruner
from tokenprune.strategies.cdpruner import ConditionalDiversitySelection
from tokenprune.strategies.components import TextRelevance, TopRelevanceSelection
from tokenprune.strategies.eadp import DenseTextRelevance, FacilityLocationSelection
from tokenprune.testing.examples.text_model import build_text_model
from tokenprune.testing.tiny_models import batch, tiny_model, tiny_processor


@dataclass
class QuestionScore(ScoreReducer):
    """Sets the score of every token to the sum of the question embedding."""

    @property
    def needs(self) -> list[Signal]:
        return [Signal("question")]

    def score(self, image: EncodedImage) -> Tensor:
        return image.question().sum().expand(image.features.shape[:2])


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("<s> USER: <image>\nWhat number is it? ASSISTANT:", "What number is it?"),
        ("<s>[INST] <image>\nWhat is this? [/INST]", "What is this?"),
        (
            "<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\n<image>\nWhere?<|im_end|><|im_start|>assistant\n",
            "Where?",
        ),
        (
            "<|start_header_id|>user<|end_header_id|>\n\n<image>Who?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Who?",
        ),
        ("USER: <image>\nOne? ASSISTANT: Yes. USER: And\nthe other? ASSISTANT:", "And the other?"),
        ("a long <image> caption", "a long caption"),
        ("USER: <image> ASSISTANT:", ""),
    ],
)
def test_the_question_is_the_last_user_message(prompt: str, question: str) -> None:
    special = ["<s>", "</s>", "<image>", "<|im_end|>", "<|eot_id|>", "<|im_start|>"]
    assert extract_question(prompt, special) == question


def test_questions_are_read_from_the_rows_of_a_batch() -> None:
    model = AutoModelForImageTextToText.from_pretrained(mini.path())
    processor = AutoProcessor.from_pretrained(mini.path())
    (board,) = boards(1, "heldout", 1000)
    questions = [question.text for question in board.questions[:3]]
    inputs = build_inputs(processor, board.image, questions)
    texts = find_adapter(model).read_questions(inputs["input_ids"], inputs["attention_mask"])
    assert [text.replace(" ", "") for text in texts] == [text.lower().replace(" ", "") for text in questions]


def question_scores(family: str, question: Any = None, tokenizer: Any = None) -> list[float]:
    """Return the score of each image under a strategy whose scores depend on the question only."""
    model = tiny_model(family)
    reducer = QuestionScore(text_model=build_text_model(32))
    inputs = batch(family, [(112, 112)], [(60, 160), (150, 50)])
    with torch.no_grad(), reducer(model, question=question, tokenizer=tokenizer) as run:
        model(**inputs)
    return [float(selection.scores.max()) for selection in run.selections]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_each_image_has_the_question_of_its_row(family: str) -> None:
    tower = load_text_tower(build_text_model(32))
    first, second = "what is the image", "in the image"
    values = [float(tower.embed(text, torch.device("cpu"))["question"].sum()) for text in (first, second)]
    assert values[0] != values[1]
    assert question_scores(family, question=[first, second]) == pytest.approx([values[0], values[1], values[1]])
    assert question_scores(family, question=first) == pytest.approx([values[0]] * 3)
    prompts = question_scores(family, tokenizer=tiny_processor(family).tokenizer)
    assert prompts[1] == prompts[2]


def test_errors_name_the_missing_input() -> None:
    with pytest.raises(ValueError, match=r"tokenizer=processor.tokenizer"):
        question_scores("llava_next")
    with pytest.raises(ValueError, match="3 questions were given for a batch of 2 prompts"):
        question_scores("llava_next", question=["a", "b", "c"])
    with pytest.raises(ValueError, match="prompt row 1 holds no question"):
        question_scores("llava_next", question=["what", " "])
    model = tiny_model("llava_next")
    inputs = dict(batch("llava_next", [(112, 112)]))
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    reducer = QuestionScore(text_model=build_text_model(32))
    with pytest.raises(ValueError, match="inputs_embeds hold no text"), torch.no_grad(), reducer(model):
        model(**inputs)


@pytest.mark.parametrize("kind", [TRIM, CDPruner, EADP, HERO])
def test_a_text_tower_of_another_width_raises(kind: Any) -> None:
    model = tiny_model("llava_next")
    reducer = kind(text_model=build_text_model(48))
    with pytest.raises(ValueError, match=r"belongs to a vision tower of width 48.*has width 32"), reducer(model):  # noqa: SIM117
        with torch.no_grad():
            model(**batch("llava_next", [(112, 112)]))
    missing, inputs = kind(text_model="/nowhere"), batch("llava_next", [(112, 112)])
    with pytest.raises(ValueError, match="could not be loaded as a CLIP model"), torch.no_grad(), missing(model):
        model(**inputs)


def test_a_text_tower_of_another_vision_tower_warns(recwarn: pytest.WarningsRecorder) -> None:
    model = AutoModelForImageTextToText.from_pretrained(mini.path("mini-pages"))
    processor = AutoProcessor.from_pretrained(mini.path("mini-pages"))
    (board,) = boards(1, "heldout", 1000)
    inputs = build_inputs(processor, board.image, [board.questions[0].text])
    with torch.no_grad(), TRIM(text_model="mini-pages")(model):
        model(**inputs)
    assert not [warning for warning in recwarn if warning.category is TextTowerWarning]
    message = r"'mini' belongs to another vision tower \(cosine .* 0.97\)"
    with pytest.warns(TextTowerWarning, match=message), torch.no_grad(), TRIM(text_model="mini")(model):
        model(**inputs)


def test_a_tower_without_values_is_not_compared(recwarn: pytest.WarningsRecorder) -> None:
    """Offloaded weights are on the meta device between two calls."""
    tower = load_text_tower("mini")
    channels, _, side, _ = tower.patch_embedding.shape
    patches = torch.nn.Conv2d(3, channels, side, side, bias=False)
    with pytest.warns(TextTowerWarning):
        tower.warn_of_another_tower(patches)
    recwarn.clear()
    tower.warn_of_another_tower(patches.to("meta"))
    tower.warn_of_another_tower(torch.nn.Conv2d(3, channels, 2 * side, 2 * side))
    assert not recwarn


def test_siglip_towers_provide_no_text_signals() -> None:
    with pytest.raises(ValueError, match="missing: aligned_features, question"):
        CDPruner(text_model="mini")(tiny_model("llava_next", tower="siglip")).__enter__()


def test_signals_equal_those_of_the_clip_model() -> None:
    """The shared space is the space of CLIP: pooled text, and patches after its final norm and projection."""
    folder = build_text_model(32)
    clip, tower = CLIPModel.from_pretrained(folder), load_text_tower(folder)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])  # <s> what is in the image </s>
    with torch.no_grad():
        expected = clip.get_text_features(input_ids=ids).pooler_output
    embedding = tower.embed("what is in the image", torch.device("cpu"))
    assert torch.allclose(embedding["question"], expected, atol=1e-6)
    assert embedding["question_tokens"].shape == (5, 8)
    mask = torch.arange(12)[None] < 7
    with torch.no_grad():
        hidden = clip.text_model(input_ids=F.pad(ids, (0, 5)), attention_mask=mask.long()).last_hidden_state
        expected = clip.text_projection(hidden)
    assert torch.allclose(embedding["question_positions"], expected, atol=1e-6)
    assert torch.allclose(embedding["question_positions"][0, 1:6], embedding["question_tokens"], atol=1e-6)  # causal
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        expected = clip.visual_projection(clip.vision_model.post_layernorm(hidden))
    assert torch.allclose(tower.align(hidden), expected, atol=1e-6)


def test_long_texts_are_split_into_segments() -> None:
    tower = load_text_tower(build_text_model(32))
    embedding = tower.embed("what is in the image " * 5, torch.device("cpu"))  # 25 words, 10 per segment
    assert embedding["question"].shape == (3, 8)
    assert embedding["question_tokens"].shape == (25, 8)
    assert embedding["question_positions"].shape == (3, 12, 8)
    assert tower.embed("", torch.device("cpu"))["question"].shape == (1, 8)


@pytest.mark.parametrize(
    "reducer",
    [
        TRIM(0.1, selection=TopRelevanceSelection(TextRelevance(likeness="dot", sign="aligned")), text_model="mini"),
        CDPruner(0.1, selection=ConditionalDiversitySelection(TextRelevance(sign="aligned")), text_model="mini"),
        EADP(0.1, selection=FacilityLocationSelection(DenseTextRelevance(sign="aligned")), text_model="mini"),
    ],
)
def test_different_questions_keep_different_tokens(reducer: Any) -> None:
    """On the embedded model, a strategy that reads the question keeps tokens of the item in the question."""
    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(mini.path())
    board = next(board for board in boards(50, "heldout", 1000) if len(board.items) >= 3 and board.grid == (2, 2))
    questions = [f"What number is on the {item.name}?" for item in board.items]
    with torch.no_grad(), reducer(model, tokenizer=processor) as run:
        model.generate(**build_inputs(processor, board.image, questions), max_new_tokens=2)
    scale = 160 / max(board.pixels.shape[:2])
    correct = 0
    for number, selection in enumerate(run.selections):
        sub_image = int(selection.kept[1:].sum(dim=1).argmax())  # the sub-image with the most kept tokens
        y, x = (side * scale for side in board.items[number].center)
        correct += sub_image == int(y >= 80) * 2 + int(x >= 80)
    kept = [selection.kept for selection in run.selections]
    assert all(not torch.equal(kept[0], mask) for mask in kept[1:])
    if not isinstance(reducer, CDPruner | TRIM):  # CDPruner and TRIM keep the same number of tokens in every tile
        assert correct == len(board.items)
