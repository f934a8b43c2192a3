"""The number of Python calls of a reduction: what is counted, and the printed table."""

from __future__ import annotations

import pytest

from research import python_calls


def test_calls_of_python_and_c_are_counted() -> None:
    def call_twice(text: str) -> int:
        return len(text) + len(text)

    counts = python_calls.count_calls(call_twice, "ab")
    assert counts["~", "<built-in method builtins.len>"] == 2
    assert counts[__file__, "call_twice"] == 1
    assert counts.total() == 5  # the function, its caller, and the end of the profiler


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    python_calls.main(images=[1], most_frequent=3)
    head, _, row, *_, frequent = capsys.readouterr().out.splitlines()
    assert head.startswith("| images | calls |")
    images, calls, own, plain = (int(cell.replace(",", "")) for cell in row.strip("| ").split(" | "))
    assert images == 1
    assert 0 < own < calls
    assert 0 < plain < calls
    assert frequent.startswith("1 image: ")
    assert frequent.count(", ") == 2
