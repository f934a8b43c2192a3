"""Pure functions that resolve which outputs of a vision tower a LLaVA-style model uses."""

from __future__ import annotations

from typing import Any


def resolve_feature_layers(setting: Any, depth: int) -> list[int]:
    """Return the indices of the layers whose outputs a model uses, side by side.

    Args:
        setting: the value of `vision_feature_layer`: an index of the hidden states, or several.
        depth: number of layers of the tower.

    Raises:
        ValueError: if the model uses the embeddings only, which are no output of a layer.
    """
    numbers = setting if isinstance(setting, (list, tuple)) else [setting]
    indices = [depth + number if number < 0 else number - 1 for number in numbers]
    if not 0 <= max(indices) < depth:
        raise ValueError(f"vision_feature_layer={setting!r} is no output of the {depth} layers of the vision tower")
    return indices


def check_select_strategy(strategy: str | None, has_cls: bool) -> None:
    """Check that the feature selection of a call leaves a grid of tokens.

    Args:
        strategy: the value of `vision_feature_select_strategy`; None if the model has no such option.
        has_cls: whether the tower has a CLS token.

    Raises:
        ValueError: if the CLS token is kept among the visual tokens, or a patch is removed in place of CLS.
    """
    expected = "default" if has_cls else "full"
    if strategy not in (None, expected):
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} leaves no grid of patches in a tower "
            f"{'with' if has_cls else 'without'} a CLS token; set it to {expected!r}"
        )
