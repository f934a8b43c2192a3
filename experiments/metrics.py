"""The earlier place of `tokenprune.experiments.evaluation.metrics`, which published scripts import."""

from tokenprune.experiments.evaluation.metrics import METRICS, vqa_accuracy

__all__ = ["METRICS", "vqa_accuracy"]
