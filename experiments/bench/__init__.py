"""Measures the cost of inference by phase: plain transformers and reducers in turns, on one machine and in one run."""
