"""Reports of a run directory: tables and figures from the stored records.

Run it: ``tokenprune report DIR``, or ``python -m tokenprune.experiments.analysis.report --directory DIR``

Writes report.md, report.tex (the main table), report.html (a self-contained file), settings.csv, records.csv and the
figures, and Parquet files on request. No model runs. Explanation: ``docs/explanation/statistics.md``.

`contents` builds a report as a list of blocks; `markdown` and `html` render the blocks. `terminal` prints the main
table. `tables`, `effects`, `failures` and `figures` build the parts of a report.
"""

from tokenprune.experiments.analysis.report.terminal import print_results
from tokenprune.experiments.analysis.report.write import main, write_report

__all__ = ["main", "print_results", "write_report"]
