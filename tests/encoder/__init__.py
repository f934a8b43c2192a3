"""Tests of reduction inside the vision tower."""
