"""Tasks of lmms-eval in ablations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.helpers.lmms_task import NUMBER, TASK, UTILS, Evaluate, score
from tokenprune.experiments.evaluation import experiment as running
from tokenprune.experiments.evaluation.grid import ablate
from tokenprune.experiments.evaluation.records import read_lines
from tokenprune.experiments.evaluation.tasks import LmmsTask

pytestmark = pytest.mark.lmms


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
