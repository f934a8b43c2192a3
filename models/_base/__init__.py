"""Base classes of the adapters, one module per layout of visual tokens."""
