"""The command `tokenprune demo`: a page in the browser to try strategies on images, served by gradio.

`choices` maps the choices of a visitor to a strategy, `links` maps them to the address of the page, and `results` maps
answers to HTML, all without gradio. `page` builds the page.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from tokenprune.cli.demo.choices import DemoConfig
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.cli.status import show_status
from tokenprune.experiments.evaluation.loading import load


def run(argv: Sequence[str]) -> None:
    """Run the command `demo` until Ctrl-C.

    Raises:
        ValueError: if gradio is not installed, or an option is not valid.
    """
    description = "Try strategies on images in the browser."
    config = select_fields(DemoConfig, parse_options(build_parser("tokenprune demo", description, DemoConfig), argv))
    with tempfile.TemporaryDirectory(prefix="tokenprune-demo-") as folder:
        page, options = prepare_page(config, folder)
        page.launch(**options)


def prepare_page(config: DemoConfig, folder: str) -> tuple[Any, dict[str, Any]]:
    """Return the page and the arguments of its `launch`.

    Args:
        config: the options of the command.
        folder: temporary folder; uploaded files are written only here.

    Raises:
        ValueError: if gradio is not installed, or the model cannot be loaded.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio

        from tokenprune.cli.demo.page import build_page
    except ImportError:
        raise ValueError('`tokenprune demo` needs gradio; install it with: pip install "tokenprune[demo]"') from None
    with show_status("loading the model"):
        page = build_page(*load(config.model, config.device, config.dtype), config)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # loads no web font
    return page, {
        "server_name": config.host,
        "server_port": config.port,
        "max_file_size": f"{config.max_megabytes}mb",
        "share": False,
        "ssr_mode": False,
        "theme": theme,
    }
