"""Reduction inside the vision tower: the patches that remain at a layer, as pure tensor functions."""
