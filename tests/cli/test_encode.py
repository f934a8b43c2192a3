"""The command `encode`: the file, continuing after a stop, and errors."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenprune import VisionEncoder
from tokenprune.cli.encode import EncodeConfig, describe_run, read_requests, write_embeddings
from tokenprune.cli.main import main
from tokenprune.embedding_file import EmbeddingWriter, read_embeddings, read_metadata
from tokenprune.models import mini
from tokenprune.strategies import FastV, HiRED
from tokenprune.testing.tiny_models import random_image


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Return three image files in a folder."""
    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        random_image(80 + 20 * number, 100, number).save(file)
    return [str(file) for file in files]


def test_the_file_holds_the_tokens_of_the_encoder(images: list[str], tmp_path: Path) -> None:
    out, questions = tmp_path / "sub" / "x.safetensors", ["what is it?", 'where? "left" or \\ right: ü']
    folder = str(Path(images[0]).parent)
    command = ["encode", "--quiet", "--reducer.budget", "0.2", "--images", folder, "--out", str(out)]
    assert main([*command, "--question", *questions]) == 0
    pairs = list(read_embeddings(out))
    expected = [(image, question) for image in images for question in questions]
    assert [(entry["image"], entry["question"]) for _, entry in pairs] == expected
    encoder = VisionEncoder.from_pretrained(str(mini.path()), HiRED(0.2))
    for number, (tensor, entry) in enumerate(pairs):
        encoded = encoder.encode([random_image(80 + 20 * (number // 2), 100, number // 2)], entry["question"])
        assert torch.equal(tensor, encoded.tensors[0])
        assert entry["kept"] + entry["newlines"] == len(tensor)
    metadata, _ = read_metadata(out)
    assert metadata["reducer"]["init_args"]["budget"] == 0.2
    assert [file.name for file in out.parent.iterdir()] == ["x.safetensors"]


def test_a_stopped_run_continues(images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped by Ctrl-C after the first image, and by a full disk after the second."""
    config = EncodeConfig(images=images, out=str(tmp_path / "x.safetensors"), quiet=True)
    add, calls = EmbeddingWriter.add, []
    faults = {2: KeyboardInterrupt(), 4: OSError(errno.ENOSPC, "No space left on device")}

    def add_with_faults(self: EmbeddingWriter, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) in faults:
            self._data.write(b"incomplete tensor")  # as a full disk leaves it
            raise faults[len(calls)]
        add(self, *arguments)

    monkeypatch.setattr(EmbeddingWriter, "add", add_with_faults)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(config)
    with pytest.raises(OSError, match="No space left on device"):
        write_embeddings(config)
    assert not Path(config.out).exists()
    assert write_embeddings(config) == 3
    assert len(calls) == 5  # three images and two faults: no image is encoded again
    write_embeddings(replace(config, out=str(tmp_path / "y.safetensors")))
    assert Path(config.out).read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_other_options_never_mix(images: list[str], tmp_path: Path) -> None:
    config = EncodeConfig(images=images[:1], out=str(tmp_path / "x.safetensors"), quiet=True)
    write_embeddings(config)
    stored = Path(config.out).read_bytes()
    assert write_embeddings(config) == 1  # is complete
    changes: list[dict[str, Any]] = [{"reducer": HiRED(0.3)}, {"question": ["where?"]}, {"images": images[1:]}]
    for change in changes:
        with pytest.raises(ValueError, match="exists and was written with other options"):
            write_embeddings(replace(config, **change))
    random_image(90, 90, 7).save(images[0])
    with pytest.raises(ValueError, match="exists and was written with other options"):
        write_embeddings(config)
    assert Path(config.out).read_bytes() == stored
    write_embeddings(replace(config, fresh=True))
    assert Path(config.out).read_bytes() != stored


def test_interrupted_files_of_other_options(images: list[str], tmp_path: Path) -> None:
    file, requests = tmp_path / "x.safetensors", [{"image": "a"}, {"image": "b"}]
    numbers = dict.fromkeys(("asked", "kept", "valid", "encoded", "newlines", "newlines_full"), 1)
    with EmbeddingWriter(file, {"budget": 0.2}, requests) as writer:
        writer.add(torch.ones(2, 4), numbers)
        with pytest.raises(RuntimeError, match="another process writes"):
            EmbeddingWriter(file, {"budget": 0.2}, requests)
    with pytest.raises(ValueError, match="was written with other options; delete"):
        EmbeddingWriter(file, {"budget": 0.3}, requests)
    with pytest.raises(ValueError, match="was written for other images or questions; delete"):
        EmbeddingWriter(file, {"budget": 0.2}, [{"image": "c"}, {"image": "b"}])
    with EmbeddingWriter(file, {"budget": 0.2}, requests) as writer:
        assert writer.done == 1
    index = tmp_path / "x.safetensors.partial.jsonl"
    index.write_text(index.read_text()[:-9])  # the last line is incomplete
    with EmbeddingWriter(file, {"budget": 0.2}, requests) as writer:
        assert writer.done == 0


def test_a_hub_checkpoint_is_identified_by_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    before = describe_run(EncodeConfig(model=str(folder)))
    (folder / "model.safetensors").write_bytes(b"downloaded later")
    assert describe_run(EncodeConfig(model=str(folder))) == before
    assert before["checkpoint"] == {"commit": folder.name}
    assert "model.safetensors" in describe_run(EncodeConfig())["checkpoint"]


def test_requests_in_a_file(images: list[str], tmp_path: Path) -> None:
    lines = [{"image": "images/1.png", "question": "what?"}, {"image": "images/0.png"}]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    config = EncodeConfig(requests=str(file))
    requests = read_requests(config)
    assert [(r["image"], r["question"]) for r in requests] == [(images[1], "what?"), (images[0], None)]
    file.write_text('{"image": "images/1.png"}\n{"question": "?"}')
    with pytest.raises(ValueError, match=r"requests.jsonl, line 2 is no request"):
        read_requests(config)


ERRORS: dict[str, dict[str, Any]] = {
    r"give either --images FILE ... or --requests FILE.jsonl": {},
    r"absent.png: no such file": {"images": ["absent.png"]},
    r"there is no image in \.": {"images": ["."]},
    r"--requests absent.jsonl cannot be read": {"requests": "absent.jsonl"},
    r"no such folder": {"images": [str(mini.image_path())], "model": "absent/folder/x"},
    r"FastV drops tokens inside the LLM, which the server runs": {
        "images": [str(mini.image_path())],
        "reducer": FastV(0.5),
    },
    r"keeps no token of image 0": {"images": [str(mini.image_path())], "reducer": HiRED(0, newlines="drop")},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        write_embeddings(EncodeConfig(**ERRORS[message], quiet=True))
    assert "\n" not in str(info.value)


def test_files_of_other_programs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no embeddings; write the file with `tokenprune encode`"):
        read_metadata(mini.path() / "model.safetensors")
