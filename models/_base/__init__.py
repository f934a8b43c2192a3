"""Base classes of the adapters, one per kind of layout, and the functions that they share."""
