"""Integrations with evaluation tools outside this package."""
