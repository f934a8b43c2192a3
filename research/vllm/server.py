"""Starts a vLLM server on the loopback interface, from the Python of another environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS = 600
"""Longest time for which a server may start."""


@contextmanager
def run_server(python: str, checkpoint: Path, log: Path, *options: str, plugins: str | None = None) -> Iterator[str]:
    """Run a server inside the block.

    Args:
        python: the Python of the environment with vLLM.
        checkpoint: the folder of the model.
        log: the file for the output of the server.
        options: further options of the server.
        plugins: names of the vLLM plug-ins to load; None loads all.

    Yields:
        The address of the server.

    Raises:
        RuntimeError: if the server does not start; the error holds the end of its output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", *options]
    environment = build_environment() | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=log.parent, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(url, process, log)
        yield url
    finally:
        stop_server(process)


def build_environment() -> dict[str, str]:
    """Return the environment variables of a process with vLLM on a CPU, which imports tokenprune from this checkout."""
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[2])}


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End a server with all processes that it started."""
    with suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_server(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers.

    Args:
        url: the address of the server.
        process: its process.
        log: the file with its output.

    Raises:
        RuntimeError: if the process ends, or does not answer within `START_SECONDS`.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
