"""A task of lmms-eval, a file of strategies, and a function that reads the score of a run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

NUMBER = 10
TASK = """
task: boards_local
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: generate_until
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: [{{version: 0.0}}]
"""
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, answers):
    return {"exact_match": float(answers[0].strip() == doc["answer"])}
"""
STRATEGIES = """
from dataclasses import dataclass
import os
from tokenprune import ScoreReducer

@dataclass
class Loudest(ScoreReducer):
    '''Keeps the tokens with the largest feature norm.'''
    sign: int = 1

    def score(self, image):
        return self.sign * image.features.float().norm(dim=-1)

@dataclass
class Broken(ScoreReducer):
    '''Fails, in one process or in all.'''
    rank: str = "all"

    def score(self, image):
        if self.rank in ("all", os.environ.get("RANK")):
            raise ZeroDivisionError("this was planned")
        return image.features.float().norm(dim=-1)
"""
ONE_PROCESS: tuple[str, ...] = ()
Evaluate = Callable[..., SimpleNamespace]


def score(run: SimpleNamespace) -> float:
    """Return the accuracy of a run of lmms-eval."""
    assert run.results is not None, run.text[-3000:]
    return float(run.results["results"]["boards_local"]["exact_match,none"])
