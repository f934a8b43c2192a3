"""The plug-in in the real lmms-eval. `tests/integrations/lmms_env.sh` creates an environment for these tests."""

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
ONE: tuple[str, ...] = ()
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")

Evaluate = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of ten questions about boards, and a file of strategies."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed")
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "task").mkdir()
    lines = []
    # Every fifth: several boards, so that images of different shapes are there.
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
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
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
    wrong = evaluate("tokenprune", "reducer=HiRED,reducer.selektion=TopAttentionSelection")
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


def test_accelerate_launch_gives_the_same(evaluate: Evaluate) -> None:
    """Without a GPU it starts one process, whatever number is asked for; several are torchrun's here."""
    one = evaluate("tokenprune", "budget=0.1")
    launched = evaluate("tokenprune", "budget=0.1", launcher=ACCELERATE)
    assert launched.answers is not None, launched.text[-3000:]
    assert launched.answers == one.answers
    assert score(launched) == score(one)
    assert f"tokenprune: rank 0: {NUMBER} image(s)" in launched.text


def test_results_reach_wandb_offline(evaluate: Evaluate, folder: Path) -> None:
    run = evaluate("tokenprune", "budget=0.1", "--wandb_args", "project=tokenprune,job_type=eval")
    assert run.results is not None, run.text[-3000:]
    assert "Logging to Weights and Biases failed" not in run.text
    logged = b"".join(file.read_bytes() for file in folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert b"boards_local/exact_match" in logged


def arguments(text: str) -> dict[str, Any]:
    """Model arguments as lmms-eval's own parser hands them over."""
    from lmms_eval.utils import simple_parse_args_string

    found: dict[str, Any] = simple_parse_args_string(text)
    return found


@pytest.fixture
def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the plug-in, and the folder of the strategies as the current one."""
    from tokenprune.experiments.integrations.lmms_eval import model

    monkeypatch.chdir(folder)
    return model


def test_model_args_say_what_the_command_line_says(plugin: Any) -> None:
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
        found = plugin.parse_reducer(arguments(text))
        assert found == expected, text
        assert repr(found) == repr(expected), text  # 1 == 1.0, but a count is no ratio


def test_a_fingerprint_names_parameters_and_code(plugin: Any, folder: Path) -> None:
    first = plugin.compute_fingerprint(plugin.parse_reducer({"reducer": "HiRED", "reducer.budget": 0.2}))
    assert first == plugin.compute_fingerprint(plugin.parse_reducer({"reducer.budget": 0.2, "reducer": "hired"}))
    assert first != plugin.compute_fingerprint(plugin.parse_reducer({"reducer": "HiRED", "reducer.budget": 0.3}))
    file = folder / "edited.py"
    file.write_text(STRATEGIES)
    mine = plugin.parse_reducer({"reducer": "edited.py:Loudest"})
    before = plugin.compute_fingerprint(mine)
    assert arguments(f"fingerprint={before}") == {"fingerprint": before}
    file.write_text(STRATEGIES.replace("largest", "greatest"))
    assert plugin.compute_fingerprint(mine) != before


@pytest.fixture
def lm(plugin: Any) -> Any:
    """The plug-in as an object, with a fifth of the tokens."""
    return plugin.TokenPruneSimple(pretrained=str(mini.path()), dtype="float32", budget=0.2)


def request_of(*arguments: Any, kind: str = "generate_until") -> Any:
    """A request as lmms-eval makes it."""
    from lmms_eval.api.instance import Instance

    return Instance(kind, arguments, 0, {"task": "boards_local", "doc_id": 0, "repeats": 1})


def prompt(lm: Any) -> Any:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many shapes are there?"}]}]
    processor = lm._inner._image_processor
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=Image.open(mini.image_path()), text=text, return_tensors="pt")


def test_a_wrong_fingerprint_is_refused_and_the_right_one_taken(plugin: Any, lm: Any) -> None:
    common = {"pretrained": str(mini.path()), "dtype": "float32", "budget": 0.2}
    with pytest.raises(ValueError, match=f"Write fingerprint={lm.fingerprint}"):
        plugin.TokenPruneSimple(**common, fingerprint="tp-0")
    assert plugin.TokenPruneSimple(**common, fingerprint=lm.fingerprint).fingerprint == lm.fingerprint


def test_a_base_of_the_wrong_kind_is_refused(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"base=internvl_hf has no simple class.*omit --force_simple"):
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
def test_loglikelihood_reads_logits_of_the_full_length(
    plugin: Any, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrapper's own is replaced: that of llava_hf fails with transformers 5 by itself."""
    lm = plugin.TokenPruneSimple(pretrained=str(mini.path()), dtype="float32", budget=budget)

    def plain(requests: Any) -> list[tuple[float, bool]]:
        inputs = prompt(lm)
        logits = lm._inner.model(**inputs).logits
        assert logits.shape[1] == inputs["input_ids"].shape[1]
        return [(logits[0, -1].log_softmax(-1).max().item(), True)]

    monkeypatch.setattr(lm._inner, "loglikelihood", plain)
    answers = lm.loglikelihood([request_of("?", "!", kind="loglikelihood")])
    assert budget < 1.0 or answers == plain(None)


def test_a_wrapper_that_answers_in_batches(lm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`llava_hf` itself takes one question at a time, and no other wrapper takes the models that are supported."""
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]

    def batched(requests: Any) -> list[str]:
        processor, model = lm._inner._image_processor, lm._inner.model
        texts = []
        for request in requests:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.args[0]}]}]
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
        images = [Image.open(request.args[1]["image"]) for request in requests]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers: list[str] = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    monkeypatch.setattr(lm._inner, "generate_until", batched)
    requests = [request_of(line["question"], {"image": line["image"]}) for line in lines]
    single = [lm.generate_until([request])[0] for request in requests]
    assert len(set(single)) > 5
    assert lm.generate_until(requests) == single


def test_nothing_to_answer_is_no_error(lm: Any) -> None:
    assert lm.generate_until([]) == []


def test_clean_lets_the_model_go(lm: Any) -> None:
    assert "_model" in vars(lm._inner)
    lm.clean()
    assert "_model" not in vars(lm._inner)


# --- lmms-eval's tasks in our own ablations ---------------------------------------------------------------------------


def records(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """All records by the name of their cell and their sample."""
    cells = [file.parent for file in out.glob("cells/*/cell.json")]
    found = {json.loads((cell / "cell.json").read_text())["name"]: cell for cell in cells}
    return {name: {r["sample"]: r for r in read_lines(cell / "records.jsonl")} for name, cell in found.items()}


@pytest.fixture
def own(folder: Path) -> dict[str, Any]:
    """The ten questions as a task of ours."""
    return {"class_path": "lmms-task", "init_args": {"name": "boards_local", "include_path": str(folder / "task")}}


@pytest.mark.timeout(900)  # on a busy machine four runs of lmms-eval take longer than a test may
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_ablation_gives_what_lmms_eval_gives(
    evaluate: Evaluate, own: Any, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = ["1.0", "0.2", "0.1", "0"]
    config = {"task": own, "batch_size": batch_size, "baselines": False, "grid": {"reducer.budget": budgets}}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(config))
    loads, load = [], running.load

    def counted(*args: Any) -> Any:
        loads.append(args)
        return load(*args)

    monkeypatch.setattr(running, "load", counted)
    done = ablate(str(tmp_path / "ablation.yaml"), tmp_path / "out")
    assert (len(loads), done.done, done.errors) == (1, len(budgets) * NUMBER, 0)
    assert done.encodes == done.images == 3  # ten questions about three boards: 40 answers
    answers = []
    for budget in budgets:
        theirs = evaluate("tokenprune", f"budget={budget}")
        ours = records(tmp_path / "out")[f"HiRED, budget={budget}"]
        answers.append({i: ours[f"boards_local/{i}"]["prediction"] for i in range(NUMBER)})
        assert answers[-1] == {i: text.strip() for i, text in theirs.answers.items()}
        assert sum(record["score"] for record in ours.values()) / NUMBER == score(theirs)
    assert answers[0] != answers[1] != answers[3]
    for file in (tmp_path / "out").glob("cells/*/summary.json"):
        cell = records(tmp_path / "out")[json.loads((file.parent / "cell.json").read_text())["name"]]
        mean = sum(record["score"] for record in cell.values()) / NUMBER
        assert json.loads(file.read_text()) == {"answers": NUMBER, "metrics": {"exact_match": pytest.approx(mean)}}


def test_an_ablation_of_a_task_goes_on_and_is_shared(own: Any, tmp_path: Path) -> None:
    config = {"task": own, "grid": {"reducer.budget": [0.2]}, "random_seeds": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    command = [sys.executable, "-m", "tokenprune", "ablate", str(tmp_path / "small.yaml"), "--out"]
    ended = subprocess.run([*command, str(shared), "--workers", "2"], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-2000:]
    ended = subprocess.run([*command, str(whole)], capture_output=True, text=True, timeout=200)
    assert "encodes per image: 1" in ended.stderr or "encodes per image: 1" in ended.stdout, ended.stderr

    def kept(out: Path) -> Any:
        return {
            name: {i: {key: value for key, value in one.items() if not key.endswith("_ms")} for i, one in cell.items()}
            for name, cell in records(out).items()
        }

    expected = kept(whole)
    assert kept(shared) == expected
    file = sorted(whole.glob("cells/*/records.jsonl"))[0]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]) + '{"sample": "boa')
    done = ablate(str(tmp_path / "small.yaml"), whole)
    assert done.done == NUMBER * len(expected)
    assert kept(whole) == expected


def test_a_document_that_cannot_be_asked_about_is_an_error_record(folder: Path, tmp_path: Path) -> None:
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
    ((_, found),) = records(tmp_path / "out").items()
    assert [record["error"] is None for record in found.values()] == [True, False, True]
    assert "UnidentifiedImageError" in found["boards_broken/1"]["error"]


def test_wrong_tasks_are_answered_before_a_run(folder: Path, tmp_path: Path) -> None:
    here = str(folder / "task")
    for task, message in [
        (LmmsTask("textvqa_vall"), r"no task 'textvqa_vall'; did you mean textvqa_val or"),
        (LmmsTask("textvqa"), r"textvqa is a group of tasks; name one of them: textvqa_val, textvqa_test"),
        (LmmsTask("pope_full"), r"pope_full is a group of tasks; name one of them: pope_adv, pope_pop, pope_random"),
        (LmmsTask("arc_easy"), r"arc_easy is a multiple_choice task\. Only generate_until can be run"),
        (
            LmmsTask("boards_local", include_path=here, score_by="anls"),
            r"'anls' is no metric of boards_local; it has",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            task.check()
    with pytest.raises(ValueError, match=r"type_by='kind': boards_local has no such column; it has \['image', 'quest"):
        list(LmmsTask("boards_local", include_path=here, type_by="kind").samples())
    with pytest.raises(ValueError, match=r"the data of chartqa \(.*nothing\) cannot be loaded: .*option data"):
        list(LmmsTask("chartqa", data=str(tmp_path / "nothing")).samples())


def test_a_wrong_task_ends_an_ablation_before_its_first_run(own: Any, tmp_path: Path) -> None:
    wrong = {"class_path": "LmmsTask", "init_args": {"name": "chartqq"}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"grid": {"task": [own, wrong]}}))
    with pytest.raises(ValueError, match="no task 'chartqq'; did you mean chartqa"):
        ablate(str(tmp_path / "two.yaml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_options_are_the_tasks(folder: Path) -> None:
    def options(name: str, **own: Any) -> Any:
        return LmmsTask(name, generation_kwargs=own).generation()

    assert options("chartqa") == {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    assert options("textvqa_val")["max_new_tokens"] == 1024  # it says nothing, and llava_hf takes this
    assert options("textvqa_val", max_new_tokens=32)["max_new_tokens"] == 32
    assert options("chartqa", temperature=0.7) == {
        **options("chartqa"),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": None,
    }


def test_an_answer_ends_where_the_task_says(folder: Path) -> None:
    def scored(**own: Any) -> float:
        task = LmmsTask("boards_local", include_path=str(folder / "task"), generation_kwargs=own)
        first = next(iter(task.samples()))
        return task.score(first, f"{first.answers[0]}\n\nASSISTANT: and more")

    assert scored() == 0.0
    assert scored(until=["ASSISTANT:"]) == scored(until="\n") == 1.0


YES_NO = [
    {"question_id": "a", "question": "Is it red?", "answer": "Yes"},
    {"question_id": "a", "question": "Is it blue?", "answer": "No"},
]
PEOPLE = [{"answer": "red", "answer_id": place} for place in range(9)] + [{"answer": "blue", "answer_id": 9}]
OPTIONS = {"A": "red", "B": "blue", "C": "nan", "D": "nan", "hint": "nan", "source": "s", "split": "dev"}
BENCHMARKS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], list[str], dict[str, float]]] = {
    # task: split, options, the columns that lmms-eval reads, right answers, and its metrics if the first alone is right
    "vqav2_val": (
        "validation",
        {},
        [{"question_id": 1, "question": "Which color?", "answers": PEOPLE}] * 2,
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
        {"ocrbench_accuracy": 1 / 1000},  # of its 1000 questions
    ),
    "mme": (
        "test",
        {"type_by": "category"},
        [{**document, "category": "color"} for document in YES_NO],
        ["yes", "No."],
        {"mme_perception_score": 50.0},  # no point for the pair
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


def saved(place: Path, split: str, documents: list[dict[str, Any]], images: list[Image.Image]) -> str:
    """Save a data set as `datasets` does."""
    from datasets import Dataset, DatasetDict

    rows = [{**document, "image": image} for document, image in zip(documents, images, strict=True)]
    DatasetDict({split: Dataset.from_list(rows)}).save_to_disk(str(place))
    return str(place)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_public_benchmark_is_built_and_scored_by_its_own_file(name: str, folder: Path, tmp_path: Path) -> None:
    """On documents made here: no data set of the hub can be had. Names of columns are those that lmms-eval reads."""
    split, options, documents, right, after_one = BENCHMARKS[name]
    image = Image.new("RGB", (40, 30), "red")
    task = LmmsTask(name, data=saved(tmp_path / name, split, documents, [image] * 2), **options)
    task.check()
    first, second = task.samples()
    assert first.group == second.group  # one image, one encoding
    assert first.image().size == image.size
    assert documents[0]["question"].lower() in first.question.lower()
    assert len(first.question) > len(documents[0]["question"]) or name == "ocrbench"  # others have a prompt around it
    assert bool(first.type) == ("type_by" in options)
    scores = [task.score(sample, answer) for sample, answer in zip((first, second), right, strict=True)]
    assert scores == pytest.approx([1.0, 1.0])
    assert task.score(first, "zebra") == 0.0
    for _ in range(2):  # twice: OCRBench counts in a variable of its module, over all calls
        assert task.summary({first.id: right[0], second.id: "zebra"}) == pytest.approx(after_one)


def test_a_metric_without_a_number_for_a_sample_is_refused(folder: Path, tmp_path: Path) -> None:
    split, _, documents, _, _ = BENCHMARKS["mmbench_en_dev_static"]
    data = saved(tmp_path / "data", split, documents, [Image.new("RGB", (40, 30))] * 2)
    with pytest.raises(ValueError, match=r"gpt_eval_score gives no number for a single sample\. .* set full_score"):
        list(LmmsTask("mmbench_en_dev_static", data=data).samples())


def test_what_cannot_be_aggregated_says_why(folder: Path, tmp_path: Path) -> None:
    split, _, documents, right, _ = BENCHMARKS["mme"]
    data = saved(tmp_path / "data", split, documents, [Image.new("RGB", (40, 30))] * 2)
    task = LmmsTask("mme", data=data, limit=1)  # half of a pair
    (sample,) = task.samples()
    assert task.score(sample, right[0]) == 1.0
    assert task.summary({sample.id: right[0]}) == {
        "mme_perception_score": "AssertionError: MME only supports pairwise evaluation"
    }


def test_different_images_are_not_shared(folder: Path, tmp_path: Path) -> None:
    """The image counts as the task shows it: some tasks draw into it, or cut it."""
    split, _, documents, _, _ = BENCHMARKS["pope"]
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "red", "blue")]
    task = LmmsTask("pope", data=saved(tmp_path / "data", split, documents * 2, images))
    assert [sample.id for sample in task.samples()] == ["pope/0", "pope/2", "pope/1", "pope/3"]
    assert len({sample.group for sample in task.samples()}) == 2
    assert [sample.id for sample in LmmsTask("pope", data=task.data, limit=3).samples()] == [
        "pope/0",
        "pope/2",
        "pope/1",
    ]
