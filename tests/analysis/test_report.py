"""Reports of run directories: tables, figures and files."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from PIL import Image

from tests.helpers.records import board_records, failed, record, setting, write_setting
from tokenprune import Selection, TileGeometry
from tokenprune.experiments.analysis.report import main, write_report
from tokenprune.experiments.analysis.report.contents import contents
from tokenprune.experiments.analysis.report.failures import best_two
from tokenprune.experiments.analysis.report.figures import figures
from tokenprune.experiments.analysis.report.files import setting_rows, write_parquet
from tokenprune.experiments.analysis.report.formatting import budget_text, interval_text, number_text, p_text
from tokenprune.experiments.analysis.report.latex import latex
from tokenprune.experiments.analysis.report.rows import rows
from tokenprune.experiments.analysis.report.style import PALETTE, styles
from tokenprune.experiments.analysis.stats import Interval, Results, read
from tokenprune.experiments.evaluation.stored_images import in_record, store

BUDGETS = (0.1, 0.2)


def scores(share: float, seed: int = 0) -> list[list[float]]:
    """Return right and wrong answers of 24 boards; a larger share is right wherever a smaller one is."""
    ease = np.random.default_rng(seed).random((24, 6))
    return (ease < share).astype(float).tolist()


def run_directory(directory: Path, full: bool = True, random: bool = True) -> Path:
    """Write a small ablation whose outcome is known."""
    if full:
        write_setting(directory, board_records(scores(0.9), asked=400, kept=400), "HiRED", 1.0, "full")
    for allocation, gain in (("UniformAllocation", 0.0), ("VisualContentAllocation", 0.0), ("GuidedAllocation", 0.2)):
        for budget in BUDGETS:
            factors = {"reducer.allocation": allocation, "reducer.budget": budget}
            kept = int(400 * budget)
            write_setting(
                directory,
                board_records(scores(0.5 + gain + budget), asked=kept, kept=kept),
                factors=factors,
                budget=budget,
            )
    for budget in BUDGETS:
        write_setting(directory, board_records(scores(0.3 + budget)), "UniformStride", budget, "baseline", factors={})
        for seed in range(3 if random else 0):
            answers = board_records(scores(0.3 + budget, seed), generate_ms=5.0 + seed)
            write_setting(directory, answers, "Random", budget, "baseline", seed, factors={})
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = run_directory(tmp_path_factory.mktemp("report") / "grid")
    paths = write_report(directory)
    names = ["report.md", "report.tex", "report.html", "settings.csv", "records.csv"]
    assert [path.name for path in paths] == [*names, "accuracy_vs_tokens.png", "accuracy_vs_time.png"]
    assert all(path.stat().st_size > 100 for path in paths)
    return directory


def table(text: str, heading: str) -> list[list[str]]:
    """Return the first table under a heading of a Markdown text, its head included."""
    found = re.search(r"(^\|.*\n)+", text.split(f" {heading}\n", 1)[1], re.MULTILINE)
    assert found
    lines = [line for line in found.group().splitlines() if "---" not in line]
    return [[entry.strip() for entry in line.strip("| ").split(" | ")] for line in lines]


def test_the_main_table_is_that_of_the_records(written: Path) -> None:
    text = (written / "report.md").read_text()
    found = {line[0]: line[1:] for line in table(text, "Accuracy")}
    assert found["method"] == ["10%", "20%"]
    assert len(found) == 1 + 3 + 1 + 3  # every random seed for itself
    first = float(np.mean(scores(0.5 + 0.1)))
    assert found["HiRED, allocation=UniformAllocation"][0].startswith(f"{100 * first:.1f} [")
    assert found["HiRED, allocation=GuidedAllocation"][0].startswith("**")
    assert "Full tokens: " in text


def test_differences_are_paired_and_say_when_none_is_seen(written: Path) -> None:
    text = (written / "report.md").read_text()
    found = {line[0]: line[1:] for line in table(text, "Differences to full tokens")}
    assert found["HiRED, allocation=UniformAllocation"][-1] == "lower"
    assert found["HiRED, allocation=UniformAllocation"][2].startswith("0 / ")  # nested answers: never right alone
    head, *lines = table(text, "Differences to random tokens at the same budget")
    assert head[1:] == ["minus Random, seed 0", "minus Random, seed 1", "minus Random, seed 2"]
    stride = next(line for line in lines if line[0] == "UniformStride")
    assert stride[1] == "+0.0 [+0.0, +0.0] p = 1.000, no difference seen"  # the same answers as seed 0
    assert not any(line[0].startswith("Random") for line in lines)


def test_factor_levels_say_who_wins_and_who_does_not(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "**GuidedAllocation wins**" in text
    assert "**0.2 wins**" in text
    directory = written.parent / "tie"
    for allocation in ("UniformAllocation", "VisualContentAllocation"):
        write_setting(directory, board_records(scores(0.5)), factors={"reducer.allocation": allocation})
    write_report(directory)
    assert "**No winner**: the intervals separate" in (directory / "report.md").read_text()


def test_types_splits_tokens_and_errors_are_there(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert table(text, "Accuracy: by type of question")[0] == ["at 10%", "number (n = 72)", "side (n = 72)"]
    assert table(text, "Accuracy: by split")[0][1:] == ["tiles (n = 144)"]
    tokens = {tuple(line[:2]): line[2:5] for line in table(text, "Tokens and time")}
    assert tokens["HiRED, allocation=GuidedAllocation", "20%"] == ["80.0", "80.0", "100.0"]
    assert tokens["full tokens", "all"] == ["400.0", "400.0", "100.0"]
    assert "No sample ended in an error." in text


def test_errors_are_counted_and_quoted(tmp_path: Path) -> None:
    write_setting(tmp_path, [*board_records([[1], [1]]), failed(2, 0), failed(2, 1, "other\n`x`"), failed(3, 0)])
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| 3 of 5 | 2 | `CUDA \\| out of memory` |" in text
    assert "<code>CUDA | out of memory</code>" in (tmp_path / "report.html").read_text()


def test_the_html_needs_no_other_file(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert re.findall(r'src="([^"]{0,22})', text) == ["data:image/png;base64,"] * 2
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert str(written.parent) not in text
    assert text.count("<table") == text.count("</table>") > 5


def test_what_records_hold_is_escaped(tmp_path: Path) -> None:
    write_setting(tmp_path, [*board_records([[1], [1]]), failed(2, 0, "<script>alert(1)</script>")], "A<b>_&%")
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text
    assert "A&lt;b&gt;_&amp;%" in text
    assert "A<b>\\_\\&\\% &" in (tmp_path / "report.tex").read_text()


def test_the_csv_files_hold_every_setting_and_record(written: Path) -> None:
    with (written / "settings.csv").open() as file:
        settings = list(csv.DictReader(file))
    with (written / "records.csv").open() as file:
        records = list(csv.DictReader(file))
    assert (len(settings), len(records)) == (15, 15 * 144)
    guided = next(c for c in settings if "Guided" in c["method"] and c["budget"] == "0.1")
    assert float(guided["mean"]) == pytest.approx(np.mean(scores(0.8)))
    assert float(guided["minus_full"]) == pytest.approx(np.mean(scores(0.8)) - np.mean(scores(0.9)))
    assert guided["minus_random_2_n"] == "144"
    assert guided["factor.reducer.allocation"] == "GuidedAllocation"
    assert next(c for c in settings if c["role"] == "full")["minus_full"] == ""
    assert records[0]["kept_per_tile"] == "[10, 10, 20]"


def test_the_latex_table_is_complete(written: Path) -> None:
    text = (written / "report.tex").read_text()
    for mark in ("\\toprule", "\\midrule", "\\bottomrule", "booktabs", "10\\%"):
        assert mark in text
    lines = [line for line in text.split("\n") if line.endswith("\\\\")]
    assert all(line.count(" & ") == 2 or "multicolumn{2}" in line for line in lines)
    assert text.count("{") == text.count("}")


def test_missing_baselines_are_left_out_and_said(tmp_path: Path) -> None:
    write_report(run_directory(tmp_path, full=False, random=False), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "differences to full tokens are left out" in text
    assert "differences to random tokens are left out" in text
    assert "## Differences" not in text
    head = (tmp_path / "out" / "settings.csv").read_text().split("\n")[0]
    assert "minus_" not in head
    assert not (tmp_path / "report.md").exists()


def test_random_tokens_can_lack_at_one_budget(tmp_path: Path) -> None:
    write_setting(tmp_path, board_records(scores(0.5)))
    write_setting(tmp_path, board_records(scores(0.6)), budget=0.2)
    write_setting(tmp_path, board_records(scores(0.6)), "Random", 0.2, "baseline", seed=1)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "No random tokens at 10%" in text
    assert table(text, "Differences to random tokens at the same budget")[0] == ["at 20%", "minus Random, seed 1"]


def test_unequal_samples_and_few_groups_are_said(tmp_path: Path) -> None:
    write_setting(tmp_path, board_records([[1, 1], [0, 1]]), role="full", budget=1.0)
    write_setting(tmp_path, [*board_records([[1, 1]]), record(1, 0, 1)], tail='{"sample": "bo')
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Not every experiment holds all 4 samples: HiRED, budget=0.1: 3." in text
    assert "2 groups only" in text
    assert "cut off" in text
    assert table(text, "Differences to full tokens")[1][1] == "3"


def test_models_and_tasks_are_never_mixed(tmp_path: Path) -> None:
    for model, share in (("a", 0.9), ("b", 0.3)):
        write_setting(tmp_path, board_records(scores(share)), role="full", budget=1.0, model=model)
        write_setting(
            tmp_path, board_records(scores(share)), model=model, factors={"model": model, "reducer.budget": 0.1}
        )
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("+0.0 [+0.0, +0.0]") == 2  # each against its own full tokens
    assert "## a, Boards(number=2)\n" in text
    assert "**a wins**" in text
    assert (tmp_path / "report.tex").read_text().count("\\begin{table}") == 2
    assert len(figures(read(tmp_path).settings)["accuracy_vs_tokens"].axes) == 2


def test_one_experiment_alone_can_be_reported(tmp_path: Path) -> None:
    write_setting(tmp_path, [record(0, 0, 1), failed(0, 1)])
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "100.0** (one group, no interval)" in text
    only_errors = tmp_path / "errors"
    write_setting(only_errors, [failed(0, 0)])
    assert len(write_report(only_errors)) == 7


def test_a_wrong_directory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder with settings/"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# --- failures ---------------------------------------------------------------------------------------------------------


def stored(board: int, question: int, score: float, tokens: Sequence[int], **more: Any) -> dict[str, Any]:
    """Return a record with kept tokens of two tiles of 2 x 2 tokens."""
    kept = torch.zeros(2, 4, dtype=torch.bool)
    kept.view(-1)[list(tokens)] = True
    geometry = TileGeometry.anyres((40, 40), (1, 1), (2, 2), 40)
    selection = in_record(Selection(geometry, kept, len(tokens)))
    return record(board, question, score, **more) | {"stored_image": f"images/{board}.png", "selection": selection}


def two_that_fail(directory: Path) -> Path:
    """Write an ablation in which each of two settings fails where the other does not, with images."""
    rights = {"HiRED": [1, 1, 0, 1, 0], "SCOPE": [0, 1, 1, 1, 0], "UniformStride": [1, 0, 0, 0, 0]}
    write_setting(directory, [record(b, 0, score) for b, score in enumerate([1, 1, 1, 1, 0])], role="full", budget=1.0)
    for number, (name, scores) in enumerate(rights.items()):
        role = "baseline" if name == "UniformStride" else "grid"
        for budget in (0.2, 0.05):
            rows = [stored(b, 0, score, [number, 4 + number]) for b, score in enumerate(scores)]
            write_setting(directory, rows, name, budget, role)
    for board in range(5):
        pixels = torch.arange(2 * 40 * 40 * 3).view(2, 40, 40, 3).remainder(251).to(torch.uint8)
        assert store(directory, f"images/{board}", pixels) == f"images/{board}.png"
    return directory


def test_failures_stand_side_by_side_with_what_was_kept(tmp_path: Path) -> None:
    paths = write_report(two_that_fail(tmp_path))
    text = (tmp_path / "report.md").read_text()
    part = text.split("## Failures side by side")[1]
    assert "**HiRED at 5%** and **SCOPE at 5%**, the best two at the smallest budget: of 5 samples" in part
    assert "only the first has 1 right, only the second 1" in part
    assert part.count("### What number is on the red star?") == 2
    head, images, captions = table(text, "Failures side by side")
    assert head == ["the image", "HiRED", "SCOPE"]
    assert captions[1:] == ["right: `36`; 40 tokens kept", "**wrong**: `17`; 40 tokens kept"]
    files = [path for path in paths if path.name.startswith("failure-")]
    assert [f"![{name}](figures/{file.name})" for name, file in zip(head, files[:3], strict=True)] == images
    kept = [(np.asarray(Image.open(file)) == [0xD5, 0x5E, 0x00]).all(axis=-1) for file in files[1:3]]
    assert all(one.any() for one in kept)
    assert (kept[0] != kept[1]).any()  # each its own tokens
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + 3 * 2


def test_any_two_settings_can_be_compared(tmp_path: Path) -> None:
    two_that_fail(tmp_path)
    write_report(tmp_path, compare=["HiRED, budget=0.2", "000000000005"])
    text = (tmp_path / "report.md").read_text()
    assert "**HiRED at 20%** and **UniformStride at 20%**, as asked for" in text
    write_report(tmp_path, compare=["HiRED, budget=0.2", "SCOPE, budget=0.05"])
    assert len(list((tmp_path / "figures").glob("failure-*.png"))) == 6  # none of the last report is left
    with pytest.raises(ValueError, match=r"no setting is called 'SCOPE, budget=0.5'. Did you mean 'SCOPE, budget=0."):
        write_report(tmp_path, compare=["HiRED, budget=0.2", "SCOPE, budget=0.5"])
    with pytest.raises(ValueError, match="are the same setting"):
        write_report(tmp_path, compare=["HiRED, budget=0.2", "HiRED, budget=0.2"])


def test_records_without_images_give_failures_in_words(tmp_path: Path, written: Path) -> None:
    part = (written / "report.md").read_text().split("## Failures side by side")[1]
    assert "Their records hold no kept tokens, so they stand in words only." in part
    assert "Expected: `36`. Full tokens: `36`." in part
    assert "**wrong**: `17`" in part
    assert "failure-" not in part
    two_that_fail(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    write_report(tmp_path)
    assert "not in the folder `images`" in (tmp_path / "report.md").read_text()


def test_settings_that_answer_alike_are_passed_over() -> None:
    alike = [setting(board_records([[1], [1], [0]]), hash=str(n), role="grid") for n in range(2)]
    other = setting(board_records([[0], [1], [1]]), hash="2", role="grid")
    found = best_two([*alike, other])
    assert found is not None
    assert [one.hash for one in found[:2]] == ["0", "2"]
    assert found[2].endswith("(1 between them answers like the best)")
    assert best_two([other]) is None


# --- looks ------------------------------------------------------------------------------------------------------------


def test_a_method_has_one_color_in_all_figures_and_tables(written: Path) -> None:
    settings = read(written).settings
    looks = styles(settings)
    assert len({(style.color, style.marker) for style in looks.values()}) == len({s.color for s in looks.values()})
    marked = {style.marker: style.color for style in looks.values()}
    for figure in figures(settings).values():
        drawn = [one for axes in figure.axes for one in axes.containers if isinstance(one, ErrorbarContainer)]
        assert len(drawn) == 8  # full, three of the grid, uniform stride, three seeds
        for one in drawn:
            assert to_hex(one[0].get_color()).upper() == marked[str(one[0].get_marker())]
        handles = {str(h.get_marker()): to_hex(h.get_color()).upper() for h in figure.legends[0].legend_handles}  # type: ignore[union-attr]
        assert {marker: color for marker, color in handles.items() if marker in marked} == marked
    page = (written / "report.html").read_text()
    dots = re.findall(r'background:(#\w{6})"></span>([^<]+)<', page)
    assert {color for color, name in dots if name.startswith("Random")} == {looks["Random"].color}
    for method, style in looks.items():
        assert {color for color, name in dots if name == method} <= {style.color}


def test_many_methods_keep_colors_of_their_own() -> None:
    settings = [setting([], strategy=f"S{n}") for n in range(2 * len(PALETTE))]
    assert len({style.color for style in styles(settings).values()}) == len(settings)


def test_the_legend_of_many_methods_lies_outside_and_is_whole(tmp_path: Path) -> None:
    for number in range(14):
        factors = {"reducer.allocation": f"AllocationWithAnExceedinglyLongName{number}", "reducer.selection": "S" * 60}
        write_setting(tmp_path, board_records(scores(number / 20)), factors=factors)
    for figure in figures(read(tmp_path).settings).values():
        FigureCanvasAgg(figure).draw()
        legend, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert legend.x0 >= figure.axes[0].get_window_extent().x1
        assert 0 <= legend.y0 < legend.y1 <= whole.height
        assert legend.x1 <= whole.width
        boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
        assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_figures_are_images(written: Path) -> None:
    for name in ("accuracy_vs_tokens", "accuracy_vs_time"):
        with Image.open(written / "figures" / f"{name}.png") as image:
            assert image.width > 1000


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: number_text(-0.0001, sign=True), "+0.0"),
        (lambda: number_text(float("nan")), "\N{EN DASH}"),
        (lambda: interval_text(Interval(0.5, 0.25, 0.75, 4, 2)), "50.0 [25.0, 75.0]"),
        (lambda: budget_text(0.125), "12.5%"),
        (lambda: budget_text(160), "160 tokens"),
        (lambda: budget_text("amount=0.2, of=unpadded"), "amount=0.2, of=unpadded"),
        (lambda: budget_text(None), "no budget"),
        (lambda: p_text(0.0004), "< 0.001"),
        (lambda: p_text(0.0351), "0.035"),
    ],
)
def test_numbers_are_written_as_expected(make: Callable[[], str], text: str) -> None:
    assert make() == text


def test_seeds_of_a_method_are_rows_of_their_own() -> None:
    seeds = [setting([], strategy="HiRED", seed=seed, factors={"reducer.selection.seed": seed}) for seed in (0, 1)]
    assert [name for name, _ in rows([*seeds, setting([], strategy="Random")])] == [
        "HiRED, seed 0",
        "HiRED, seed 1",
        "Random, seed 0",
    ]
    twice = [setting([], hash="aaaaaaaa"), setting([], hash="bbbbbbbb")]
    assert [name for name, _ in rows(twice)] == ["X", "X (bbbbbb)"]


def test_budgets_of_every_kind_are_reported(tmp_path: Path) -> None:
    answers = board_records(scores(0.5))
    settings = [
        setting(answers, hash=str(n), budget=b) for n, b in enumerate((160, 0.2, None, "amount=0.2, of=unpadded"))
    ]
    assert latex(settings).count("& ") > 4
    assert contents(Results("x", settings))
    assert len(setting_rows(settings)) == 4


def test_main_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_setting(tmp_path, board_records(scores(0.5)))
    main(str(tmp_path), str(tmp_path / "out"))
    printed = capsys.readouterr().out.split()
    assert all(Path(line).is_file() for line in printed)
    assert len(printed) == 7


def test_parquet_holds_what_csv_holds(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_setting(tmp_path, [record(0, 0, 1), record(1, 0, 0, answer=["36", "six"])])
    write_setting(tmp_path, [record(0, 0, 1)], budget="amount=0.2, of=unpadded")  # type: ignore[arg-type]
    names = [path.name for path in write_report(tmp_path, parquet=True)]
    assert {"settings.parquet", "records.parquet"} <= set(names)
    settings, records = (
        parquet.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("settings", "records")
    )
    assert [one["budget"] for one in settings] == ["0.1", "amount=0.2, of=unpadded"]
    assert [one["answer"] for one in records] == ["36", '["36", "six"]', "36"]
    with (tmp_path / "records.csv").open() as file:
        assert [one["score"] for one in csv.DictReader(file)] == [str(one["score"]) for one in records]


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install tokenprune"):
        write_parquet(tmp_path / "x.parquet", [{"a": 1}])
