"""What inference costs, phase by phase: plain transformers and reducers in turns, on one machine and in one run."""
