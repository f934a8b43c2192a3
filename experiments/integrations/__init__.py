"""Integrations with other evaluation tools."""
