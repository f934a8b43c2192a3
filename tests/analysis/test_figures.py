"""Colors, legends and figures of reports."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Text
from PIL import Image

from tests.helpers.records import board_records, setting, write_setting
from tests.helpers.reports import make_scores
from tokenprune.experiments.analysis.factors import compare_factors
from tokenprune.experiments.analysis.report.figures import MAX_COLORED, draw_effects, draw_figures, spread_labels
from tokenprune.experiments.analysis.report.style import PALETTE, assign_styles
from tokenprune.experiments.analysis.results import read_results


def test_a_method_has_one_color_in_all_figures_and_tables(report_folder: Path) -> None:
    settings = read_results(report_folder).settings
    styles = assign_styles(settings)
    assert len({(style.color, style.marker) for style in styles.values()}) == len(
        {style.color for style in styles.values()}
    )
    marker_colors = {style.marker: style.color for style in styles.values()}
    for figure in draw_figures(settings).values():
        (axes,) = figure.axes
        containers = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
        assert len(containers) == 5  # full tokens, three grid settings, uniform stride
        for container in containers:
            assert to_hex(container[0].get_color()).upper() == marker_colors[str(container[0].get_marker())]
        (band,) = (part for part in axes.collections if isinstance(part, PolyCollection))
        assert to_hex(band.get_facecolor()[0]).upper() == styles["Random"].color
        low, high = (100 * end(np.mean(make_scores(0.3 + 0.2, seed)) for seed in range(3)) for end in (min, max))
        heights = band.get_paths()[0].vertices[:, 1]
        assert {low, high} <= set(heights)
        labels = {text.get_text().replace("\n", " "): to_hex(text.get_color()).upper() for text in axes.texts}
        expected = {method: style.color for method, style in styles.items() if method != "Random"}
        assert labels == {**expected, "Random (3 seeds)": styles["Random"].color}
    page = (report_folder / "report.html").read_text()
    dots = re.findall(r'background:(#\w{6})"></span>([^<]+)<', page)
    assert {color for color, name in dots if name.startswith("Random")} == {styles["Random"].color}
    for method, style in styles.items():
        assert {color for color, name in dots if name == method} <= {style.color}


def test_many_methods_have_different_colors() -> None:
    settings = [setting([], strategy=f"S{n}") for n in range(2 * len(PALETTE))]
    assert len({style.color for style in assign_styles(settings).values()}) == len(settings)


def test_labels_of_many_methods_are_complete_and_do_not_overlap(tmp_path: Path) -> None:
    for number in range(14):
        factors = {"reducer.allocation": f"AllocationWithAnExceedinglyLongName{number}", "reducer.selection": "S" * 60}
        write_setting(tmp_path, board_records(make_scores(number / 20)), factors=factors)
    settings = read_results(tmp_path).settings
    figures = draw_figures(settings)
    for name in ("accuracy_vs_tokens", "accuracy_vs_time"):
        figure = figures[name]
        FigureCanvasAgg(figure).draw()
        overview, zoomed = figure.axes
        labels = [text for text in zoomed.texts if "below" not in text.get_text()]
        assert [f"Name{13 - n}," in text.get_text() for n, text in enumerate(reversed(labels))] == [True] * MAX_COLORED
        boxes = [Text.get_window_extent(text) for text in labels]
        assert not any(box.overlaps(previous) for index, box in enumerate(boxes) for previous in boxes[:index])
        for box in boxes:
            assert zoomed.get_window_extent().x1 <= box.x0 < box.x1 <= figure.bbox.width
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height
        (note,) = (text.get_text() for text in zoomed.texts if "below" in text.get_text())
        assert "Name0," in note
        assert overview.get_ylim()[0] < zoomed.get_ylim()[0]
    panels = [axes for axes in figures["accuracy_by_method"].axes if axes.get_visible()]
    titles = [axes.get_title().replace("\n", "") for axes in panels]
    assert [f"Name{13 - n}" in title for n, title in enumerate(titles)] == [True] * 14


def test_labels_move_apart_and_stay_inside() -> None:
    centers = spread_labels([0.0, 50.0, 51.0, 100.0], [10.0] * 4, 0.0, 100.0)
    assert centers == [5.0, 50.0, 60.0, 95.0]


def test_effects_are_drawn_per_factor(report_folder: Path) -> None:
    figure = draw_effects(compare_factors(read_results(report_folder).settings))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["allocation", "budget"]
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names[0] == f"GuidedAllocation  {100 * np.mean([make_scores(0.8), make_scores(0.9)]):.1f} %"
    assert to_hex(figure.axes[0].lines[0].get_color()) != to_hex(figure.axes[0].containers[0][0].get_color())


def test_figures_are_images(report_folder: Path) -> None:
    for name in ("accuracy_vs_tokens", "accuracy_vs_time", "effects"):
        with Image.open(report_folder / "figures" / f"{name}.png") as image:
            assert image.width > 1000
