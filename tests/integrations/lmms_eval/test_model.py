"""The model class of the plug-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.lmms_task import STRATEGIES
from tokenprune.models import mini

pytestmark = pytest.mark.lmms


def parse_model_args(text: str) -> dict[str, Any]:
    """Parse model arguments with the parser of lmms-eval."""
    from lmms_eval.utils import simple_parse_args_string

    parsed: dict[str, Any] = simple_parse_args_string(text)
    return parsed


def test_model_args_are_parsed_like_the_command_line(plugin: Any) -> None:
    from tokenprune import Budget
    from tokenprune.strategies import HiRED
    from tokenprune.strategies.components import RandomSelection, TopAttentionSelection, VisualContentAllocation

    for text, expected in {
        "reducer=hired,reducer.budget=0.1": HiRED(0.1),
        "reducer=HiRED.release,reducer.budget=160": HiRED.release(160),
        "reducer=HiRED,reducer.budget=1.0": HiRED(1.0),
        "reducer=HiRED,reducer.selection.layer=-2": HiRED(selection=TopAttentionSelection(layer=-2)),
        "reducer=HiRED,reducer.allocation.layer=[0,-1]": HiRED(allocation=VisualContentAllocation(layer=[0, -1])),
        "reducer.selection.seed=3,reducer=HiRED,reducer.selection=random-selection": HiRED(
            selection=RandomSelection(seed=3)
        ),
        'reducer={"class_path": "HiRED", "init_args": {"budget": {"amount": 0.25, "of": "unpadded"}}}': HiRED(
            Budget(0.25, of="unpadded")
        ),
    }.items():
        reducer = plugin.parse_reducer(parse_model_args(text))
        assert reducer == expected, text
        assert repr(reducer) == repr(expected), text  # 1 == 1.0, but a count is no ratio


def test_a_fingerprint_depends_on_parameters_and_code(plugin: Any, folder: Path) -> None:
    first = plugin.compute_fingerprint(plugin.parse_reducer({"reducer": "HiRED", "reducer.budget": 0.2}))
    assert first == plugin.compute_fingerprint(plugin.parse_reducer({"reducer.budget": 0.2, "reducer": "hired"}))
    assert first != plugin.compute_fingerprint(plugin.parse_reducer({"reducer": "HiRED", "reducer.budget": 0.3}))
    file = folder / "edited.py"
    file.write_text(STRATEGIES)
    custom_reducer = plugin.parse_reducer({"reducer": "edited.py:Loudest"})
    before = plugin.compute_fingerprint(custom_reducer)
    assert parse_model_args(f"fingerprint={before}") == {"fingerprint": before}
    file.write_text(STRATEGIES.replace("largest", "greatest"))
    assert plugin.compute_fingerprint(custom_reducer) != before


@pytest.fixture
def lm(plugin: Any) -> Any:
    """Return a model of the plug-in with a budget of 20 %."""
    return plugin.TokenPruneSimple(pretrained=str(mini.path()), dtype="float32", budget=0.2)


def make_request(*arguments: Any, kind: str = "generate_until") -> Any:
    """Return a request in the format of lmms-eval."""
    from lmms_eval.api.instance import Instance

    return Instance(kind, arguments, 0, {"task": "boards_local", "doc_id": 0, "repeats": 1})


def make_prompt(lm: Any) -> Any:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many shapes are there?"}]}]
    processor = lm._inner._image_processor
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=Image.open(mini.image_path()), text=text, return_tensors="pt")


def test_only_the_right_fingerprint_is_accepted(plugin: Any, lm: Any) -> None:
    common = {"pretrained": str(mini.path()), "dtype": "float32", "budget": 0.2}
    with pytest.raises(ValueError, match=f"Write fingerprint={lm.fingerprint}"):
        plugin.TokenPruneSimple(**common, fingerprint="tp-0")
    assert plugin.TokenPruneSimple(**common, fingerprint=lm.fingerprint).fingerprint == lm.fingerprint


def test_a_base_of_the_wrong_kind_is_refused(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"base=internvl_hf has no simple class.*omit --force_simple"):
        plugin.TokenPruneSimple(base="internvl_hf")


def test_an_error_is_raised_even_if_the_wrapper_catches_it(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in raises an error of `generate` even if the wrapper catches `BaseException`."""

    def swallow(requests: Any) -> list[str]:
        try:
            lm._inner.model.generate(**make_prompt(lm), max_new_tokens=-1)
        except BaseException:
            return [""]
        return ["unreachable"]

    monkeypatch.setattr(lm._inner, "generate_until", swallow)
    request = make_request("?", {"until": []})
    with pytest.raises(RuntimeError, match=r"generate failed, .*: ValueError: .*max_new_tokens"):
        lm.generate_until([request])
    assert "generate" not in vars(lm._inner.model)


def test_an_error_of_the_wrapper_is_not_changed(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(requests: Any) -> list[str]:
        raise KeyError("mine")

    monkeypatch.setattr(lm._inner, "generate_until", fail)
    with pytest.raises(KeyError, match="mine"):
        lm.generate_until([make_request("?", {})])
    assert "generate" not in vars(lm._inner.model)


def test_the_wrapper_gets_copies_of_requests(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def modify_request(requests: Any) -> list[str]:
        lm._inner.model.generate(**make_prompt(lm), max_new_tokens=1)
        requests[0].args[1]["until"].append("written")
        return ["answer"]

    monkeypatch.setattr(lm._inner, "generate_until", modify_request)
    request = make_request("?", {"until": []})
    assert lm.generate_until([request]) == ["answer"]
    assert request.args == ("?", {"until": []})


@pytest.mark.parametrize("budget", [0.2, 1.0])
def test_loglikelihood_reads_logits_of_the_full_length(
    plugin: Any, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test replaces `loglikelihood` of llava_hf, which fails with transformers 5 without the plug-in, too."""
    lm = plugin.TokenPruneSimple(pretrained=str(mini.path()), dtype="float32", budget=budget)

    def read_logits(requests: Any) -> list[tuple[float, bool]]:
        inputs = make_prompt(lm)
        logits = lm._inner.model(**inputs).logits
        assert logits.shape[1] == inputs["input_ids"].shape[1]
        return [(logits[0, -1].log_softmax(-1).max().item(), True)]

    monkeypatch.setattr(lm._inner, "loglikelihood", read_logits)
    answers = lm.loglikelihood([make_request("?", "!", kind="loglikelihood")])
    assert budget < 1.0 or answers == read_logits(None)


def test_a_wrapper_with_batches(lm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test replaces `generate_until`: `llava_hf` does not batch, and other wrappers lack the supported models."""
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]

    def answer_in_batches(requests: Any) -> list[str]:
        processor, model = lm._inner._image_processor, lm._inner.model
        texts = []
        for request in requests:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.args[0]}]}]
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
        images = [Image.open(request.args[1]["image"]) for request in requests]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers: list[str] = processor.batch_decode(
            generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers

    monkeypatch.setattr(lm._inner, "generate_until", answer_in_batches)
    requests = [make_request(line["question"], {"image": line["image"]}) for line in lines]
    single = [lm.generate_until([request])[0] for request in requests]
    assert len(set(single)) > 5
    assert lm.generate_until(requests) == single


def test_an_empty_list_of_requests(lm: Any) -> None:
    assert lm.generate_until([]) == []


def test_clean_releases_the_model(lm: Any) -> None:
    assert "_model" in vars(lm._inner)
    lm.clean()
    assert "_model" not in vars(lm._inner)
