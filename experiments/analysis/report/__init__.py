"""Tables and figures of a run directory, from its records alone.

Run it: ``tokenprune report DIR``, or ``python -m tokenprune.experiments.analysis.report --directory DIR``

Writes report.md, report.tex (the main table), report.html (one file that needs no other), settings.csv, records.csv and
the figures; Parquet files on request. Nothing is measured again. Explanation: ``docs/explanation/statistics.md``.

`contents` says what stands in a report as a list of blocks; `markdown` and `page` give it a form. `tables`, `effects`,
`failures` and `figures` make its parts.
"""

from tokenprune.experiments.analysis.report.write import main, write_report

__all__ = ["main", "write_report"]
