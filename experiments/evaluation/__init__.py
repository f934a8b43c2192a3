"""Evaluation: experiments, grids, tasks, metrics, and their records."""
