"""Weights & Biases: tracking, publishing and sweeps."""
