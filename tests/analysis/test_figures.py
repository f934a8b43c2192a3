"""Colors, legends and figures of reports."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from PIL import Image

from tests.helpers.records import board_records, setting, write_setting
from tests.helpers.reports import make_scores
from tokenprune.experiments.analysis.report.figures import draw_figures
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
        containers = [
            container
            for axes in figure.axes
            for container in axes.containers
            if isinstance(container, ErrorbarContainer)
        ]
        assert len(containers) == 8  # full tokens, three grid settings, uniform stride, three seeds
        for container in containers:
            assert to_hex(container[0].get_color()).upper() == marker_colors[str(container[0].get_marker())]
        handles = {
            str(handle.get_marker()): to_hex(handle.get_color()).upper() for handle in figure.legends[0].legend_handles
        }  # type: ignore[union-attr]
        assert {marker: color for marker, color in handles.items() if marker in marker_colors} == marker_colors
    page = (report_folder / "report.html").read_text()
    dots = re.findall(r'background:(#\w{6})"></span>([^<]+)<', page)
    assert {color for color, name in dots if name.startswith("Random")} == {styles["Random"].color}
    for method, style in styles.items():
        assert {color for color, name in dots if name == method} <= {style.color}


def test_many_methods_have_different_colors() -> None:
    settings = [setting([], strategy=f"S{n}") for n in range(2 * len(PALETTE))]
    assert len({style.color for style in assign_styles(settings).values()}) == len(settings)


def test_the_legend_of_many_methods_is_outside_and_complete(tmp_path: Path) -> None:
    for number in range(14):
        factors = {"reducer.allocation": f"AllocationWithAnExceedinglyLongName{number}", "reducer.selection": "S" * 60}
        write_setting(tmp_path, board_records(make_scores(number / 20)), factors=factors)
    for figure in draw_figures(read_results(tmp_path).settings).values():
        FigureCanvasAgg(figure).draw()
        legend, canvas = figure.legends[0].get_window_extent(), figure.bbox
        assert legend.x0 >= figure.axes[0].get_window_extent().x1
        assert 0 <= legend.y0 < legend.y1 <= canvas.height
        assert legend.x1 <= canvas.width
        boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
        assert not any(box.overlaps(previous) for index, box in enumerate(boxes) for previous in boxes[:index])


def test_figures_are_images(report_folder: Path) -> None:
    for name in ("accuracy_vs_tokens", "accuracy_vs_time"):
        with Image.open(report_folder / "figures" / f"{name}.png") as image:
            assert image.width > 1000
