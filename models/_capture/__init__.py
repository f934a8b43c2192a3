"""Capture of signals while a vision tower runs."""
