"""Strategies, components, budgets and layers on the command line and in YAML."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.cli import SOME_FAMILIES, STRATEGY_SOURCE, run_json, run_refused
from tokenprune.budget import Budget, NoTokenWarning, OneTokenWarning, parse_amount
from tokenprune.catalog import strategies
from tokenprune.cli.errors import UserError
from tokenprune.cli.main import main
from tokenprune.cli.options import ReducerConfig, build_parser, parse_options, parse_reducer
from tokenprune.configuration import as_config
from tokenprune.decoder_reducer import AtLayer, DecoderReducer
from tokenprune.experiments.bench.command import BenchConfig, build_reducers
from tokenprune.experiments.bench.cost.report import CostConfig
from tokenprune.experiments.bench.selection_cost import SelectionCostConfig
from tokenprune.experiments.evaluation.grid import expand, parse_experiment
from tokenprune.reducer import Composed, TokenReducer
from tokenprune.strategies import (
    SCOPE,
    DivPrune,
    EViT,
    FasterVLM,
    FastV,
    HiRED,
    PruMerge,
    PyramidDrop,
    ToMe,
    UniformStride,
    VisionZip,
)
from tokenprune.strategies.components import (
    ContextualMerging,
    MaxMinDiversitySelection,
    MeanOfRestMerging,
    RandomSelection,
    SaliencyCoverageSelection,
)


def component_config(report: dict[str, Any], name: str) -> Any:
    return report["reducer"]["init_args"][name]


def test_names_budgets_and_components(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--reducer.selection.seed", "3", "--reducer.selection", "random-selection", "--reducer", "hired"]
    report = run_json(capsys, *arguments, "--reducer.budget", "37", "--reducer.allocation=UniformAllocation")
    assert report["asked"] == report["kept"] == 37
    assert report["budgets"] == [8, 8, 7, 7, 7]
    assert component_config(report, "selection")["class_path"].endswith("RandomSelection")
    assert component_config(report, "selection")["init_args"] == {"seed": 3}


def test_a_parameter_without_its_class_keeps_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--reducer.selection.layer", "-2", "--reducer.allocation.base_share", "0.25")
    assert component_config(report, "selection")["init_args"] == {"layer": -2, "heads": "sum"}
    assert component_config(report, "allocation")["init_args"]["base_share"] == 0.25
    assert report["budgets"][0] == 25


def test_budgets_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--reducer.budget=20%", "--reducer.budget=20 %", "--reducer.budget=0.2", "--budget=20%"):
        report = run_json(capsys, option, "--max-new-tokens", "1")
        assert report["asked"] == report["kept"] == 100
        assert component_config(report, "budget") == 0.2
    Path("percent.yaml").write_text("reducer:\n  class_path: HiRED\n  init_args:\n    budget: 100%\n")
    assert component_config(run_json(capsys, "--config", "percent.yaml", "--max-new-tokens", "1"), "budget") == 1.0
    nested = run_json(capsys, "--reducer.budget.amount", "10%", "--reducer.budget.per", "tile", "--max-new-tokens", "1")
    assert component_config(nested, "budget") == {"amount": 0.1, "per": "tile", "of": "encoded", "newlines": "free"}


def test_the_budget_has_a_short_option() -> None:
    parsed = [parse("hired", *words) for words in (["--budget", "160"], ["--budget.amount=160", "--budget.per=image"])]
    assert parsed == [HiRED(160), HiRED(Budget(160))]
    assert parse_experiment(["--reducer", "scope", "--budget", "0.3"]).reducer == SCOPE(0.3)
    grid = {"reducer": ["HiRED", "SCOPE"]}
    short, long = (expand({"grid": {**grid, name: [0.1, 0.3]}}) for name in ("budget", "reducer.budget"))
    assert [(setting.experiment, setting.name) for setting in short] == [(s.experiment, s.name) for s in long]


@pytest.mark.filterwarnings("ignore::tokenprune.budget.OneTokenWarning")
def test_1_is_one_token_and_100_percent_is_all_tokens_in_every_command() -> None:
    texts, amounts = ["1", "1.0", "100%", "160"], [1, 1.0, 1.0, 160]
    expected = [(amount, type(amount)) for amount in amounts]
    costs = parse_options(build_parser("tokenprune cost", "", CostConfig), ["--budget", *texts]).budget
    bench = parse_options(build_parser("tokenprune bench run", "", BenchConfig), ["--budget", *texts]).budget
    parser = build_parser("tokenprune bench", "", SelectionCostConfig)
    selections = [parse_options(parser, ["--budget", text]).budget for text in texts]
    for budgets in (costs, bench, selections):
        assert [(parse_amount(budget), type(parse_amount(budget))) for budget in budgets] == expected
    reducers = [parse("hired", "--budget", text) for text in texts]
    assert [(reducer.budget, type(reducer.budget)) for reducer in reducers] == expected
    named = build_reducers(["HiRED"], bench, [])
    assert [name for name, _ in named] == ["HiRED 1 token", "HiRED 100 %", "HiRED 100 %", "HiRED 160 tokens"]
    assert [reducer for _, reducer in named] == reducers


def test_a_budget_of_1_gives_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(OneTokenWarning, match="one token"):
        assert run_json(capsys, "--reducer.budget=1", "--max-new-tokens", "1")["kept"] == 1
    for make in (lambda part: AtLayer(1, part), lambda part: part >> AtLayer(1, UniformStride(0.5))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OneTokenWarning)
            make(UniformStride(1))
        assert len(caught) == 1


def test_a_budget_without_tokens_gives_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(NoTokenWarning, match="HiRED grants no visual token of an image"):
        assert run_json(capsys, "--budget=0.0001", "--max-new-tokens", "1", "--question", "Where?")["kept"] == 0


def test_a_check_warns_only_of_the_passed_budget() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", OneTokenWarning)
        assert main(["check", "hired", *SOME_FAMILIES]) == 0
    with pytest.warns(OneTokenWarning, match="one token"):
        assert main(["check", "hired", *SOME_FAMILIES, "--reducer.budget=1"]) == 0


@pytest.mark.parametrize("budget", ["120%", "few", "0", "0%"])
def test_bench_refuses_invalid_ratios(capsys: pytest.CaptureFixture[str], budget: str) -> None:
    message = run_refused(capsys, "bench", "run", "--model", "mini", "--budget", budget)
    assert f"--budget {budget}: give ratios above 0 and up to 1, such as 0.2 or 20%" in message


@pytest.mark.parametrize("budget", ["120%", "few", "-0.1"])
def test_bench_of_strategies_refuses_invalid_ratios(capsys: pytest.CaptureFixture[str], budget: str) -> None:
    message = run_refused(capsys, "bench", "strategies", "--names", "HiRED", f"--budget={budget}")
    assert "is neither a ratio nor a count" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--reducer.budget.amount", "9", "--reducer.budget.per", "tile"],
        ['--reducer.budget={"amount": 9, "per": "tile"}'],
    ],
)
def test_budgets_with_all_fields(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    report = run_json(capsys, *arguments)
    assert report["asked"] == 45
    assert component_config(report, "budget") == {"amount": 9, "per": "tile", "of": "encoded", "newlines": "free"}


def test_layers_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    for text, layer in {"first": "first", "0.5": 0.5, "[first, feature]": ["first", "feature"], "2": 2}.items():
        report = run_json(capsys, "--reducer.selection.layer", text)
        assert component_config(report, "selection")["init_args"]["layer"] == layer


def test_presets_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    release = run_json(capsys, "--reducer", "HiRED.release", "--reducer.budget", "0.3")
    assert component_config(release, "padding") == "ignore"
    assert component_config(release, "allocation")["init_args"]["region"] == "stripe"
    assert release["newlines"] == 0
    assert release["asked"] == 150
    paper = run_json(capsys, "--reducer=hired.paper")
    assert component_config(paper, "allocation")["init_args"]["region"] == "quadrant"


def test_a_strategy_from_a_file(capsys: pytest.CaptureFixture[str], strategy_file: Path) -> None:
    report = run_json(capsys, "--reducer", f"{strategy_file}:LoudestTokens", "--reducer.budget", "0.1")
    assert report["kept"] == 50
    quiet = run_json(capsys, "--reducer", "loud.py:LoudestTokens.quiet", "--reducer.budget", "0.1")
    assert component_config(quiet, "power") == -1.0
    assert quiet["kept_per_tile"] != report["kept_per_tile"]
    plugin = run_json(capsys, "--plugin", "loud.py", "--reducer", "loudest-tokens", "--reducer.budget", "0.1")
    assert plugin["kept_per_tile"] == report["kept_per_tile"]


@pytest.mark.parametrize("strategy", ["hired", "loud.py:LoudestTokens"])
def test_a_printed_config_can_be_run(capsys: pytest.CaptureFixture[str], strategy_file: Path, strategy: str) -> None:
    arguments = ["--reducer", strategy, "--reducer.budget", "0.15", "--reducer.positions", "preserve"]
    assert main(["run", *arguments, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["reducer"]["init_args"]["budget"] == 0.15
    Path("run.yaml").write_text(text)
    sys.modules.pop("tokenprune_plugin_loud", None)
    report = run_json(capsys, "--config", "run.yaml")
    assert report["asked"] == 75
    assert component_config(report, "positions") == "preserve"
    assert run_json(capsys, "--config", "run.yaml", "--reducer.budget", "0.2")["asked"] == 100


def test_yaml_accepts_the_names_of_the_command_line(capsys: pytest.CaptureFixture[str], strategy_file: Path) -> None:
    Path("short.yaml").write_text("reducer: hired.release\n")
    assert component_config(run_json(capsys, "--config", "short.yaml"), "padding") == "ignore"
    Path("long.yaml").write_text(
        "plugin: [loud.py]\nreducer:\n  class_path: HiRED.paper\n  init_args:\n    budget: 0.3\n"
        "    selection: {class_path: random-selection, init_args: {seed: 4}}\n"
    )
    report = run_json(capsys, "--config", "long.yaml")
    assert report["asked"] == 150
    assert component_config(report, "selection")["init_args"] == {"seed": 4}
    assert component_config(report, "allocation")["init_args"]["region"] == "quadrant"
    inline = run_json(capsys, "--reducer.selection={class_path: random-selection, init_args: {seed: 5}}")
    assert component_config(inline, "selection")["init_args"] == {"seed": 5}


def test_strings_in_an_expression_are_not_changed() -> None:
    reducer = parse_reducer(["--reducer", "cd-pruner(0.2, text_model='a/clip-vit-large-patch14')+fastv(layer=2)"])
    assert reducer.list_parts()[0].text_model == "a/clip-vit-large-patch14"
    assert parse_reducer(["--reducer", 'cd-pruner(text_model="mini-pages")']).text_model == "mini-pages"


def test_repeated_options_and_kebab_case_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--question", "One?", "--question", "Two?", "--reducer.allocation.base-share", "0.3")
    assert [result["question"] for result in report["results"]] == ["One?", "Two?"]
    assert component_config(report, "allocation")["init_args"]["base_share"] == 0.3


def test_output_of_a_strategy_is_not_part_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("chatty.py").write_text(
        STRATEGY_SOURCE.replace("        return image", "        print('hello')\n        return image")
    )
    assert run_json(capsys, "--reducer", "chatty.py:LoudestTokens")["kept"] == 100


@pytest.mark.parametrize("name", sorted(strategies()))
def test_a_strategy_by_name_has_its_own_components(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """No component of HiRED, the default strategy, remains."""
    assert main(["run", "--reducer", name, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["reducer"]
    expected = strategies()[name]()  # type: ignore[call-arg]
    assert set(printed["init_args"]) == set(as_config(expected)["init_args"])
    assert parse_reducer(["--reducer", yaml.safe_dump(printed, default_flow_style=True)]) == expected
    module = strategies()[name].__module__
    assert main(["run", "--reducer", f"{module}.{name}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["reducer"] == printed


def test_a_component_by_name_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--reducer",
        "PruMerge",
        "--reducer.selection",
        "SaliencyCoverageSelection",
        "--reducer.merging",
        "mean-of-rest-merging",
    ]
    assert main(["run", *arguments, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["reducer"]
    assert printed == as_config(PruMerge(selection=SaliencyCoverageSelection(), merging=MeanOfRestMerging()))


def test_values_in_the_format_of_the_wandb_agent(capsys: pytest.CaptureFixture[str]) -> None:
    component = "{'class_path': 'ContextualMerging', 'init_args': {'number': None, 'cls': True}}"
    arguments = [
        "--reducer=VisionZip",
        f"--reducer.merging={component}",
        "--reducer.text_model=None",
        "--reducer.order=None",
    ]
    assert main(["run", *arguments, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["reducer"]
    assert printed == as_config(VisionZip(merging=ContextualMerging(cls=True)))


def test_nested_components_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--reducer",
        "CDPruner",
        "--reducer.text-model",
        "mini",
        "--reducer.selection.relevance",
        "text-relevance",
    ]
    report = run_json(capsys, *arguments, "--reducer.selection.relevance.sign", "aligned", "--reducer.budget", "0.1")
    assert component_config(report, "selection")["init_args"]["relevance"]["init_args"]["sign"] == "aligned"
    assert report["answer"] == report["expected"]
    assert "set text_model to the CLIP checkpoint" in run_refused(capsys, "run", "--reducer", "CDPruner")


COMPOSITION = "HiRED(0.4)+AtLayer(1, UniformStride(0.5))"


def parse(*arguments: str) -> TokenReducer:
    return parse_reducer(["--reducer", *arguments])


@pytest.mark.parametrize(
    "text",
    [
        COMPOSITION,
        "hired(0.4) + at-layer(layer=1, reducer=uniform-stride(0.5))",
        "Composed([HiRED(0.4), AtLayer(1, UniformStride(budget=0.5))])",
        '{class_path: Composed, init_args: {parts: [HiRED(0.4), "AtLayer(1, UniformStride(0.5))"]}}',
    ],
)
def test_a_composition_is_written_as_calls(text: str) -> None:
    assert parse(text) == Composed([HiRED(0.4), AtLayer(1, UniformStride(0.5))])


def test_parts_have_parameters() -> None:
    arguments = ["--reducer.parts.1.reducer.budget=20%", "--reducer.parts.0.budget", "{amount: 0.3, per: tile}"]
    arguments += ["--reducer.parts.0.selection", "random-selection", "--reducer.parts.0.selection.seed=3"]
    first, second = parse(COMPOSITION, *arguments, "--reducer.parts.1.layer=0.5").list_parts()
    assert first == HiRED(Budget(0.3, per="tile"), selection=RandomSelection(seed=3))
    assert second == AtLayer(0.5, UniformStride(0.2))
    assert parse(COMPOSITION, "--reducer.parts.1", "AtLayer(2, Random)").label == "HiRED+AtLayer(Random)"


def test_values_of_a_call_need_no_quotes() -> None:
    reducer = parse("HiRED(9, selection=RandomSelection(seed=3), positions=preserve, text_model=null)")
    assert reducer == HiRED(9, positions="preserve", selection=RandomSelection(seed=3))
    assert parse("HiRED.release(0.4)") == replace(HiRED.release(), budget=0.4)
    assert parse("PruMerge(selection=MaxMinDiversitySelection)").selection == MaxMinDiversitySelection()  # type: ignore[attr-defined]


def test_strategies_inside_the_vision_tower_have_options() -> None:
    composed = parse("ToMe(r=8)+HiRED(0.2)+FastV(layer=2, budget=0.5)")
    assert composed == ToMe(r=8) >> HiRED(0.2) >> FastV(layer=2, budget=0.5)
    assert parse("ToMe", "--reducer.r", "8") == ToMe(r=8)
    assert parse("ToMe", "--reducer.budget", "0.5") == ToMe(0.5)
    assert parse("EViT", "--reducer.schedule", "[[0.25, 0.5], [4, 20]]") == EViT(schedule=((0.25, 0.5), (4, 20)))
    with pytest.raises(UserError, match=r"ToMe got budget=0\.3 and r=8"):
        parse("ToMe(0.3, r=8)")


def test_a_file_has_parts_of_a_composition(capsys: pytest.CaptureFixture[str]) -> None:
    Path("loud.py").write_text(STRATEGY_SOURCE)
    reducer = parse("loud.py:LoudestTokens(0.4)+AtLayer(1, loud.py:LoudestTokens(0.5))")
    assert reducer.label == "LoudestTokens+AtLayer(LoudestTokens)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([COMPOSITION.replace("HiRED", "HiRD")], "Did you mean HiRED"),
        ([COMPOSITION.replace("UniformStride", "UniformStrid")], "Did you mean UniformStride?"),
        ([COMPOSITION.replace("0.4", "bugdet=0.4")], "(did you mean budget?)"),
        (["HiRED(0.4, budget=0.2)+AtLayer(1, Random)"], "has two values of budget"),
        (["AtLayer(1, Random, preserve, 3, 4)"], "has 5 values, but the parameters are layer, reducer, positions"),
        (["HiRED(0.4+"], "cannot be read ('(' was never closed); write HiRED(0.4)+FastV(layer=2, budget=0.5)"),
        (["HiRED(0.4)+3"], "3 is no strategy; write"),
        (["HiRED(0.4*2)"], "'0.4 * 2' is neither a name, a call nor a value"),
        (["HiRED(0.4)+DivPrune(0.3)"], "the parts act at the stages projector, projector"),
        (["AtLayer(1, Random)+HiRED"], "the parts act at the stages decoder, projector"),
        (["AtLayer(0, Random)"], "a cut at layer 0 is not inside an LLM; use a layer from 1"),
        (["AtLayer(1, Composed([HiRED, AtLayer(1, Random)]))"], "AtLayer needs a strategy of the projector stage"),
        ([COMPOSITION, "--reducer.budget=0.2"], "a part has its own parameters: --reducer.parts.0.budget"),
        (
            [COMPOSITION, "--reducer.parts.2.budget=0.2"],
            "--reducer.parts.2.budget: the composition has the parts 0 to 1",
        ),
        (["TransPrune(layer=1)"], r"no parameter 'layer' of TransPrune (write its cuts as schedule=[[2, 0.5]])"),
        ([COMPOSITION, "--reducer.parts.1.budget=0.2"], "there is no parameter 'budget' of AtLayer; it has"),
        ([COMPOSITION, "--reducer.parts.0.budget.per=tile"], "budget is no class with parameters; give its value"),
        (["HiRED", "--reducer.parts.0.budget=0.2"], "--reducer is no composition"),
        (["+HiRED"], "'+HiRED': a strategy is missing before or after +; write HiRED(0.4)+FastV"),
        (["HiRED(0.4)+"], "a strategy is missing before or after +"),
        ([COMPOSITION, "--reducer.parts.x=0.2"], "--reducer.parts.x: the parts of a composition have numbers; write"),
        ([COMPOSITION, "--reducer.parts.x.budget=0.2"], "parts.x.budget: the parts of a composition have numbers"),
        ([COMPOSITION, "--budget=0.2"], "a part has its own parameters: --reducer.parts.0.budget"),
        (["AtLayer(1, Random)", "--budget=0.2"], "the strategy at the cut has its own: --reducer.reducer.budget"),
        (["PyramidDrop", "--reducer.schedule=((1,),)"], "give a list in brackets, such as [[2, 0.5]]"),
        (["PyramidDrop", "--reducer.schedule=[[1]]"], "[1] is not valid; give lists of 2 values, such as [[2, 0.5]]"),
    ],
)
def test_errors_of_compositions_name_the_mistake(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as info:
        parse(*arguments)
    assert message in str(info.value)


@pytest.mark.parametrize(
    "reducer",
    [
        Composed([HiRED(0.4, selection=RandomSelection(seed=3)), AtLayer(0.5, DivPrune(Budget(20, per="tile")))]),
        AtLayer(2, FasterVLM(0.3), positions="reindex"),
        UniformStride(0.3) >> AtLayer(1, UniformStride(20)),
        HiRED(0.4) >> PyramidDrop(schedule=((1, 0.5), (0.5, 20))),
        *(kind() for kind in strategies().values() if issubclass(kind, DecoderReducer)),
    ],
    ids=lambda reducer: reducer.label,
)
def test_a_configuration_is_read_again(reducer: TokenReducer) -> None:
    text = yaml.safe_dump({"reducer": as_config(reducer)})
    Path("again.yaml").write_text(text)
    parser = build_parser("tokenprune", "", ReducerConfig, file=True)
    parsed = parse_options(parser, ["--config", "again.yaml"], {}).reducer
    assert parsed == reducer
    assert yaml.safe_dump({"reducer": as_config(parsed)}) == text


def test_an_option_overrides_a_part_of_a_file() -> None:
    Path("composed.yaml").write_text(f"reducer: {COMPOSITION}\n")
    parser = build_parser("tokenprune", "", ReducerConfig, file=True)
    reducer = parse_options(parser, ["--config", "composed.yaml", "--reducer.parts.0.budget=0.1"], {}).reducer
    assert reducer == Composed([HiRED(0.1), AtLayer(1, UniformStride(0.5))])
