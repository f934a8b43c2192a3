"""Tools for authors of strategies and adapters: the conformance checks."""
