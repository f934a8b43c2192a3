"""The plug-in in an installed lmms-eval. `tests/integrations/lmms_env.sh` creates an environment for these tests."""

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
import yaml
from PIL import Image

from tokenprune.experiments.evaluation import experiment as running
from tokenprune.experiments.evaluation.grid import ablate
from tokenprune.experiments.evaluation.records import read_lines
from tokenprune.experiments.evaluation.tasks import Boards, LmmsTask
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
ONE_PROCESS: tuple[str, ...] = ()
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")

Evaluate = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a task of ten questions about boards and a file of strategies, and return their folder."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed")
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "task").mkdir()
    lines = []
    # Every fifth sample: the questions are about several boards with different image shapes.
    for number, sample in enumerate(list(Boards(number=4).samples())[::5][:NUMBER]):
        sample.image().save(folder / f"{number}.png")
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
    """Return a function that runs the command line of lmms-eval; equal calls return the stored result."""
    results: dict[Any, SimpleNamespace] = {}
    numbers = itertools.count()

    def run(model: str, arguments: str, *options: str, launcher: tuple[str, ...] = ONE_PROCESS) -> SimpleNamespace:
        key = (model, arguments, options, launcher)
        if key in results and "--use_cache" not in options:
            return results[key]
        out = folder / f"out{next(numbers)}"
        command = [*launcher, "-m", "lmms_eval", "--model", model, "--tasks", "boards_local", "--log_samples", *options]
        command += ["--model_args", f"pretrained={mini.path()},dtype=float32,{arguments}"]
        command += ["--include_path", str(folder / "task"), "--output_path", str(out)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "ACCELERATE_USE_CPU": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
        process = subprocess.run(
            [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=200
        )
        result = SimpleNamespace(
            code=process.returncode, text=process.stdout + process.stderr, answers=None, results=None
        )
        for file in out.rglob("*_results.json"):  # the exit code does not show a failure, a missing file does
            result.results = json.loads(file.read_text())
        for file in out.rglob("*_samples_*.jsonl"):
            samples = [json.loads(line) for line in file.read_text().splitlines()]
            result.answers = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
        results[key] = result
        return result

    return run


def score(run: SimpleNamespace) -> float:
    assert run.results is not None, run.text[-3000:]
    return float(run.results["results"]["boards_local"]["exact_match,none"])


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
    assert f"{NUMBER} image(s)" in smaller_budget.text


@pytest.mark.parametrize("budget", ["1.0", "0.1"])
def test_two_processes_give_the_same_as_one(evaluate: Evaluate, budget: str) -> None:
    single = evaluate("tokenprune", f"budget={budget}")
    distributed = evaluate("tokenprune", f"budget={budget}", launcher=TWO_PROCESSES)
    assert distributed.answers is not None, distributed.text[-3000:]
    assert distributed.answers == single.answers
    assert score(distributed) == score(single)
    for rank in (0, 1):
        assert f"tokenprune: rank {rank}: {NUMBER // 2} image(s)" in distributed.text


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
    assert f"tokenprune: rank 0: {NUMBER} image(s)" in launched.text


def test_results_reach_wandb_offline(evaluate: Evaluate, folder: Path) -> None:
    run = evaluate("tokenprune", "budget=0.1", "--wandb_args", "project=tokenprune,job_type=eval")
    assert run.results is not None, run.text[-3000:]
    assert "Logging to Weights and Biases failed" not in run.text
    logged = b"".join(file.read_bytes() for file in folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert b"boards_local/exact_match" in logged


def parse_model_args(text: str) -> dict[str, Any]:
    """Parse model arguments with the parser of lmms-eval."""
    from lmms_eval.utils import simple_parse_args_string

    parsed: dict[str, Any] = simple_parse_args_string(text)
    return parsed


@pytest.fixture
def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Enter the folder of the strategies, and return the module of the plug-in."""
    from tokenprune.experiments.integrations.lmms_eval import model

    monkeypatch.chdir(folder)
    return model


def test_model_args_are_parsed_like_the_command_line(plugin: Any) -> None:
    from tokenprune import Budget
    from tokenprune.strategies import HiRED
    from tokenprune.strategies.components import RandomSelection, TopAttentionSelection, VisualContentAllocation

    for text, expected in {
        "reducer=hired,reducer.budget=0.1": HiRED(0.1),
        "reducer=HiRED.release,reducer.budget=160": HiRED.release(160),
        "reducer=HiRED,reducer.budget=1.0": HiRED(1.0),
        "reducer=HiRED,reducer.selection.layer=-2": HiRED(selection=TopAttentionSelection(layer=-2)),
        "reducer=HiRED,reducer.allocation.layer=[0,-1]": HiRED(allocation=VisualContentAllocation(layer=[0, -1])),
        "reducer.selection.seed=3,reducer=HiRED,reducer.selection=random-selection": HiRED(
            selection=RandomSelection(seed=3)
        ),
        'reducer={"class_path": "HiRED", "init_args": {"budget": {"amount": 0.25, "of": "unpadded"}}}': HiRED(
            Budget(0.25, of="unpadded")
        ),
    }.items():
        reducer = plugin.parse_reducer(parse_model_args(text))
        assert reducer == expected, text
        assert repr(reducer) == repr(expected), text  # 1 == 1.0, but a count is no ratio


def test_a_fingerprint_depends_on_parameters_and_code(plugin: Any, folder: Path) -> None:
    first = plugin.compute_fingerprint(plugin.parse_reducer({"reducer": "HiRED", "reducer.budget": 0.2}))
    assert first == plugin.compute_fingerprint(plugin.parse_reducer({"reducer.budget": 0.2, "reducer": "hired"}))
    assert first != plugin.compute_fingerprint(plugin.parse_reducer({"reducer": "HiRED", "reducer.budget": 0.3}))
    file = folder / "edited.py"
    file.write_text(STRATEGIES)
    custom_reducer = plugin.parse_reducer({"reducer": "edited.py:Loudest"})
    before = plugin.compute_fingerprint(custom_reducer)
    assert parse_model_args(f"fingerprint={before}") == {"fingerprint": before}
    file.write_text(STRATEGIES.replace("largest", "greatest"))
    assert plugin.compute_fingerprint(custom_reducer) != before


@pytest.fixture
def lm(plugin: Any) -> Any:
    """Return a model of the plug-in with a budget of 20 %."""
    return plugin.TokenPruneSimple(pretrained=str(mini.path()), dtype="float32", budget=0.2)


def make_request(*arguments: Any, kind: str = "generate_until") -> Any:
    """Return a request in the format of lmms-eval."""
    from lmms_eval.api.instance import Instance

    return Instance(kind, arguments, 0, {"task": "boards_local", "doc_id": 0, "repeats": 1})


def make_prompt(lm: Any) -> Any:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many shapes are there?"}]}]
    processor = lm._inner._image_processor
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=Image.open(mini.image_path()), text=text, return_tensors="pt")


def test_only_the_right_fingerprint_is_accepted(plugin: Any, lm: Any) -> None:
    common = {"pretrained": str(mini.path()), "dtype": "float32", "budget": 0.2}
    with pytest.raises(ValueError, match=f"Write fingerprint={lm.fingerprint}"):
        plugin.TokenPruneSimple(**common, fingerprint="tp-0")
    assert plugin.TokenPruneSimple(**common, fingerprint=lm.fingerprint).fingerprint == lm.fingerprint


def test_a_base_of_the_wrong_kind_is_refused(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"base=internvl_hf has no simple class.*omit --force_simple"):
        plugin.TokenPruneSimple(base="internvl_hf")


def test_an_error_is_raised_even_if_the_wrapper_catches_it(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in raises an error of `generate` even if the wrapper catches `BaseException`."""

    def swallow(requests: Any) -> list[str]:
        try:
            lm._inner.model.generate(**make_prompt(lm), max_new_tokens=-1)
        except BaseException:
            return [""]
        return ["unreachable"]

    monkeypatch.setattr(lm._inner, "generate_until", swallow)
    request = make_request("?", {"until": []})
    with pytest.raises(RuntimeError, match=r"generate failed, .*: ValueError: .*max_new_tokens"):
        lm.generate_until([request])
    assert "generate" not in vars(lm._inner.model)


def test_an_error_of_the_wrapper_is_not_changed(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(requests: Any) -> list[str]:
        raise KeyError("mine")

    monkeypatch.setattr(lm._inner, "generate_until", fail)
    with pytest.raises(KeyError, match="mine"):
        lm.generate_until([make_request("?", {})])
    assert "generate" not in vars(lm._inner.model)


def test_the_wrapper_gets_copies_of_requests(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def modify_request(requests: Any) -> list[str]:
        lm._inner.model.generate(**make_prompt(lm), max_new_tokens=1)
        requests[0].args[1]["until"].append("written")
        return ["answer"]

    monkeypatch.setattr(lm._inner, "generate_until", modify_request)
    request = make_request("?", {"until": []})
    assert lm.generate_until([request]) == ["answer"]
    assert request.args == ("?", {"until": []})


@pytest.mark.parametrize("budget", [0.2, 1.0])
def test_loglikelihood_reads_logits_of_the_full_length(
    plugin: Any, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test replaces `loglikelihood` of llava_hf, which fails with transformers 5 without the plug-in, too."""
    lm = plugin.TokenPruneSimple(pretrained=str(mini.path()), dtype="float32", budget=budget)

    def read_logits(requests: Any) -> list[tuple[float, bool]]:
        inputs = make_prompt(lm)
        logits = lm._inner.model(**inputs).logits
        assert logits.shape[1] == inputs["input_ids"].shape[1]
        return [(logits[0, -1].log_softmax(-1).max().item(), True)]

    monkeypatch.setattr(lm._inner, "loglikelihood", read_logits)
    answers = lm.loglikelihood([make_request("?", "!", kind="loglikelihood")])
    assert budget < 1.0 or answers == read_logits(None)


def test_a_wrapper_with_batches(lm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test replaces `generate_until`: `llava_hf` does not batch, and other wrappers lack the supported models."""
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]

    def answer_in_batches(requests: Any) -> list[str]:
        processor, model = lm._inner._image_processor, lm._inner.model
        texts = []
        for request in requests:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.args[0]}]}]
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
        images = [Image.open(request.args[1]["image"]) for request in requests]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers: list[str] = processor.batch_decode(
            generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers

    monkeypatch.setattr(lm._inner, "generate_until", answer_in_batches)
    requests = [make_request(line["question"], {"image": line["image"]}) for line in lines]
    single = [lm.generate_until([request])[0] for request in requests]
    assert len(set(single)) > 5
    assert lm.generate_until(requests) == single


def test_an_empty_list_of_requests(lm: Any) -> None:
    assert lm.generate_until([]) == []


def test_clean_releases_the_model(lm: Any) -> None:
    assert "_model" in vars(lm._inner)
    lm.clean()
    assert "_model" not in vars(lm._inner)


# --- tasks of lmms-eval in ablations ----------------------------------------------------------------------------------


def records_by_setting(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return all records by the name of their setting and by their sample."""
    folders = [file.parent for file in out.glob("settings/*/setting.json")]
    folders_by_name = {json.loads((folder / "setting.json").read_text())["name"]: folder for folder in folders}
    return {
        name: {record["sample"]: record for record in read_lines(folder / "records.jsonl")}
        for name, folder in folders_by_name.items()
    }


@pytest.fixture
def task_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the ten questions as a task of an ablation."""
    return {"class_path": "lmms-task", "init_args": {"name": "boards_local", "include_path": str(folder / "task")}}


@pytest.mark.timeout(900)  # four runs of lmms-eval can exceed the default limit
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_ablation_gives_the_answers_of_lmms_eval(
    evaluate: Evaluate, task_config: Any, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = ["1.0", "0.2", "0.1", "0"]
    config = {"task": task_config, "batch_size": batch_size, "baselines": False, "grid": {"reducer.budget": budgets}}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(config))
    loads, load = [], running.load

    def load_and_count(*args: Any) -> Any:
        loads.append(args)
        return load(*args)

    monkeypatch.setattr(running, "load", load_and_count)
    progress = ablate(str(tmp_path / "ablation.yaml"), tmp_path / "out")
    assert (len(loads), progress.done, progress.errors) == (1, len(budgets) * NUMBER, 0)
    assert progress.encodes == progress.images == 3  # ten questions about three boards: 40 answers
    answers = []
    for budget in budgets:
        reference = evaluate("tokenprune", f"budget={budget}")
        recorded = records_by_setting(tmp_path / "out")[f"HiRED, budget={budget}"]
        answers.append({i: recorded[f"boards_local/{i}"]["prediction"] for i in range(NUMBER)})
        assert answers[-1] == {i: text.strip() for i, text in reference.answers.items()}
        assert sum(record["score"] for record in recorded.values()) / NUMBER == score(reference)
    assert answers[0] != answers[1] != answers[3]
    for file in (tmp_path / "out").glob("settings/*/summary.json"):
        recorded = records_by_setting(tmp_path / "out")[json.loads((file.parent / "setting.json").read_text())["name"]]
        mean = sum(record["score"] for record in recorded.values()) / NUMBER
        assert json.loads(file.read_text()) == {"answers": NUMBER, "metrics": {"exact_match": pytest.approx(mean)}}


def test_an_ablation_of_a_task_resumes_and_runs_with_workers(task_config: Any, tmp_path: Path) -> None:
    config = {"task": task_config, "grid": {"reducer.budget": [0.2]}, "random_seeds": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    complete, shared = tmp_path / "whole", tmp_path / "shared"
    command = [sys.executable, "-m", "tokenprune", "ablate", str(tmp_path / "small.yaml"), "--out"]
    process = subprocess.run([*command, str(shared), "--workers", "2"], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-2000:]
    process = subprocess.run([*command, str(complete)], capture_output=True, text=True, timeout=200)
    assert "encodes per image: 1" in process.stderr or "encodes per image: 1" in process.stdout, process.stderr

    def remove_times(out: Path) -> Any:
        return {
            name: {
                i: {key: value for key, value in record.items() if not key.endswith("_ms")}
                for i, record in samples.items()
            }
            for name, samples in records_by_setting(out).items()
        }

    expected = remove_times(complete)
    assert remove_times(shared) == expected
    file = sorted(complete.glob("settings/*/records.jsonl"))[0]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]) + '{"sample": "boa')
    progress = ablate(str(tmp_path / "small.yaml"), complete)
    assert progress.done == NUMBER * len(expected)
    assert remove_times(complete) == expected


def test_an_unreadable_document_gives_an_error_record(folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()[:3]]
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines[1]["image"] = str(tmp_path / "broken.png")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "broken.yaml").write_text(
        TASK.format(data=tmp_path / "questions.jsonl").replace("boards_local", "boards_broken")
    )
    task = {"class_path": "LmmsTask", "init_args": {"name": "boards_broken", "include_path": str(tmp_path)}}
    config = {"task": task, "baselines": False, "grid": {"reducer.budget": [0.2]}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    assert ablate(str(tmp_path / "small.yaml"), tmp_path / "out").errors == 1
    ((_, recorded),) = records_by_setting(tmp_path / "out").items()
    assert [record["error"] is None for record in recorded.values()] == [True, False, True]
    assert "UnidentifiedImageError" in recorded["boards_broken/1"]["error"]


def test_wrong_tasks_are_refused_before_a_run(folder: Path, tmp_path: Path) -> None:
    task_folder = str(folder / "task")
    for task, message in [
        (LmmsTask("textvqa_vall"), r"no task 'textvqa_vall'; did you mean textvqa_val or"),
        (LmmsTask("textvqa"), r"textvqa is a group of tasks; name one of them: textvqa_val, textvqa_test"),
        (LmmsTask("pope_full"), r"pope_full is a group of tasks; name one of them: pope_adv, pope_pop, pope_random"),
        (LmmsTask("arc_easy"), r"arc_easy is a multiple_choice task\. Only generate_until can be run"),
        (
            LmmsTask("boards_local", include_path=task_folder, score_by="anls"),
            r"'anls' is no metric of boards_local; it has",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            task.check()
    with pytest.raises(ValueError, match=r"type_by='kind': boards_local has no such column; it has \['image', 'quest"):
        list(LmmsTask("boards_local", include_path=task_folder, type_by="kind").samples())
    with pytest.raises(ValueError, match=r"the data of chartqa \(.*nothing\) cannot be loaded: .*option data"):
        list(LmmsTask("chartqa", data=str(tmp_path / "nothing")).samples())


def test_a_wrong_task_ends_an_ablation_before_its_first_run(task_config: Any, tmp_path: Path) -> None:
    misspelled = {"class_path": "LmmsTask", "init_args": {"name": "chartqq"}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"grid": {"task": [task_config, misspelled]}}))
    with pytest.raises(ValueError, match="no task 'chartqq'; did you mean chartqa"):
        ablate(str(tmp_path / "two.yaml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_options_come_from_the_task(folder: Path) -> None:
    def options(name: str, **overrides: Any) -> Any:
        return LmmsTask(name, generation_kwargs=overrides).generation()

    assert options("chartqa") == {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    # The task sets no limit, so the default of llava_hf is used.
    assert options("textvqa_val")["max_new_tokens"] == 1024
    assert options("textvqa_val", max_new_tokens=32)["max_new_tokens"] == 32
    assert options("chartqa", temperature=0.7) == {
        **options("chartqa"),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": None,
    }


def test_an_answer_ends_at_the_stop_strings_of_the_task(folder: Path) -> None:
    def score_answer(**overrides: Any) -> float:
        task = LmmsTask("boards_local", include_path=str(folder / "task"), generation_kwargs=overrides)
        first = next(iter(task.samples()))
        return task.score(first, f"{first.answers[0]}\n\nASSISTANT: and more")

    assert score_answer() == 0.0
    assert score_answer(until=["ASSISTANT:"]) == score_answer(until="\n") == 1.0


YES_NO = [
    {"question_id": "a", "question": "Is it red?", "answer": "Yes"},
    {"question_id": "a", "question": "Is it blue?", "answer": "No"},
]
ANNOTATORS = [{"answer": "red", "answer_id": index} for index in range(9)] + [{"answer": "blue", "answer_id": 9}]
OPTIONS = {"A": "red", "B": "blue", "C": "nan", "D": "nan", "hint": "nan", "source": "s", "split": "dev"}
BENCHMARKS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], list[str], dict[str, float]]] = {
    # task: split, options, columns that lmms-eval reads, right answers, metrics if only the first answer is right
    "vqav2_val": (
        "validation",
        {},
        [{"question_id": 1, "question": "Which color?", "answers": ANNOTATORS}] * 2,
        ["red", "Red."],
        {"exact_match": 0.5},
    ),
    "textvqa_val": (
        "validation",
        {},
        [{"question_id": 1, "question": "which color?", "answers": ["red"] * 10, "ocr_tokens": []}] * 2,
        ["red", "red ASSISTANT: no"],
        {"exact_match": 0.5},
    ),
    "scienceqa_img": (
        "test",
        {},
        [{"hint": "", "question": "Which?", "choices": ["red", "blue"], "answer": 0}] * 2,
        ["A", "A. red"],
        {"exact_match": 0.5},
    ),
    "docvqa_val": (
        "validation",
        {},
        [{"questionId": "1", "question": "Which?", "answers": ["red", "the red one"]}] * 2,
        ["red", "Red"],
        {"anls": 0.5},
    ),
    "ocrbench": (
        "test",
        {"type_by": "question_type"},
        [{"dataset": "x", "question": "Which?", "question_type": "Doc-oriented VQA", "answer": ["red"]}] * 2,
        ["it is RED", "red"],
        {"ocrbench_accuracy": 1 / 1000},  # OCRBench has 1000 questions
    ),
    "mme": (
        "test",
        {"type_by": "category"},
        [{**document, "category": "color"} for document in YES_NO],
        ["yes", "No."],
        {"mme_perception_score": 50.0},  # the pair counts only if both answers are right
    ),
    "pope": (
        "test",
        {"type_by": "category"},
        [{**document, "category": "popular"} for document in YES_NO],
        ["yes", "No"],
        {"pope_accuracy": 0.5, "pope_precision": 1.0, "pope_recall": 1.0, "pope_f1_score": 1.0, "pope_yes_ratio": 0.5},
    ),
    "chartqa": (
        "test",
        {"type_by": "type"},
        [{"type": kind, "question": "How many?", "answer": "100"} for kind in ("human_test", "augmented_test")],
        ["104", "100"],
        {"relaxed_overall": 0.5, "relaxed_human_split": 1.0, "relaxed_augmented_split": 0.0},
    ),
    "gqa": (
        "testdev",
        {},
        [{"imageId": "1", "question": "Which?", "answer": "red"}] * 2,
        ["red", "Red"],
        {"exact_match": 0.5},
    ),
    "mmbench_en_dev_static": (
        "dev",
        {"full_score": 100.0, "type_by": "category"},
        [
            {"index": i, "question": "Which?", "answer": "A", "category": "c", "L2-category": "l", **OPTIONS}
            for i in (1, 2)
        ],
        ["A", "A. red"],
        {"gpt_eval_score": 50.0},
    ),
}


def save_data_set(folder: Path, split: str, documents: list[dict[str, Any]], images: list[Image.Image]) -> str:
    """Save a data set in the format of `datasets`, and return its folder."""
    from datasets import Dataset, DatasetDict

    rows = [{**document, "image": image} for document, image in zip(documents, images, strict=True)]
    DatasetDict({split: Dataset.from_list(rows)}).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_public_benchmark_is_built_and_scored_by_its_task_file(name: str, folder: Path, tmp_path: Path) -> None:
    """The documents are synthetic, because the tests run offline; they have the columns that lmms-eval reads."""
    split, options, documents, right_answers, metrics = BENCHMARKS[name]
    image = Image.new("RGB", (40, 30), "red")
    task = LmmsTask(name, data=save_data_set(tmp_path / name, split, documents, [image] * 2), **options)
    task.check()
    first, second = task.samples()
    assert first.group == second.group  # one image, one encoding
    assert first.image().size == image.size
    assert documents[0]["question"].lower() in first.question.lower()
    assert len(first.question) > len(documents[0]["question"]) or name == "ocrbench"  # other tasks add a prompt
    assert bool(first.type) == ("type_by" in options)
    scores = [task.score(sample, answer) for sample, answer in zip((first, second), right_answers, strict=True)]
    assert scores == pytest.approx([1.0, 1.0])
    assert task.score(first, "zebra") == 0.0
    for _ in range(2):  # twice, because OCRBench counts over all calls in a module variable
        assert task.summary({first.id: right_answers[0], second.id: "zebra"}) == pytest.approx(metrics)


def test_a_metric_without_a_number_for_a_sample_is_refused(folder: Path, tmp_path: Path) -> None:
    split, _, documents, _, _ = BENCHMARKS["mmbench_en_dev_static"]
    data = save_data_set(tmp_path / "data", split, documents, [Image.new("RGB", (40, 30))] * 2)
    with pytest.raises(ValueError, match=r"gpt_eval_score gives no number for a single sample\. .* set full_score"):
        list(LmmsTask("mmbench_en_dev_static", data=data).samples())


def test_a_failed_aggregation_reports_its_error(folder: Path, tmp_path: Path) -> None:
    split, _, documents, right_answers, _ = BENCHMARKS["mme"]
    data = save_data_set(tmp_path / "data", split, documents, [Image.new("RGB", (40, 30))] * 2)
    task = LmmsTask("mme", data=data, limit=1)  # half of a pair
    (sample,) = task.samples()
    assert task.score(sample, right_answers[0]) == 1.0
    assert task.summary({sample.id: right_answers[0]}) == {
        "mme_perception_score": "AssertionError: MME only supports pairwise evaluation"
    }


def test_different_images_do_not_share_an_encoding(folder: Path, tmp_path: Path) -> None:
    """Samples share an encoding only if the task returns equal images; some tasks crop or draw on an image."""
    split, _, documents, _, _ = BENCHMARKS["pope"]
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "red", "blue")]
    task = LmmsTask("pope", data=save_data_set(tmp_path / "data", split, documents * 2, images))
    assert [sample.id for sample in task.samples()] == ["pope/0", "pope/2", "pope/1", "pope/3"]
    assert len({sample.group for sample in task.samples()}) == 2
    assert [sample.id for sample in LmmsTask("pope", data=task.data, limit=3).samples()] == [
        "pope/0",
        "pope/2",
        "pope/1",
    ]
