"""Answers the questions about one image with the strategy of each setting, and makes the records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from tokenprune.account import LayerSums, average_over_layers, prefill_flops
from tokenprune.adapter import Adapter, Encoding
from tokenprune.configuration import as_config
from tokenprune.experiments.bench.tower_flops import count_tower_flops
from tokenprune.experiments.evaluation.evidence import evidence_coverage
from tokenprune.experiments.evaluation.loading import model_inputs
from tokenprune.experiments.evaluation.records import RecordFile
from tokenprune.experiments.evaluation.stored_images import (
    add_pixels,
    image_name,
    selection_to_record,
    store_image,
)
from tokenprune.experiments.evaluation.tasks import Sample
from tokenprune.image import Signal
from tokenprune.pipeline import Pipeline
from tokenprune.selection import Selection

if TYPE_CHECKING:
    from tokenprune.experiments.evaluation.experiment import Experiment, Progress, Setting

PendingSetting: TypeAlias = "tuple[Setting, RecordFile, list[Sample]]"
"""A setting, the file of its records, and its samples without a record."""
TIMED_IMAGES = 3
"""Number of first images of a run on which the preparation of each setting is timed by itself."""


def answer_group(
    adapter: Adapter,
    processor: Any,
    group: Sequence[Sample],
    pending: Sequence[PendingSetting],
    progress: Progress,
    out: Path | None,
    with_pixels: bool,
    passes: Sequence[int],
) -> Iterator[tuple[Setting, RecordFile, dict[str, Any], Selection | None]]:
    """Yield the missing records of all settings for one image, which is encoded once, and stored if `out` is set.

    Args:
        adapter: the adapter of the model.
        processor: the processor of the model.
        group: the samples about the image.
        pending: the settings, with their files and samples without a record.
        progress: counts of the run; images and passes through the tower are added.
        out: run directory in which the image is stored; None if it is not stored.
        with_pixels: whether the selections carry pixels.
        passes: number of passes through the vision tower so far, as a list of one entry that the tower updates.
    """
    if not any(missing for _, _, missing in pending):
        return
    reducers = [setting.experiment.reducer for setting, _, _ in pending]
    text_model = next((reducer.text_model for reducer in reducers if reducer.text_model), None)
    model = adapter.model
    needs = [signal for setting, _, _ in pending for signal in Pipeline(setting.experiment.reducer, adapter).needs]
    try:
        image = group[0].image()
        before = passes[0]
        began = time.perf_counter()
        with torch.no_grad():
            inputs = model_inputs(model, processor, image, [group[0].question], group[0].group)
            encoding = adapter.encode(inputs, needs, 0, text_model)
        encode_ms = (time.perf_counter() - began) * 1000
        if out is not None or with_pixels:  # after the timing
            encoding = add_pixels(encoding, adapter, inputs)
    except Exception as error:  # one unreadable image must not stop the run
        for setting, file, missing in pending:
            for sample in missing:
                yield setting, file, _error_record(sample, error), None
        return
    progress.images += 1
    progress.encodes += passes[0] - before
    name, pixels = None, encoding.images[0].pixels
    if out is not None and pixels is not None:
        shared = pending[0][0].experiment
        name = store_image(out, image_name(shared.model, as_config(shared.task), group[0].group), pixels)
    prompts: dict[tuple[str, ...], Mapping[str, Any]] = {}
    reduced: dict[str, tuple[Encoding, float]] = {}

    def prepare_text(questions: Sequence[str]) -> Mapping[str, Any]:
        """Return the text inputs of a batch, shared by all settings, since the processor also processes the pixels."""
        key = tuple(questions)
        if key not in prompts:
            prompts[key] = model_inputs(model, processor, image, questions, group[0].group)
        return prompts[key]

    for setting, file, missing in pending:
        alone_ms: float | None = None
        tower_flops: tuple[int, int] | None = None
        encoded: tuple[Encoding, float] | None = None
        for batch in _split_batches(group, setting.experiment.batch_size):
            missing_ids = {sample.id for sample in missing} & {sample.id for sample in batch}
            if not missing_ids:
                continue
            selections: Sequence[Selection | None]
            cuts: Sequence[Mapping[int, Selection]]
            try:
                before = passes[0]
                text = prepare_text([setting.experiment.task.prompt(sample) for sample in batch])
                encoded = encoded or _reduce_patches(adapter, setting.experiment, encoding, encode_ms, needs, reduced)
                records, selections, cuts = _answer_batch(adapter, processor, setting.experiment, text, batch, *encoded)
            except Exception as error:
                records, selections = [_error_record(sample, error) for sample in batch], [None] * len(batch)
                cuts = [{}] * len(batch)
            progress.more_encodes += passes[0] - before
            if progress.images <= TIMED_IMAGES and alone_ms is None and records[0]["error"] is None:
                alone = Pipeline(setting.experiment.reducer, adapter, tokenizer=processor, keep_pixels=False)
                alone_ms = round(_time_preparation(alone, inputs), 3)
                tower_flops = _count_tower_flops(alone, inputs)
            for record, selection, cuts_of_image in zip(records, selections, cuts, strict=True):
                record["stored_image"] = name
                record["prepare_alone_ms"] = alone_ms
                record["tower_flops"], record["tower_flops_full"] = tower_flops or (None, None)
                record["selection"] = (
                    selection_to_record(selection, cuts_of_image)
                    if name is not None and selection is not None
                    else None
                )
                if record["sample"] in missing_ids:
                    yield setting, file, record, selection


def _time_preparation(pipeline: Pipeline, inputs: Mapping[str, Any]) -> float:
    """Return the milliseconds that a setting needs by itself to encode an image and select its tokens.

    The encoding that all settings share computes the signals of all settings, and all features. Alone, a strategy
    encodes at its own resolution, up to its last required layer, and projects only kept tokens.

    Args:
        pipeline: the pipeline of the setting.
        inputs: the processed image and question.
    """
    device = pipeline.adapter.model.device
    with torch.no_grad():
        _wait_for_device(device)
        began = time.perf_counter()
        pipeline.prepare(inputs, for_generate=True)
        _wait_for_device(device)
        return (time.perf_counter() - began) * 1000


def _count_tower_flops(pipeline: Pipeline, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the FLOPs of the tower for a setting and for the unmodified model; None if no patch can leave.

    Args:
        pipeline: the pipeline of the setting.
        inputs: the processed image and question.
    """
    adapter = pipeline.adapter
    if not pipeline.reduces_patches:
        return None
    reduced = count_tower_flops(adapter, lambda: pipeline.prepare(inputs, for_generate=True), pipeline)
    return reduced, count_tower_flops(adapter, lambda: adapter.encode(inputs, ()))


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _split_batches(group: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Split the samples of an image into batches; finished samples do not change the split."""
    return [group[start : start + size] for start in range(0, len(group), size)]


def _reduce_patches(
    adapter: Adapter,
    experiment: Experiment,
    encoding: Encoding,
    encode_ms: float,
    needs: Sequence[Signal],
    reduced: dict[str, tuple[Encoding, float]],
) -> tuple[Encoding, float]:
    """Return the encoding of a setting and its time; the tower runs again for a strategy before or inside it.

    Settings share this encoding if their strategies inside the tower and the patches that enter it are equal.

    Args:
        adapter: the adapter of the model.
        experiment: the experiment of the setting.
        encoding: the complete encoding that all settings share.
        encode_ms: its time in milliseconds.
        needs: the signals of all settings.
        reduced: the encodings of earlier settings of the image with their times; the result is added.
    """
    pipeline = Pipeline(experiment.reducer, adapter)
    if not pipeline.reduces_patches:
        return encoding, encode_ms
    began = time.perf_counter()
    with torch.no_grad():
        entering = pipeline.select_entering(encoding)
        masks = [] if entering is None else [selection.kept.flatten().tolist() for selection in entering]
        key = json.dumps([[as_config(reducer) for reducer in pipeline.patch_reducers], masks], default=str)
        if key not in reduced:
            shared = pipeline.reduce_patches(encoding, entering, needs)
            milliseconds = encode_ms if shared is encoding else (time.perf_counter() - began) * 1000
            reduced[key] = shared, milliseconds
    return reduced[key]


def _answer_batch(
    adapter: Adapter,
    processor: Any,
    experiment: Experiment,
    text: Mapping[str, Any],
    batch: Sequence[Sample],
    encoding: Encoding,
    encode_ms: float,
) -> tuple[list[dict[str, Any]], list[Selection], list[dict[int, Selection]]]:
    """Return the records, the selections, and the selections by cut, of a batch of questions about an encoded image."""
    pipeline = Pipeline(experiment.reducer, adapter, tokenizer=processor)
    torch.manual_seed(experiment.seed)
    with torch.no_grad():
        began = time.perf_counter()
        call = pipeline.prepare(text, for_generate=True, encoding=encoding.repeat(len(batch)))
        selected = time.perf_counter()
        sequences = pipeline.generate_prepared(call, text["input_ids"], **_generation_options(experiment))
        answers = processor.batch_decode(sequences[:, text["input_ids"].shape[1] :], skip_special_tokens=True)
        ended = time.perf_counter()
    records, run, cuts = [], pipeline.run, pipeline.run.cuts
    selections = run.selections
    cuts_by_image = [{cut.layer: cut.selections[index] for cut in cuts} for index in range(len(batch))]
    for index, (sample, answer) in enumerate(zip(batch, answers, strict=True)):
        image, lengths = run.account.images[index], run.account.prompt_lengths[index]
        numbers = {
            "asked": image.asked,
            "kept": image.kept,
            "valid": image.valid,
            "kept_per_tile": list(image.kept_per_tile),
            "newlines": image.newlines,
            "cuts": [
                {"layer": cut.layer, "asked": cut.selections[index].asked, "kept": cut.selections[index].kept_tokens}
                for cut in cuts
            ],
            "average_tokens": average_over_layers(
                image.kept, {cut.layer: cut.selections[index].kept_tokens for cut in cuts}, adapter.llm.layers
            ),
            "tokens_per_layer": list(lengths.layers),
            "prompt_length": lengths.reduced,
            "prompt_length_full": lengths.full,
            "prefill_flops": LayerSums.from_rows(adapter.llm, lengths.layers).flops(adapter.llm),
            "prefill_flops_full": prefill_flops(adapter.llm, lengths.full),
            "evidence_coverage": _measure_evidence(sample, selections[index], cuts_by_image[index], adapter.llm.layers),
            "tower_patches": run.account.tower_patches,
            "tower_patches_full": run.account.tower_patches_full,
            "tower_flops": None,
            "tower_flops_full": None,
            "encode_ms": round(encode_ms, 3),
            "select_ms": round((selected - began) * 1000 / len(batch), 3),
            "generate_ms": round((ended - selected) * 1000 / len(batch), 3),
        }
        score = experiment.task.score(sample, answer.strip())
        records.append(_make_record(sample, answer.strip(), score, numbers))
    return records, selections, cuts_by_image


def _measure_evidence(sample: Sample, selection: Selection, cuts: Mapping[int, Selection], layers: int) -> float | None:
    """Return the share of the evidence that the kept tokens cover, averaged over the layers of the LLM.

    Args:
        sample: the sample; if it has no evidence, the result is None.
        selection: the tokens that entered the LLM.
        cuts: the selections at the cuts inside the LLM, by layer.
        layers: number of layers of the LLM.
    """
    if not sample.evidence:
        return None
    entered, *remaining = (
        evidence_coverage(selection.geometry, kept, sample.evidence, sample.evidence_tiles)
        for kept in (selection.kept, *(cut.kept for cut in cuts.values()))
    )
    return round(average_over_layers(entered, dict(zip(cuts, remaining, strict=True)), layers), 6)


def _generation_options(experiment: Experiment) -> dict[str, Any]:
    """Return the arguments of `generate`. If the task sets generation options, they replace the experiment's."""
    if options := experiment.task.generation():
        return dict(options)
    sampling: dict[str, Any] = {"do_sample": False}
    if experiment.temperature > 0:
        sampling = {"do_sample": True, "temperature": experiment.temperature}
    return {"max_new_tokens": experiment.max_new_tokens, **sampling}


EMPTY_NUMBERS: Mapping[str, Any] = {
    **dict.fromkeys(("asked", "kept", "valid"), 0),
    "kept_per_tile": [],
    "newlines": 0,
    "cuts": [],
    "average_tokens": 0.0,
    "tokens_per_layer": [],
    **dict.fromkeys(("prompt_length", "prompt_length_full", "prefill_flops", "prefill_flops_full"), 0),
    "evidence_coverage": None,
    **dict.fromkeys(("tower_patches", "tower_patches_full"), 0),
    **dict.fromkeys(("tower_flops", "tower_flops_full")),
    **dict.fromkeys(("encode_ms", "select_ms", "generate_ms"), 0.0),
}
"""The numbers of a sample that failed."""


def _error_record(sample: Sample, error: Exception) -> dict[str, Any]:
    """Return the record of a sample that failed."""
    return _make_record(sample, "", 0.0, EMPTY_NUMBERS, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _make_record(
    sample: Sample, prediction: str, score: float, numbers: Mapping[str, Any], error: str | None = None
) -> dict[str, Any]:
    """Return the record of a sample: question, answers, prediction, score and the numbers of the run."""
    return {
        "sample": sample.id,
        "group": sample.group,
        "question": sample.question,
        "answer": sample.answers[0] if len(sample.answers) == 1 else list(sample.answers),
        "prediction": prediction,
        "score": score,
        "correct": score >= 0.5,
        "type": sample.type,
        "split": sample.split,
        **numbers,
        "image": sample.group,
        "error": error,
        "prepare_alone_ms": None,
        "stored_image": None,
        "selection": None,
    }
