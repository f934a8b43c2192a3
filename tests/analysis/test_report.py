"""Reports of run directories: tables and files."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.helpers.records import board_records, failed, record, setting, write_setting
from tests.helpers.reports import make_scores, parse_table, write_run_directory
from tokenprune.experiments.analysis.intervals import Interval
from tokenprune.experiments.analysis.report import main, print_results, write_report
from tokenprune.experiments.analysis.report.contents import build_report
from tokenprune.experiments.analysis.report.figures import draw_figures
from tokenprune.experiments.analysis.report.files import setting_rows, write_parquet
from tokenprune.experiments.analysis.report.formatting import (
    DASH,
    format_budget,
    format_interval,
    format_p_value,
    format_percent,
)
from tokenprune.experiments.analysis.report.latex import render_latex
from tokenprune.experiments.analysis.report.markdown import render_markdown
from tokenprune.experiments.analysis.report.rows import method_rows
from tokenprune.experiments.analysis.report.terminal import split_columns
from tokenprune.experiments.analysis.results import Results, read_results


def test_the_main_table_shows_the_means_of_the_records(report_folder: Path) -> None:
    text = (report_folder / "report.md").read_text()
    rows = {row[0]: row[1:] for row in parse_table(text, "Accuracy")}
    assert rows["method"] == ["10%", "20%"]
    assert len(rows) == 1 + 3 + 1 + 3  # one row per random seed
    first = float(np.mean(make_scores(0.5 + 0.1)))
    assert rows["HiRED, allocation=UniformAllocation"][0].startswith(f"{100 * first:.1f} [")
    assert rows["HiRED, allocation=GuidedAllocation"][0].startswith("**")
    assert "Full tokens: " in text


def test_results_are_printed_with_the_marks_of_the_report(
    report_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = read_results(report_folder).settings
    print_results(settings, Console(width=60))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("15 settings on mini, Boards(number=2): 144 samples in 24 groups.")
    text = (report_folder / "report.md").read_text()
    rows = [row for row in parse_table(text, "Accuracy") if row[0] != "method"]
    printed = {line.split("  ")[0]: line for line in lines}
    for name, *cells in rows:  # lines do not wrap if the output is no terminal
        assert printed[name].split() == [*name.split(), *" ".join(cells).split()]
    assert printed["full tokens"].split()[2] == f"{100 * np.mean(make_scores(0.9)):.1f}"
    assert lines[-1] == "In brackets: 95 % intervals. " + text[text.index("Bold: best") : text.index(" Every seed")]
    names = [
        [row[0] for row in part] for part in split_columns([["a", "b", "c"], ["x", "1", DASH], ["y", DASH, "2"]], 9)
    ]
    assert names == [["a", "x"], ["a", "y"]]
    terminal = Console(force_terminal=True, width=60, color_system="standard", legacy_windows=False)
    print_results([setting([record(0, 0, 1)], metric="anls")], terminal)
    out = capsys.readouterr().out
    assert "1 setting: 1 sample in 1 group. Score: ANLS" in out
    assert "1 group only: with fewer than 20" in out
    assert "\x1b[1m100.0\x1b[0m" in out  # bold


def test_differences_are_paired_by_sample(report_folder: Path) -> None:
    text = (report_folder / "report.md").read_text()
    rows = {line[0]: line[1:] for line in parse_table(text, "Differences to full tokens")}
    assert rows["HiRED, allocation=UniformAllocation"][-1] == "lower"
    assert rows["HiRED, allocation=UniformAllocation"][2].startswith("0 / ")  # the scores are nested
    head, *lines = parse_table(text, "Differences to random tokens at the same budget")
    assert head[1:] == ["minus Random, seed 0", "minus Random, seed 1", "minus Random, seed 2"]
    stride = next(line for line in lines if line[0] == "UniformStride")
    assert stride[1] == "+0.0 [+0.0, +0.0] p = 1.000, no difference seen"  # the same answers as seed 0
    assert not any(line[0].startswith("Random") for line in lines)


def test_a_factor_has_a_winner_only_if_intervals_separate_its_levels(report_folder: Path) -> None:
    text = (report_folder / "report.md").read_text()
    assert "**GuidedAllocation wins**" in text
    assert "**0.2 wins**" in text
    directory = report_folder.parent / "tie"
    for allocation in ("UniformAllocation", "VisualContentAllocation"):
        write_setting(directory, board_records(make_scores(0.5)), factors={"reducer.allocation": allocation})
    write_report(directory)
    assert "**No winner**: the intervals separate" in (directory / "report.md").read_text()
    few = [
        setting(board_records([[share] * 6] * 4), hash=str(share), factors={"reducer.layer": share}) for share in (0, 1)
    ]
    text = render_markdown(build_report(Results("x", few)))
    assert "\n1 is ahead: every other level is behind it, but with fewer than 20 groups" in text
    assert "wins**" not in text


def test_the_report_has_types_splits_tokens_and_errors(report_folder: Path) -> None:
    text = (report_folder / "report.md").read_text()
    assert parse_table(text, "Accuracy: by type of question")[0] == ["at 10%", "number (n = 72)", "side (n = 72)"]
    assert parse_table(text, "Accuracy: by split")[0][1:] == ["tiles (n = 144)"]
    tokens = {tuple(line[:2]): line[2:5] for line in parse_table(text, "Tokens and time")}
    assert tokens["HiRED, allocation=GuidedAllocation", "20%"] == ["80.0", "80.0", "100.0"]
    assert tokens["full tokens", "all"] == ["400.0", "400.0", "100.0"]
    assert "**All settings share one encoding**, and each is charged its full time" in text  # times of older records
    assert "No sample ended in an error." in text


def test_each_setting_is_charged_the_time_that_it_takes_by_itself() -> None:
    alone = [{**record(n, 0, 1), "prepare_alone_ms": [9.0, 3.0, 5.0, None][n]} for n in range(4)]
    older, newer = setting(board_records([[1]] * 4), hash="a"), setting(alone, hash="b", strategy="ImageDownsample")
    assert (older.time_alone, newer.time_alone) == (8 + 0.5 + 20, 5 + 20)
    text = render_markdown(build_report(Results("x", [newer])))
    assert "of each setting by itself" in text
    assert parse_table(text, "Tokens and time")[1][-4:] == ["5.00", "20.00", "8.00", "0.50"]
    assert [row["time_alone"] for row in setting_rows([older, newer])] == [28.5, 25.0]


def test_columns_of_the_vision_tower_exist_if_a_strategy_acts_there() -> None:
    plain = setting(board_records([[1]] * 2), hash="a")
    flops = [{"tower_flops": 30, "tower_flops_full": 40}, {"tower_flops": None, "tower_flops_full": None}]
    rows = [record(n, 0, 1, tower_patches=60 - 20 * n, tower_patches_full=100, **flops[n]) for n in range(2)]
    reduced = setting(rows, hash="b", strategy="ToMe")
    head, *lines = parse_table(render_markdown(build_report(Results("x", [plain, reduced]))), "Tokens and time")
    assert head[-2:] == ["tower patches, %", "tower FLOPs, %"]
    assert [line[-2:] for line in lines] == [[DASH, DASH], ["50.0", "75.0"]]
    head, _ = parse_table(render_markdown(build_report(Results("x", [plain]))), "Tokens and time")
    assert head[-1] == "select, ms"


def test_errors_are_counted_and_quoted(tmp_path: Path) -> None:
    write_setting(tmp_path, [*board_records([[1], [1]]), failed(2, 0), failed(2, 1, "other\n`x`"), failed(3, 0)])
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| 3 of 5 | 2 | `CUDA \\| out of memory` |" in text
    assert "<code>CUDA | out of memory</code>" in (tmp_path / "report.html").read_text()


def test_the_html_is_self_contained(report_folder: Path) -> None:
    text = (report_folder / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert re.findall(r'src="([^"]{0,22})', text) == ["data:image/png;base64,"] * 3
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert str(report_folder.parent) not in text
    assert text.count("<table") == text.count("</table>") > 5


def test_texts_of_records_are_escaped(tmp_path: Path) -> None:
    write_setting(tmp_path, [*board_records([[1], [1]]), failed(2, 0, "<script>alert(1)</script>")], "A<b>_&%")
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text
    assert "A&lt;b&gt;_&amp;%" in text
    assert "A<b>\\_\\&\\% &" in (tmp_path / "report.tex").read_text()


def test_the_csv_files_hold_every_setting_and_record(report_folder: Path) -> None:
    with (report_folder / "settings.csv").open() as file:
        settings = list(csv.DictReader(file))
    with (report_folder / "records.csv").open() as file:
        records = list(csv.DictReader(file))
    assert (len(settings), len(records)) == (15, 15 * 144)
    guided = next(row for row in settings if "Guided" in row["method"] and row["budget"] == "0.1")
    assert float(guided["mean"]) == pytest.approx(np.mean(make_scores(0.8)))
    assert float(guided["minus_full"]) == pytest.approx(np.mean(make_scores(0.8)) - np.mean(make_scores(0.9)))
    assert guided["minus_random_2_n"] == "144"
    assert guided["factor.reducer.allocation"] == "GuidedAllocation"
    full = next(row for row in settings if row["role"] == "full")
    assert (full["method"], full["strategy"], full["minus_full"]) == ("full tokens", "full tokens", "")
    assert records[0]["kept_per_tile"] == "[10, 10, 20]"


def test_the_latex_table_is_complete(report_folder: Path) -> None:
    text = (report_folder / "report.tex").read_text()
    for mark in ("\\toprule", "\\midrule", "\\bottomrule", "booktabs", "10\\%", "Bold: best of the column"):
        assert mark in text
    lines = [line for line in text.split("\n") if line.endswith("\\\\")]
    assert all(line.count(" & ") == 2 or "multicolumn{2}" in line for line in lines)
    assert text.count("{") == text.count("}")
    bold = [line for line in lines if "textbf" in line]
    assert [line.split(" & ")[0] for line in bold] == ["HiRED, allocation=GuidedAllocation"]
    assert bold[0].count(f"& \\textbf{{{100 * np.mean(make_scores(0.8)):.1f}}}") == 1


def test_missing_baselines_are_omitted_with_a_note(tmp_path: Path) -> None:
    write_report(write_run_directory(tmp_path, full=False, random=False), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "differences to full tokens are omitted" in text
    assert "differences to random tokens are omitted" in text
    assert "## Differences" not in text
    head = (tmp_path / "out" / "settings.csv").read_text().split("\n")[0]
    assert "minus_" not in head
    assert not (tmp_path / "report.md").exists()


def test_random_tokens_can_be_missing_at_a_budget(tmp_path: Path) -> None:
    write_setting(tmp_path, board_records(make_scores(0.5)))
    write_setting(tmp_path, board_records(make_scores(0.6)), budget=0.2)
    write_setting(tmp_path, board_records(make_scores(0.6)), "Random", 0.2, "baseline", seed=1)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "No random tokens at 10%" in text
    assert parse_table(text, "Differences to random tokens at the same budget")[0] == ["at 20%", "minus Random, seed 1"]


def test_unequal_samples_and_few_groups_are_noted(tmp_path: Path) -> None:
    write_setting(tmp_path, board_records([[1, 1], [0, 1]]), role="full", budget=1.0)
    write_setting(tmp_path, [*board_records([[1, 1]]), record(1, 0, 1)], tail='{"sample": "bo')
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Not every setting holds all 4 samples: HiRED, budget=0.1: 3." in text
    assert "2 groups only" in text
    assert "cut off" in text
    assert parse_table(text, "Differences to full tokens")[1][1] == "3"


def test_models_and_tasks_are_never_mixed(tmp_path: Path) -> None:
    for model, share in (("a", 0.9), ("b", 0.3)):
        write_setting(tmp_path, board_records(make_scores(share)), role="full", budget=1.0, model=model)
        write_setting(
            tmp_path, board_records(make_scores(share)), model=model, factors={"model": model, "reducer.budget": 0.1}
        )
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("+0.0 [+0.0, +0.0]") == 2  # each model is compared with its own full tokens
    assert "## a, Boards(number=2)\n" in text
    assert "**a wins**" in text
    assert (tmp_path / "report.tex").read_text().count("\\begin{table}") == 2
    assert len(draw_figures(read_results(tmp_path).settings)["accuracy_vs_tokens"].axes) == 2


def test_a_single_experiment_can_be_reported(tmp_path: Path) -> None:
    write_setting(tmp_path, [record(0, 0, 1), failed(0, 1)])
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "100.0** (one group, no interval)" in text
    only_errors = tmp_path / "errors"
    write_setting(only_errors, [failed(0, 0)])
    assert len(write_report(only_errors)) == 7


def test_a_wrong_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder with settings/"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("format_call", "text"),
    [
        (lambda: format_percent(-0.0001, sign=True), "+0.0"),
        (lambda: format_percent(float("nan")), "\N{EN DASH}"),
        (lambda: format_interval(Interval(0.5, 0.25, 0.75, 4, 2)), "50.0 [25.0, 75.0]"),
        (lambda: format_budget(0.125), "12.5%"),
        (lambda: format_budget(160), "160 tokens"),
        (lambda: format_budget("amount=0.2, of=unpadded"), "amount=0.2, of=unpadded"),
        (lambda: format_budget(None), "no budget"),
        (lambda: format_p_value(0.0004), "< 0.001"),
        (lambda: format_p_value(0.0351), "0.035"),
    ],
)
def test_numbers_are_written_as_expected(format_call: Callable[[], str], text: str) -> None:
    assert format_call() == text


def test_every_seed_of_a_method_has_its_own_row() -> None:
    seeds = [setting([], strategy="HiRED", seed=seed, factors={"reducer.selection.seed": seed}) for seed in (0, 1)]
    assert [name for name, _ in method_rows([*seeds, setting([], strategy="Random")])] == [
        "HiRED, seed 0",
        "HiRED, seed 1",
        "Random, seed 0",
    ]
    same_name = [setting([], hash="aaaaaaaa"), setting([], hash="bbbbbbbb")]
    assert [name for name, _ in method_rows(same_name)] == ["X", "X (bbbbbb)"]


def test_budgets_of_every_kind_are_reported(tmp_path: Path) -> None:
    answers = board_records(make_scores(0.5))
    settings = [
        setting(answers, hash=str(number), budget=budget)
        for number, budget in enumerate((160, 0.2, None, "amount=0.2, of=unpadded"))
    ]
    assert render_latex(settings).count("& ") > 4
    assert build_report(Results("x", settings))
    assert len(setting_rows(settings)) == 4


def test_main_prints_the_written_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_setting(tmp_path, board_records(make_scores(0.5)))
    main(str(tmp_path), str(tmp_path / "out"))
    printed = capsys.readouterr().out.split()
    assert all(Path(line).is_file() for line in printed)
    assert len(printed) == 7


def test_parquet_has_the_same_values_as_csv(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_setting(tmp_path, [record(0, 0, 1), record(1, 0, 0, answer=["36", "six"])])
    write_setting(tmp_path, [record(0, 0, 1)], budget="amount=0.2, of=unpadded")  # type: ignore[arg-type]
    names = [path.name for path in write_report(tmp_path, parquet=True)]
    assert {"settings.parquet", "records.parquet"} <= set(names)
    settings, records = (
        parquet.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("settings", "records")
    )
    assert [row["budget"] for row in settings] == ["0.1", "amount=0.2, of=unpadded"]
    assert [row["answer"] for row in records] == ["36", '["36", "six"]', "36"]
    with (tmp_path / "records.csv").open() as file:
        assert [row["score"] for row in csv.DictReader(file)] == [str(row["score"]) for row in records]


def test_parquet_without_pyarrow_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install tokenprune"):
        write_parquet(tmp_path / "x.parquet", [{"a": 1}])


def test_settings_are_compared_at_equal_compute_and_by_their_evidence(tmp_path: Path) -> None:
    costs = {"HiRED": (0.2, 0.6, 20, 10), "AtLayer(DivPrune)": ("20% from layer 2", 0.9, 60, 50)}
    costs["HiRED+FastV"] = ("40% + 50% from layer 2", 0.5, 30, 20)
    for strategy, (budget, share, tokens, flops) in costs.items():
        rows = board_records(make_scores(share), average_tokens=tokens, prefill_flops=flops, prefill_flops_full=200)
        rows = [row | {"evidence_coverage": None if row["type"] == "side" else share / 2} for row in rows]
        write_setting(tmp_path, rows, strategy, budget, factors={"reducer": strategy})
    full = board_records(make_scores(0.9), average_tokens=400, prefill_flops=200, prefill_flops_full=200)
    write_setting(tmp_path, full, "UniformStride", 1.0, "full")
    paths = write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    _, *lines = parse_table(text, "Equal compute")
    assert [line[:4] for line in lines] == [
        ["HiRED", "20%", "5.0", "20.0"],
        ["HiRED+FastV", "40% + 50% from layer 2", "10.0", "30.0"],
        ["AtLayer(DivPrune)", "20% from layer 2", "25.0", "60.0"],
        ["full tokens", "all", "100.0", "400.0"],
    ]
    assert [line[-1] for line in lines] == ["yes", "no", "yes", "no"]
    assert "accuracy_vs_flops.png" in [path.name for path in paths]
    assert "figures/accuracy_vs_flops.png" in text
    first = next(csv.DictReader((tmp_path / "settings.csv").open()))
    assert (first["average_tokens"], first["flops_share"], first["evidence_coverage"]) == ("400.0", "1.0", "")
    _, *lines = parse_table(text, "Evidence coverage")
    assert [line[0] for line in lines] == ["AtLayer(DivPrune)", "HiRED", "HiRED+FastV"]
    assert [line[1] for line in lines] == ["–", "30.0 [30.0, 30.0]", "–"]  # noqa: RUF001


def test_records_without_flops_have_no_comparison_at_equal_compute(report_folder: Path) -> None:
    text = (report_folder / "report.md").read_text()
    assert "Equal compute" not in text
    assert "Evidence coverage" not in text
    assert "accuracy_vs_flops" not in text
    setting = read_results(report_folder).settings[0]
    assert setting.average_tokens == setting.mean("kept")


def test_random_tokens_at_the_same_stages_are_the_baseline(tmp_path: Path) -> None:
    budget = "40% + 50% from layer 2"
    write_setting(tmp_path, board_records(make_scores(0.8)), "HiRED+FastV", budget, factors={})
    for strategy, share in (("Random+AtLayer(Random)", 0.5), ("Random", 0.1)):
        named = budget if "+" in strategy else 0.4
        write_setting(tmp_path, board_records(make_scores(share)), strategy, named, "baseline", factors={})
    write_report(tmp_path)
    _, *lines = parse_table((tmp_path / "report.md").read_text(), "Differences to random tokens at the same budget")
    assert [line[0] for line in lines] == ["HiRED+FastV"]
