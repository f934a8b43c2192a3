"""Analysis of records: statistics and reports."""
