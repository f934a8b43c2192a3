"""Runs experiments and grids on tasks, scores the answers, and stores their records."""
