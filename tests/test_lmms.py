"""The lmms-eval plug-in, run by the real lmms-eval. `tests/lmms_env.sh` makes an environment for these tests."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenprune.experiments.tasks import Boards
from tokenprune.models import mini

pytestmark = pytest.mark.lmms

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
ONE: tuple[str, ...] = ()
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2")

Evaluate = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of ten questions about boards, and a file of strategies."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed")
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "task").mkdir()
    lines = []
    # Every fifth: several boards, so that pictures of different shapes are there.
    for number, sample in enumerate(list(Boards(number=4).samples())[::5][:NUMBER]):
        sample.picture().save(folder / f"{number}.png")
        line = {"image": str(folder / f"{number}.png"), "question": sample.question, "answer": sample.answers[0]}
        lines.append(json.dumps(line))
    assert len(lines) == NUMBER
    (folder / "questions.jsonl").write_text("\n".join(lines))
    (folder / "task" / "boards_local.yaml").write_text(TASK.format(data=folder / "questions.jsonl"))
    (folder / "task" / "utils.py").write_text(UTILS)
    (folder / "mine.py").write_text(STRATEGIES)
    return folder


@pytest.fixture(scope="module")
def evaluate(folder: Path) -> Evaluate:
    """Run the command line of lmms-eval as a user does; a run that was made already is not made again."""
    done: dict[Any, SimpleNamespace] = {}
    numbers = itertools.count()

    def run(model: str, arguments: str, *options: str, launcher: tuple[str, ...] = ONE) -> SimpleNamespace:
        key = (model, arguments, options, launcher)
        if key in done and "--use_cache" not in options:
            return done[key]
        out = folder / f"out{next(numbers)}"
        words = [*launcher, "-m", "lmms_eval", "--model", model, "--tasks", "boards_local", "--log_samples", *options]
        words += ["--model_args", f"pretrained={mini.path()},dtype=float32,{arguments}"]
        words += ["--include_path", str(folder / "task"), "--output_path", str(out)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "ACCELERATE_USE_CPU": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=200
        )
        result = SimpleNamespace(code=ended.returncode, text=ended.stdout + ended.stderr, answers=None, results=None)
        for file in out.rglob("*_results.json"):  # the exit code says nothing, this file does
            result.results = json.loads(file.read_text())
        for file in out.rglob("*_samples_*.jsonl"):
            samples = [json.loads(line) for line in file.read_text().splitlines()]
            result.answers = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
        done[key] = result
        return result

    return run


def score(run: SimpleNamespace) -> float:
    assert run.results is not None, run.text[-3000:]
    return float(run.results["results"]["boards_local"]["exact_match,none"])


@pytest.mark.parametrize("options", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_all_tokens_are_the_plain_wrapper(evaluate: Evaluate, options: tuple[str, ...]) -> None:
    plain = evaluate("llava_hf", "device_map=cpu", "--device", "cpu", *options)
    pruned = evaluate("tokenprune", "budget=1.0", *options)
    assert len(plain.answers) == NUMBER
    assert pruned.answers == plain.answers
    assert score(pruned) == score(plain) >= 0.8  # a trained model: the comparison is not of noise with noise
    tokens = pruned.results["throughput"]
    assert tokens["avg_tokens_kept"] == tokens["avg_tokens_valid"]
    assert tokens["avg_prompt_length"] == tokens["avg_prompt_length_full"]


@pytest.mark.parametrize("options", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_a_budget_is_kept_and_matters(evaluate: Evaluate, options: tuple[str, ...]) -> None:
    full = evaluate("tokenprune", "budget=1.0", *options).results["throughput"]
    fifth = evaluate("tokenprune", "reducer=HiRED,budget=0.2", *options)
    tokens = fifth.results["throughput"]
    assert tokens["avg_tokens_kept"] == tokens["avg_tokens_asked"] < full["avg_tokens_kept"] / 2
    assert tokens["avg_prompt_length"] < tokens["avg_prompt_length_full"] == full["avg_prompt_length"]
    nothing = evaluate("tokenprune", "budget=0", *options)
    assert nothing.results["throughput"]["avg_tokens_kept"] == 0
    assert nothing.answers != evaluate("tokenprune", "budget=1.0", *options).answers
    assert score(nothing) < score(fifth)


def test_parameters_and_own_strategies_by_model_args(evaluate: Evaluate) -> None:
    loud = evaluate("tokenprune", "reducer=mine.py:Loudest,budget=8,reducer.sign=1")
    quiet = evaluate("tokenprune", "reducer=mine.py:Loudest,budget=8,reducer.sign=-1")
    assert loud.results["throughput"]["avg_tokens_kept"] == quiet.results["throughput"]["avg_tokens_kept"] == 8
    assert loud.answers != quiet.answers


def test_a_strategy_that_reads_the_question(evaluate: Evaluate) -> None:
    run = evaluate("tokenprune", "reducer=CDPruner,reducer.text_model=mini,budget=0.2")
    assert len(run.answers) == NUMBER
    assert run.results["throughput"]["avg_tokens_kept"] == run.results["throughput"]["avg_tokens_asked"]


@pytest.mark.parametrize("options", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_an_error_of_a_strategy_surfaces(evaluate: Evaluate, options: tuple[str, ...]) -> None:
    failed = evaluate("tokenprune", "reducer=mine.py:Broken", *options)
    assert failed.results is None
    assert failed.answers is None
    assert "RuntimeError: generate failed, and nothing was scored: ZeroDivisionError: this was planned" in failed.text
    assert "0/10" in failed.text  # at once, not after all questions
    assert "1/10" not in failed.text
    assert evaluate("tokenprune", "reducer=mine.py:Broken", "--verbosity", "DEBUG", *options).code != 0


def test_wrong_arguments_are_answered(evaluate: Evaluate) -> None:
    wrong = evaluate("tokenprune", "reducer=HiRED,reducer.selektion=TopAttention")
    assert wrong.results is None
    assert "ValueError: --model_args: " in wrong.text
    assert "there is no parameter 'selektion' of HiRED (did you mean selection?)" in wrong.text


def test_the_response_cache_hits_for_the_same_budget_alone(evaluate: Evaluate, folder: Path) -> None:
    cache = ("--use_cache", str(folder / "cache"))
    first = evaluate("tokenprune", "budget=0.2", *cache)
    second = evaluate("tokenprune", "budget=0.2", *cache)
    other = evaluate("tokenprune", "budget=0.1", *cache)
    assert "tokens asked" in first.text
    assert f"all {NUMBER} requests served from cache" in second.text
    assert "tokens asked" not in second.text
    assert second.answers == first.answers
    assert "served from cache" not in other.text
    assert f"{NUMBER} image(s)" in other.text


@pytest.mark.parametrize("budget", ["1.0", "0.1"])
def test_two_processes_are_one(evaluate: Evaluate, budget: str) -> None:
    one = evaluate("tokenprune", f"budget={budget}")
    two = evaluate("tokenprune", f"budget={budget}", launcher=TWO)
    assert two.answers is not None, two.text[-3000:]
    assert two.answers == one.answers
    assert score(two) == score(one)
    for rank in (0, 1):
        assert f"tokenprune: rank {rank}: {NUMBER // 2} image(s)" in two.text


def test_an_error_in_one_of_two_processes_surfaces(evaluate: Evaluate) -> None:
    failed = evaluate("tokenprune", "reducer=mine.py:Broken,reducer.rank=1", launcher=TWO)
    assert failed.results is None
    assert "ZeroDivisionError: this was planned" in failed.text


def arguments(text: str) -> dict[str, Any]:
    """Model arguments as lmms-eval's own parser hands them over."""
    from lmms_eval.utils import simple_parse_args_string

    found: dict[str, Any] = simple_parse_args_string(text)
    return found


