"""Counts the cost of a model on the meta device without running it, and predicts times for a table of devices."""
