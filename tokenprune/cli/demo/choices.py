"""The choices of a visitor, and the strategy, command line and Python script that they stand for."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, dataclass, fields

from tokenprune.catalog import components, strategies
from tokenprune.cli.options import parse_reducer
from tokenprune.cuts import resolve_cuts
from tokenprune.models import mini
from tokenprune.policies import AllocationPolicy, Component, SelectionPolicy
from tokenprune.reducer import TokenReducer

NONE = "(none)"
"""The choice of no strategy, or of the component that the strategy has by default."""


@dataclass(frozen=True)
class DemoConfig:
    """Options of `tokenprune demo`.

    Args:
        model: mini or mini-pages (embedded), a checkpoint folder, or a hub id.
        text_model: text tower of strategies that read the question; by default the one of the embedded model.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto (float32 on a CPU), float32, bfloat16, float16.
        host: address to listen on; by default only this machine can open the page.
        port: port; by default the first free one from 7860.
        max_megabytes: largest size of an uploaded file.
        max_megapixels: largest size of an image.
        max_new_tokens: longest answer in tokens.
    """

    model: str = "mini"
    text_model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int | None = None
    max_megabytes: int = 10
    max_megapixels: int = 25
    max_new_tokens: int = 32

    @property
    def text_tower(self) -> str | None:
        """The text model; by default the name of an embedded model, and None for other models."""
        return self.text_model or (self.model if self.model in mini.MODELS else None)


@dataclass(frozen=True)
class Choice:
    """A strategy as a visitor chooses it.

    Args:
        before: strategy before the LLM, or `NONE`.
        budget: its budget in percent.
        selection: its selection component; `NONE` for the default.
        allocation: its allocation component; `NONE` for the default.
        inside: strategy inside the LLM, or `NONE`.
        layer: layer of the cut.
        inside_budget: budget of the strategy inside the LLM, in percent.
    """

    before: str = "HiRED"
    budget: float = 20
    selection: str = NONE
    allocation: str = NONE
    inside: str = NONE
    layer: int = 2
    inside_budget: float = 50


def list_strategies(is_inside: bool, layers: int | None = None) -> dict[str, type[TokenReducer]]:
    """Return the strategies before or inside the LLM that need no further argument, by name.

    Args:
        is_inside: whether the strategies act inside the LLM.
        layers: number of layers of the LLM; strategies with a default cut outside them are left out. None keeps all.
    """
    classes = sorted(strategies().items())
    return {
        name: cls
        for name, cls in classes
        if (cls.stage.name == "decoder") == is_inside
        and not any(f.init and f.default is MISSING and f.default_factory is MISSING for f in fields(cls))
        and (layers is None or has_layers(cls(), layers))
    }


def has_layers(reducer: TokenReducer, layers: int) -> bool:
    """Return whether an LLM has the layers of all cuts of a strategy, or the layer of the cut can be chosen.

    Args:
        reducer: the strategy.
        layers: number of layers of the LLM.
    """
    if "layer" in {field.name for field in fields(reducer) if field.init}:
        return True
    try:
        resolve_cuts(getattr(reducer, "cuts", ()), layers)
    except ValueError:
        return False
    return True


def list_components(kind: type[Component]) -> dict[str, type[Component]]:
    """Return the components of a kind that need no argument, by name."""
    return {
        name: cls
        for name, cls in sorted(components().items())
        if issubclass(cls, kind) and not any(f.default is MISSING and f.default_factory is MISSING for f in fields(cls))
    }


def format_ratio(percent: float) -> str:
    """Return a budget in percent as a ratio in Python; 100 % is ``1.0``, because ``1`` means one token."""
    return str(float(percent) / 100)


def list_parts(choice: Choice, text_model: str | None = "mini") -> list[str]:
    """Return the parts of the chosen strategy as Python expressions, in the order of their stages.

    Args:
        choice: the choice.
        text_model: text tower of strategies that read the question.

    Raises:
        ValueError: if no strategy is chosen, or a name is not on the page.
    """
    parts = []
    allowed = {"selection": list_components(SelectionPolicy), "allocation": list_components(AllocationPolicy)}
    if choice.before != NONE:
        if choice.before not in (classes := list_strategies(is_inside=False)):
            raise ValueError(f"there is no strategy {choice.before!r} on this page")
        arguments = [format_ratio(choice.budget)]
        for name, options in allowed.items():
            if (component := getattr(choice, name)) != NONE:
                if component not in options:
                    raise ValueError(f"there is no {name} component {component!r} on this page")
                if name not in {field.name for field in fields(classes[choice.before])}:
                    raise ValueError(f"{choice.before} has no {name} component; choose {NONE}, or HiRED")
                arguments.append(f"{name}={component}()")
        if classes[choice.before]().reads_question and text_model is not None:
            arguments.append(f"text_model={text_model!r}")
        parts.append(f"{choice.before}({', '.join(arguments)})")
    if choice.inside != NONE:
        if choice.inside not in (classes := list_strategies(is_inside=True)):
            raise ValueError(f"there is no strategy {choice.inside!r} on this page")
        names = {field.name for field in fields(classes[choice.inside]) if field.init}
        values = {"layer": str(int(choice.layer)), "budget": format_ratio(choice.inside_budget)}
        parts.append(f"{choice.inside}({', '.join(f'{k}={v}' for k, v in values.items() if k in names)})")
    if not parts:
        raise ValueError("choose a strategy before the LLM, inside it, or both")
    return parts


def build_reducer(choice: Choice, text_model: str | None = "mini") -> TokenReducer:
    """Return the chosen strategy.

    Args:
        choice: the choice.
        text_model: text tower of strategies that read the question.

    Raises:
        ValueError: if the choice is not valid.
    """
    return parse_reducer(["--reducer", "+".join(list_parts(choice, text_model))])


def format_command(choice: Choice, config: DemoConfig, image: str, question: str) -> str:
    """Return the command line with the same result.

    Args:
        choice: the strategy.
        config: the options of the page.
        image: the name of the image file; empty for the bundled image.
        question: the question.
    """
    words = ["tokenprune", "run", "--model", config.model, *(["--image", image] if image else [])]
    words += ["--question", question, "--reducer", "+".join(list_parts(choice, config.text_tower))]
    return shlex.join(words)


def format_python(choice: Choice, config: DemoConfig, image: str, question: str) -> str:
    """Return a Python script with the same result; takes the arguments of `format_command`."""
    parts = list_parts(choice, config.text_tower)
    names = [name for name in (choice.before, choice.inside) if name != NONE]
    classes: list[type] = [strategies()[name] for name in names]
    classes += [components()[name] for name in (choice.selection, choice.allocation) if name != NONE]
    imports = "\n".join(f"from {cls.__module__} import {cls.__name__}" for cls in classes)
    path = repr(image) if image else f"mini.image_path({config.model!r})"
    return f"""from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.image_files import load_image
from tokenprune.models import mini
{imports}

model, processor = load({config.model!r}, {config.device!r}, {config.dtype!r})
inputs = model_inputs(model, processor, load_image({path}), [{question!r}], "image")
with ({" >> ".join(parts)})(model, tokenizer=processor) as run:
    output = model.generate(**inputs, max_new_tokens={config.max_new_tokens}, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(run.account)
"""