@pytest.fixture
def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the plug-in, and the folder of the strategies as the current one."""
    from tokenprune.experiments.lmms import model

    monkeypatch.chdir(folder)
    return model


def test_model_args_say_what_the_command_line_says(plugin: Any) -> None:
    from tokenprune import Budget
    from tokenprune.strategies import HiRED
    from tokenprune.strategies.components import RandomSelection, TopAttention, VisualContentAllocation

    for text, expected in {
        "reducer=hired,reducer.budget=0.1": HiRED(0.1),
        "reducer=HiRED.release,reducer.budget=160": HiRED.release(160),
        "reducer=HiRED,reducer.budget=1.0": HiRED(1.0),
        "reducer=HiRED,reducer.selection.layer=-2": HiRED(selection=TopAttention(layer=-2)),
        "reducer=HiRED,reducer.allocation.layer=[0,-1]": HiRED(allocation=VisualContentAllocation(layer=[0, -1])),
        "reducer.selection.seed=3,reducer=HiRED,reducer.selection=random-selection": HiRED(
            selection=RandomSelection(seed=3)
        ),
        'reducer={"class_path": "HiRED", "init_args": {"budget": {"amount": 0.25, "of": "unpadded"}}}': HiRED(
            Budget(0.25, of="unpadded")
        ),
    }.items():
        found = plugin.reducer_of(arguments(text))
        assert found == expected, text
        assert repr(found) == repr(expected), text  # 1 == 1.0, but a count is no ratio


def test_a_fingerprint_names_parameters_and_code(plugin: Any, folder: Path) -> None:
    first = plugin.fingerprint_of(plugin.reducer_of({"reducer": "HiRED", "reducer.budget": 0.2}))
    assert first == plugin.fingerprint_of(plugin.reducer_of({"reducer.budget": 0.2, "reducer": "hired"}))
    assert first != plugin.fingerprint_of(plugin.reducer_of({"reducer": "HiRED", "reducer.budget": 0.3}))
    file = folder / "edited.py"
    file.write_text(STRATEGIES)
    mine = plugin.reducer_of({"reducer": "edited.py:Loudest"})
    before = plugin.fingerprint_of(mine)
    assert arguments(f"fingerprint={before}") == {"fingerprint": before}
    file.write_text(STRATEGIES.replace("largest", "greatest"))
    assert plugin.fingerprint_of(mine) != before


@pytest.fixture
def lm(plugin: Any) -> Any:
    """The plug-in as an object, with a fifth of the tokens."""
    return plugin.TokenPruneSimple(pretrained=str(mini.path()), dtype="float32", budget=0.2)


def request_of(*arguments: Any, kind: str = "generate_until") -> Any:
    """A request as lmms-eval makes it."""
    from lmms_eval.api.instance import Instance

    return Instance(kind, arguments, 0, {"task": "boards_local", "doc_id": 0, "repeats": 1})


def prompt(lm: Any) -> Any:
    from PIL import Image

    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many shapes are there?"}]}]
    processor = lm._inner._image_processor
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=Image.open(mini.picture_path()), text=text, return_tensors="pt")


def test_a_wrong_fingerprint_is_refused_and_the_right_one_taken(plugin: Any, lm: Any) -> None:
    common = {"pretrained": str(mini.path()), "dtype": "float32", "budget": 0.2}
    with pytest.raises(ValueError, match=f"Write fingerprint={lm.fingerprint}"):
        plugin.TokenPruneSimple(**common, fingerprint="tp-0")
    assert plugin.TokenPruneSimple(**common, fingerprint=lm.fingerprint).fingerprint == lm.fingerprint


def test_a_base_of_the_wrong_kind_is_refused(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"base=internvl_hf has no simple class.*leave --force_simple out"):
        plugin.TokenPruneSimple(base="internvl_hf")


def test_no_wrapper_can_swallow_an_error(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that catches everything there is."""

    def swallow(requests: Any) -> list[str]:
        try:
            lm._inner.model.generate(**prompt(lm), max_new_tokens=-1)
        except BaseException:
            return [""]
        return ["unreachable"]

    monkeypatch.setattr(lm._inner, "generate_until", swallow)
    request = request_of("?", {"until": []})
    with pytest.raises(RuntimeError, match=r"generate failed, .*: ValueError: .*max_new_tokens"):
        lm.generate_until([request])
    assert "generate" not in vars(lm._inner.model)


