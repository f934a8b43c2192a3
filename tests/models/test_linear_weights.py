"""`linear_weights`: the number of weights of linear maps, in all storage formats."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tokenprune.adapter import find_adapter
from tokenprune.models._base.linear_weights import linear_weights
from tokenprune.models.llama4 import Llama4Adapter
from tokenprune.testing.examples import find_example
from tokenprune.testing.tiny_models import tiny_model


class PackedLinear(nn.Module):
    """A quantized linear map as AWQ, GPTQModel and HQQ store it: packed integers, widths as attributes."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(in_features // 8, out_features, dtype=torch.int32))


class AutoGPTQLinear(nn.Module):
    """A quantized linear map with the attribute names of AutoGPTQ."""

    def __init__(self, infeatures: int, outfeatures: int) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = infeatures, outfeatures


class FourBitLinear(nn.Linear):
    """A linear map as bitsandbytes stores it: the weight is a column of packed bytes."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        packed = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(16, 24),
        nn.Linear(16, 24, bias=False),
        Conv1D(24, 16),
        PackedLinear(16, 24),
        AutoGPTQLinear(16, 24),
        FourBitLinear(16, 24),
    ],
    ids=lambda module: type(module).__name__,
)
def test_all_formats_count_rows_times_columns(module: nn.Module) -> None:
    assert linear_weights(module) == 16 * 24
    assert linear_weights(nn.Sequential(module, nn.ModuleDict({"other": nn.Linear(2, 3)}))) == 16 * 24 + 6


def test_nonlinear_modules_count_zero() -> None:
    modules = nn.Sequential(nn.LayerNorm(8), nn.Embedding(9, 8), nn.Conv2d(3, 4, 2), nn.GELU(), nn.Identity())
    assert linear_weights(modules) == 0


def test_a_shared_map_is_counted_once() -> None:
    shared = nn.Linear(4, 5)
    assert linear_weights(nn.Sequential(shared, shared)) == 20


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_does_not_change_the_shape() -> None:
    model = tiny_model("llava_next")
    shape = find_adapter(model).llm
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    assert find_adapter(quantized).llm == shape
    assert shape.linear_parameters == sum(shape.layer_parameters) > 0
    assert len(shape.layer_parameters) == shape.layers == model.config.text_config.num_hidden_layers


def test_adapters_of_peft_are_added_to_their_base() -> None:
    peft = pytest.importorskip("peft")
    layer = nn.ModuleDict({"q": nn.Linear(16, 24), "k": nn.Linear(16, 8)})
    model: Any = peft.get_peft_model(layer, peft.LoraConfig(r=4, target_modules=["q"]))
    base, low_rank = 16 * 24 + 16 * 8, 4 * (16 + 24)
    assert linear_weights(model) == base + low_rank
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q"]))
    assert linear_weights(model) == base + low_rank + 2 * (16 + 24)
    model.delete_adapter("second")
    model.merge_adapter()
    assert linear_weights(model) == base + low_rank
    assert linear_weights(model.merge_and_unload()) == base


def test_experts_are_counted_in_their_own_layer() -> None:
    model = find_example(Llama4Adapter).build_model()
    adapter, config = Llama4Adapter(model), model.config.get_text_config()
    dense, routed, *_ = layers = adapter.decoder.layers
    experts = sum(weights.numel() for weights in routed.parameters() if weights.dim() == 3)
    assert experts > 0
    assert len(adapter.llm.layer_parameters) == len(layers)
    assert adapter.llm.layer_parameters[0] == linear_weights(dense)
    active = experts // config.num_local_experts * config.num_experts_per_tok
    assert adapter.llm.layer_parameters[1] == linear_weights(routed) + active
