"""The plug-in in the command line of an installed lmms-eval."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.lmms_task import NUMBER, Evaluate, score

pytestmark = pytest.mark.lmms
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")


@pytest.mark.parametrize("options", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_all_tokens_give_the_answers_of_the_plain_wrapper(evaluate: Evaluate, options: tuple[str, ...]) -> None:
    plain = evaluate("llava_hf", "device_map=cpu", "--device", "cpu", *options)
    pruned = evaluate("tokenprune", "budget=1.0", *options)
    assert len(plain.answers) == NUMBER
    assert pruned.answers == plain.answers
    assert score(pruned) == score(plain) >= 0.8  # the model is trained, so equal answers are no coincidence
    tokens = pruned.results["throughput"]
    assert tokens["avg_tokens_kept"] == tokens["avg_tokens_valid"]
    assert tokens["avg_prompt_length"] == tokens["avg_prompt_length_full"]


@pytest.mark.parametrize("options", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_a_budget_reduces_tokens_and_changes_answers(evaluate: Evaluate, options: tuple[str, ...]) -> None:
    full = evaluate("tokenprune", "budget=1.0", *options).results["throughput"]
    fifth = evaluate("tokenprune", "reducer=HiRED,budget=0.2", *options)
    tokens = fifth.results["throughput"]
    assert tokens["avg_tokens_kept"] == tokens["avg_tokens_asked"] < full["avg_tokens_kept"] / 2
    assert tokens["avg_prompt_length"] < tokens["avg_prompt_length_full"] == full["avg_prompt_length"]
    nothing = evaluate("tokenprune", "budget=0", *options)
    assert nothing.results["throughput"]["avg_tokens_kept"] == 0
    assert nothing.answers != evaluate("tokenprune", "budget=1.0", *options).answers
    assert score(nothing) < score(fifth)


def test_parameters_and_custom_strategies_by_model_args(evaluate: Evaluate) -> None:
    loud = evaluate("tokenprune", "reducer=mine.py:Loudest,budget=8,reducer.sign=1")
    quiet = evaluate("tokenprune", "reducer=mine.py:Loudest,budget=8,reducer.sign=-1")
    assert loud.results["throughput"]["avg_tokens_kept"] == quiet.results["throughput"]["avg_tokens_kept"] == 8
    assert loud.answers != quiet.answers


def test_a_strategy_that_reads_the_question(evaluate: Evaluate) -> None:
    run = evaluate("tokenprune", "reducer=CDPruner,reducer.text_model=mini,budget=0.2")
    assert len(run.answers) == NUMBER
    assert run.results["throughput"]["avg_tokens_kept"] == run.results["throughput"]["avg_tokens_asked"]


@pytest.mark.parametrize("options", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_an_error_of_a_strategy_is_reported(evaluate: Evaluate, options: tuple[str, ...]) -> None:
    failed = evaluate("tokenprune", "reducer=mine.py:Broken", *options)
    assert failed.results is None
    assert failed.answers is None
    assert "RuntimeError: generate failed, and nothing was scored: ZeroDivisionError: this was planned" in failed.text
    assert "0/10" in failed.text  # the run stops at the first question
    assert "1/10" not in failed.text
    assert evaluate("tokenprune", "reducer=mine.py:Broken", "--verbosity", "DEBUG", *options).code != 0


def test_wrong_arguments_are_refused(evaluate: Evaluate) -> None:
    wrong = evaluate("tokenprune", "reducer=HiRED,reducer.selektion=TopAttentionSelection")
    assert wrong.results is None
    assert "ValueError: --model_args: " in wrong.text
    assert "there is no parameter 'selektion' of HiRED (did you mean selection?)" in wrong.text


def test_the_response_cache_is_used_only_for_the_same_budget(evaluate: Evaluate, folder: Path) -> None:
    cache = ("--use_cache", str(folder / "cache"))
    first = evaluate("tokenprune", "budget=0.2", *cache)
    second = evaluate("tokenprune", "budget=0.2", *cache)
    smaller_budget = evaluate("tokenprune", "budget=0.1", *cache)
    assert "tokens asked" in first.text
    assert f"all {NUMBER} requests served from cache" in second.text
    assert "tokens asked" not in second.text
    assert second.answers == first.answers
    assert "served from cache" not in smaller_budget.text
    assert f"{NUMBER} images" in smaller_budget.text


@pytest.mark.parametrize("budget", ["1.0", "0.1"])
def test_two_processes_give_the_same_as_one(evaluate: Evaluate, budget: str) -> None:
    single = evaluate("tokenprune", f"budget={budget}")
    distributed = evaluate("tokenprune", f"budget={budget}", launcher=TWO_PROCESSES)
    assert distributed.answers is not None, distributed.text[-3000:]
    assert distributed.answers == single.answers
    assert score(distributed) == score(single)
    for rank in (0, 1):
        assert f"tokenprune: rank {rank}: {NUMBER // 2} images" in distributed.text


def test_an_error_in_one_of_two_processes_is_reported(evaluate: Evaluate) -> None:
    failed = evaluate("tokenprune", "reducer=mine.py:Broken,reducer.rank=1", launcher=TWO_PROCESSES)
    assert failed.results is None
    assert "ZeroDivisionError: this was planned" in failed.text


def test_accelerate_launch_gives_the_same(evaluate: Evaluate) -> None:
    """Without a GPU, `accelerate launch` ignores the requested number and starts one process."""
    single = evaluate("tokenprune", "budget=0.1")
    launched = evaluate("tokenprune", "budget=0.1", launcher=ACCELERATE)
    assert launched.answers is not None, launched.text[-3000:]
    assert launched.answers == single.answers
    assert score(launched) == score(single)
    assert f"tokenprune: rank 0: {NUMBER} images" in launched.text


def test_results_reach_wandb_offline(evaluate: Evaluate, folder: Path) -> None:
    run = evaluate("tokenprune", "budget=0.1", "--wandb_args", "project=tokenprune,job_type=eval")
    assert run.results is not None, run.text[-3000:]
    assert "Logging to Weights and Biases failed" not in run.text
    logged = b"".join(file.read_bytes() for file in folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert b"boards_local/exact_match" in logged