def test_an_error_of_the_wrapper_itself_is_left_alone(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(requests: Any) -> list[str]:
        raise KeyError("mine")

    monkeypatch.setattr(lm._inner, "generate_until", fail)
    with pytest.raises(KeyError, match="mine"):
        lm.generate_until([request_of("?", {})])
    assert "generate" not in vars(lm._inner.model)


def test_requests_are_handed_over_as_copies(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(requests: Any) -> list[str]:
        lm._inner.model.generate(**prompt(lm), max_new_tokens=1)
        requests[0].args[1]["until"].append("written")
        return ["answer"]

    monkeypatch.setattr(lm._inner, "generate_until", write)
    request = request_of("?", {"until": []})
    assert lm.generate_until([request]) == ["answer"]
    assert request.args == ("?", {"until": []})


@pytest.mark.parametrize("budget", [0.2, 1.0])
def test_loglikelihood_needs_all_tokens(plugin: Any, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper's own is replaced: that of llava_hf fails with transformers 5 by itself."""
    lm = plugin.TokenPruneSimple(pretrained=str(mini.path()), dtype="float32", budget=budget)

    def plain(requests: Any) -> list[tuple[float, bool]]:
        inputs = prompt(lm)
        return [(lm._inner.model(**inputs, labels=inputs["input_ids"]).loss.item(), True)]

    monkeypatch.setattr(lm._inner, "loglikelihood", plain)
    request = request_of("?", "!", kind="loglikelihood")
    if budget == 1.0:
        assert lm.loglikelihood([request]) == plain(None)
    else:
        with pytest.raises(RuntimeError, match=r"Use a generate_until task, or budget=1\.0"):
            lm.loglikelihood([request])


def test_nothing_to_answer_is_no_error(lm: Any) -> None:
    assert lm.generate_until([]) == []


def test_clean_lets_the_model_go(lm: Any) -> None:
    assert "_model" in vars(lm._inner)
    lm.clean()
    assert "_model" not in vars(lm._inner)
