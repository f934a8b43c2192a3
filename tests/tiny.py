"""The earlier place of `tokenprune.testing.tiny_models`, which published scripts import."""

from tokenprune.testing.tiny_models import batch, tiny_model, tiny_processor

__all__ = ["batch", "tiny_model", "tiny_processor"]
