"""An adapter has the methods of the capabilities from which it inherits; a missing capability raises an error."""

from __future__ import annotations

from typing import Any

import pytest

from tokenprune.adapter import find_adapter
from tokenprune.capabilities import (
    HasDecoder,
    ProjectsMixtures,
    ReadsQuestion,
    Resizable,
    ShowsTiles,
    require_capability,
)
from tokenprune.testing.tiny_models import tiny_model


class QuestionReader(ReadsQuestion):
    """Has one capability."""

    def embed_question(self, text: str, text_model: str | None) -> Any:
        return {}

    def read_questions(self, input_ids: Any, attention_mask: Any, tokenizer: Any = None) -> list[str]:
        return []


@pytest.mark.parametrize("capability", [ReadsQuestion, Resizable, ShowsTiles, ProjectsMixtures, HasDecoder])
def test_a_missing_capability_is_named(capability: type) -> None:
    adapter: Any = find_adapter(tiny_model("llava"))
    assert require_capability(adapter, capability) is adapter
    reader: Any = QuestionReader()
    if capability is ReadsQuestion:
        assert require_capability(reader, capability) is reader
        return
    with pytest.raises(TypeError, match=rf"QuestionReader has no capability {capability.__name__} \(.*required by"):
        require_capability(reader, capability)
