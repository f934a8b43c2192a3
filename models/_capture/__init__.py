"""Captures signals while a vision tower runs, and truncates the tower; `README.md` explains the design."""
