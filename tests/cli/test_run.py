"""The command `run`: answers, images, overlays and checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.cli import FAST, run_json
from tokenprune.cli.answers import describe_reducer
from tokenprune.cli.main import main
from tokenprune.decoder_reducer import AtLayer
from tokenprune.models import mini
from tokenprune.strategies import HiRED, PruMerge, Random
from tokenprune.strategies.components import MeanOfRestMerging, RandomSelection
from tokenprune.testing.tiny_models import random_image, tiny_model, tiny_processor


@pytest.mark.parametrize(
    "program",
    [
        [str(Path(sys.executable).parent / "tokenprune")],
        pytest.param([sys.executable, "-m", "tokenprune"], marks=pytest.mark.slow),
    ],
)
def test_run_without_arguments(program: list[str], tmp_path: Path) -> None:
    result = subprocess.run([*program, "run", *FAST], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "trained on" not in result.stderr
    for word in (
        "all tokens",
        "HiRED",
        "right answer",
        "KV cache",
        "visual tokens: 100 asked, 100 kept of 500 valid",
        "overlay:",
    ):
        assert word in result.stdout
    with Image.open(tmp_path / "tokenprune-out" / "overlay.png") as overlay:
        assert overlay.width > 500


def test_replaced_components_are_named() -> None:
    assert describe_reducer(HiRED(selection=RandomSelection())) == "HiRED (RandomSelection)"
    assert describe_reducer(PruMerge(merging=MeanOfRestMerging())) == "PruMerge (MeanOfRestMerging)"
    assert describe_reducer(HiRED(0.1)) == "HiRED"
    assert describe_reducer(HiRED(0.4) >> AtLayer(1, Random(0.5))) == "HiRED+AtLayer(Random)"


def test_existing_drawings_are_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--question", "How many shapes are there?", "--max-new-tokens", "1", "--figure"]
    reports = [run_json(capsys, *arguments, name) for name in ("kept.pdf", "kept.pdf", "kept.svg")]
    assert [report["figure"] for report in reports] == ["kept.pdf", "kept-2.pdf", "kept.svg"]
    names = [f"tokenprune-out/{name}.png" for name in ("overlay", "overlay-2", "overlay-3")]
    assert [report["overlay"] for report in reports] == names
    assert all((tmp_path / name).is_file() for name in names)
    assert (tmp_path / "kept-2.pdf").read_bytes().startswith(b"%PDF")
    assert b"<svg" in (tmp_path / "kept.svg").read_bytes()


def test_json_is_one_consistent_object(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys)
    for name in ("answer_full", "answer", "asked", "kept", "budgets", "prompt_length", "overlay", "ttft_ms"):
        assert name in report
    assert report["asked"] == report["kept"] == sum(report["budgets"]) == 100
    assert len(report["budgets"]) == 1 + report["tile_grid"][0] * report["tile_grid"][1] == 5
    dropped = report["valid"] - report["kept"] + report["newlines_full"] - report["newlines"]
    assert report["prompt_length_full"] - report["prompt_length"] == dropped
    assert report["kv_bytes"] / report["kv_bytes_full"] == report["prompt_length"] / report["prompt_length_full"]
    assert report["prefill_flops"] < report["prefill_flops_full"]
    assert (report["attention"], report["saliency_flops"]) == ("cls_attention", 0)
    assert report["results"][0]["question"] == report["question"]
    assert len({result["question"] for result in report["results"]}) >= 5
    assert Path(report["overlay"]).is_file()


def test_attention_is_a_signal_or_a_saliency_model(capsys: pytest.CaptureFixture[str]) -> None:
    """`attention` is accepted on the command line, in YAML by class name, and in the output of `--print_config`."""
    question = ["--question", "How many shapes are there?"]
    assert run_json(capsys, *question, "--reducer.attention", "received")["attention"] == "received_attention"
    options = ["--reducer.attention.model-name", "test_vit", "--reducer.attention.pretrained", "false"]
    arguments = [*question, "--reducer.attention", "timm-saliency", *options]
    report = run_json(capsys, *arguments)
    assert report["attention"] == "TimmSaliency(test_vit)"
    assert report["saliency_flops"] > 5 * 70e6
    saliency = {"class_path": "TimmSaliency", "init_args": {"model_name": "test_vit", "pretrained": False}}
    Path("saliency.yaml").write_text(
        json.dumps({"reducer": {"class_path": "HiRED", "init_args": {"attention": saliency}}})
    )
    assert run_json(capsys, *question, "--config", "saliency.yaml")["kept_per_tile"] == report["kept_per_tile"]
    assert main(["run", *arguments, "--print_config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert run_json(capsys, "--config", "printed.yaml")["reducer"] == report["reducer"]
    assert main(["run", *FAST, *arguments]) == 0
    assert "attention read: TimmSaliency(test_vit), 375.7 MFLOP" in capsys.readouterr().out


def test_a_full_budget_gives_the_same_answers(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--reducer.budget", "1.0")
    assert all(result["answer"] == result["answer_full"] for result in report["results"])
    assert report["kept"] == report["valid"] > 400


def test_images_and_questions_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    random_image(90, 200).convert("CMYK").save("a.jpg")
    random_image(300, 80).convert("LA").save("b.png")
    arguments = ["--image", "a.jpg", "b.png", "--question", "What number is on the star?", "How many shapes are there?"]
    assert main(["run", *FAST, "--json", *arguments, "--out", "deep/er"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    notices = [line.split(": ")[1:3] for line in err.splitlines()]
    assert notices == [[name, notices[0][1]] for name in ("a.jpg", "b.png")]
    assert "trained on drawn boards only; its answers about photographs" in notices[0][1]
    assert [(result["image"], result["question"][:4]) for result in report["results"]] == [
        ("a.jpg", "What"),
        ("a.jpg", "How "),
        ("b.png", "What"),
        ("b.png", "How "),
    ]
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["overlay-2.png", "overlay.png"]
    assert report["results"][0]["kept_per_tile"] != report["results"][2]["kept_per_tile"]


@pytest.mark.parametrize("size", [(1, 1), (12_000, 200), (200, 12_000), (3_000, 1)])
def test_extreme_images_work(capsys: pytest.CaptureFixture[str], size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save("odd.png")
    report = run_json(capsys, "--image", "odd.png")
    assert 0 < report["kept"] <= report["asked"]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_checkpoint_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path / "checkpoint")
    tiny_processor(family).save_pretrained(tmp_path / "checkpoint")
    random_image(60, 150).save("a.png")
    report = run_json(capsys, "--model", "checkpoint", "--image", "a.png", "--reducer.budget", "0.5")
    assert report["kept"] == report["asked"] == (8 if family == "llava" else 32)


def test_an_overlay_of_a_downsampled_image(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--reducer", "image-downsample")
    assert 0 < report["kept"] <= report["asked"]
    assert list(Path("tokenprune-out").iterdir())


def test_mini_has_a_demo() -> None:
    assert mini.image_path().is_file()
    assert {"question", "answer", "type", "needs"} == set(mini.demo_questions()[0])
