"""From a module to layers and storages, told on small modules and checked on real ones."""

from __future__ import annotations

import csv
import re
import resource
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sim.errors import InputError
from sim.models import Built, build
from sim.network import Network
from sim.trace import Trace, trace, trace_model, trace_module
from sim.tracker import LayerTracker, Listener, StorageTable

PLANS = Path(__file__).parents[1] / "scenarios" / "published" / "v100_plans"
TINY_LLAMA = "hf:llama-1b:hidden=64,layers=2,heads=4,kv_heads=2,ffn=128,vocab=100"

traced = cache(trace_model)


def trace_of(module: nn.Module, *inputs: Tensor) -> Trace:
    """A trace on whatever device the module is on."""
    return trace(Built(module.eval(), inputs, 1, "fp32", None, "story"))


def layers(network: Network) -> list[tuple[str, str, list[str]]]:
    """(name, kind, storages read) of each layer."""
    return [
        (layer.name, layer.kind, [network.storages[r.storage].name for r in layer.reads])
        for layer in network.layers
    ]


def published(table: str) -> list[tuple[str, float]]:
    with (PLANS / f"{table}.csv").open() as file:
        return [(row["layer_type"], float(row["size_mb"])) for row in csv.DictReader(file)]


# -- layers -----------------------------------------------------------------------------------------------------------


def test_each_leaf_call_is_a_layer_and_what_its_parent_does_belongs_to_the_layer_before() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.flat, self.drop, self.act = nn.Linear(4, 4), nn.Flatten(), nn.Dropout(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2  # no layer yet: part of the first
            y = self.act(self.drop(self.flat(self.fc(x))))
            out: Tensor = self.act(torch.relu(y + x))
            return out

    made = trace_of(Block(), torch.ones(3, 4))
    assert layers(made.network) == [
        ("fc", "Linear", ["fc.weight", "fc.bias"]),
        ("act", "ReLU", []),
        ("act", "ReLU", []),
    ]
    assert [[op.name for op in ops] for ops in made.work] == [
        ["aten.mul", "aten.linear"],
        ["aten.relu", "aten.add", "aten.relu"],
        ["aten.relu"],
    ]
    product = made.work[0][1]
    assert (product.kind, product.m, product.n, product.k, product.flops) == ("gemm", 3, 4, 4, 96)
    assert product.moved_bytes == 2 * 3 * 4 * 4
    assert product.reads == (0, 1)
    assert [layer.flops for layer in made.network.layers] == [12 + 96, 36, 12]


def test_a_reshape_that_has_to_copy_is_no_layer() -> None:
    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2)

    made = trace_of(nn.Sequential(nn.ReLU(), Turn(), nn.Flatten()), torch.ones(1, 4, 5))
    assert layers(made.network) == [("0", "ReLU", [])]
    assert [op.name for op in made.work[0]] == ["aten.relu", "aten.clone"]


def test_a_root_without_children_is_one_layer() -> None:
    assert layers(trace_of(nn.Linear(2, 2), torch.ones(1, 2)).network) == [
        ("(root)", "Linear", ["weight", "bias"])
    ]


def test_attention_is_one_layer_that_reads_its_output_projection() -> None:
    made = traced("vit_b_16").network
    attention = next(layer for layer in layers(made) if layer[1] == "MultiheadAttention")
    own = "encoder.layers.encoder_layer_0.self_attention."
    assert [name.removeprefix(own) for name in attention[2]] == [
        "in_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    ]
    assert not any(layer[0].endswith("out_proj") for layer in layers(made))


def test_parameters_of_modules_with_children_are_layers_of_their_own() -> None:
    assert layers(traced("vit_b_16").network)[1:3] == [
        ("(root)", "VisionTransformer", ["class_token"]),
        ("encoder", "Encoder", ["encoder.pos_embedding"]),
    ]
    scales = [layer for layer in layers(traced("convnext_tiny").network) if layer[1] == "CNBlock"]
    assert len(scales) == 18
    assert scales[0] == ("features.1.0", "CNBlock", ["features.1.0.layer_scale"])


def test_another_modules_weight_is_read_by_who_uses_it() -> None:
    class Borrower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(F.linear(x, self.dense.weight))
            return out

    made = trace_of(Borrower(), torch.ones(1, 4)).network
    assert layers(made) == [("(root)", "Borrower", ["dense.weight"]), ("act", "ReLU", [])]
    assert [(s.name, s.home) for s in made.storages] == [("dense.weight", 0), ("dense.bias", -1)]


def test_a_view_of_a_weight_is_no_read_until_it_is_used_and_touches_only_its_part() -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.weight = nn.Parameter(torch.ones(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.weight.chunk(2)
            row = self.weight[0].expand(1000, 4)
            x = self.act(x @ q.t())
            x = self.act(x @ k.t())
            return x + row.sum()

    made = trace_of(Slices(), torch.ones(2, 4)).network
    assert [(layer.kind, [r.touched_bytes for r in layer.reads]) for layer in made.layers] == [
        ("Slices", [64]),
        ("ReLU", []),
        ("Slices", [64]),
        ("ReLU", []),
        ("Slices", [16]),
    ]


def test_a_module_that_runs_twice_is_two_layers_of_one_storage() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.fc(x))
            return out

    made = trace_of(Twice(), torch.ones(1, 4)).network
    assert layers(made) == [("fc", "Linear", ["fc.weight"])] * 2
    assert made.readers == ((0, 1),)
    assert made.total_bytes == 64


def test_a_layer_is_told_apart_by_call_and_a_child_in_between_ends_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.act = nn.ReLU()

        def forward(self, x: Tensor, child: bool) -> Tensor:
            x = x * self.a + 1
            return (self.act(x) if child else x) * self.b

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.s(self.s(x, False), True)
            return out

    assert layers(trace_of(Outer(), torch.ones(1, 4)).network) == [
        ("s", "Scaled", ["s.a", "s.b"]),
        ("s", "Scaled", ["s.a"]),
        ("s.act", "ReLU", []),
        ("s", "Scaled", ["s.b"]),
    ]


def test_casts_and_caches_are_reads() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.get_buffer("seen")
            return x.double() @ self.weight.data.to(torch.float64)

    made = trace_of(Cache(), torch.ones(1, 4)).network
    assert layers(made) == [("(root)", "Cache", ["seen", "weight"])]


def test_recurrent_networks_and_fused_transformers_are_layers_by_module() -> None:
    lstm = trace_of(nn.Sequential(nn.LSTM(4, 4, 2), nn.Identity()), torch.ones(3, 1, 4)).network
    assert [(name, kind, len(reads)) for name, kind, reads in layers(lstm)] == [("0", "LSTM", 8)]

    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # one fused kernel outside of a trace
    kinds = [kind for _, kind, _ in layers(trace_of(encoder, torch.ones(1, 3, 8)).network)]
    assert kinds == ["MultiheadAttention", "LayerNorm", "Linear", "Linear", "LayerNorm"]
    assert torch.backends.mha.get_fastpath_enabled()


# -- storages ---------------------------------------------------------------------------------------------------------


def test_a_tied_table_is_one_storage_that_both_ends_read() -> None:
    made = traced("hf:gpt2-lm").network
    table = next(i for i, s in enumerate(made.storages) if s.name == "transformer.wte.weight")
    assert made.storages[table].size_bytes == 50257 * 768 * 4
    assert made.readers[table] == (0, len(made.layers) - 1)
    first, last = made.layers[0].reads[0], made.layers[-1].reads[0]
    assert first.touched_bytes == 1024 * 768 * 4  # the rows of 1024 tokens
    assert last.touched_bytes == made.storages[table].size_bytes
    assert made.total_bytes == 124_439_808 * 4


def test_an_embedding_touches_no_more_than_its_table() -> None:
    made = trace_of(nn.Embedding(10, 4), torch.zeros(1, 100, dtype=torch.int64)).network
    assert made.layers[0].reads[0].touched_bytes == 160


def test_storages_stand_in_running_order_and_the_unread_beside_their_module() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.never = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(2, 2)
            self.register_buffer("spare", torch.zeros(3))
            self.register_buffer("empty", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x))
            return out

    made = trace_of(Late(), torch.ones(2, 4)).network
    assert [(s.name, s.home, s.dtype, s.size_bytes) for s in made.storages] == [
        ("first.weight", 0, "fp32", 16),
        ("first.bias", 0, "fp32", 16),
        ("first.running_mean", 0, "fp32", 16),
        ("first.running_var", 0, "fp32", 16),
        ("spare", 0, "fp32", 12),
        ("first.num_batches_tracked", 0, "int64", 8),
        ("last.weight", 1, "fp32", 64),
        ("last.bias", 1, "fp32", 16),
        ("never.weight", -1, "fp32", 16),
        ("never.bias", -1, "fp32", 8),
    ]


def test_parameters_cut_from_one_tensor_are_one_storage() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.ones(20)
            self.a, self.act, self.b = nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)
            for fc, start in ((self.a, 0), (self.b, 6)):
                fc.weight = nn.Parameter(flat[start : start + 4].view(2, 2))
                fc.bias = nn.Parameter(flat[start + 4 : start + 6])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.act(self.a(x)))
            return out

    made = trace_of(Flat(), torch.ones(1, 2)).network
    assert [(s.name, s.size_bytes, s.home) for s in made.storages] == [("a.weight", 80, 0)]
    assert [[r.touched_bytes for r in layer.reads] for layer in made.layers] == [[24], [], [24]]


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_bytes_are_those_of_the_state_dict(name: str) -> None:
    built = build(name, device="meta")
    network = trace(built).network
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in built.module.state_dict().values()}
    assert network.total_bytes == sum(s.nbytes() for s in storages.values())
    assert len(network.storages) == len(storages)
    unread = {s.name for s, readers in zip(network.storages, network.readers, strict=True) if not readers}
    # batch counters, and auxiliary heads, which run in training only; nothing else may go unread
    assert all(re.search(r"num_batches_tracked$|^aux|^AuxLogits", name) for name in unread), unread
    homes = [len(network.layers) if s.home < 0 else s.home for s in network.storages]
    assert homes == sorted(homes)


# -- real models ------------------------------------------------------------------------------------------------------


def test_resnet50_is_the_published_table() -> None:
    """158 layers. The table counts a BatchNorm's int64 batch counter as one more vector of its channels."""
    network = traced("resnet50").network
    rows = published("resnet50")
    assert [layer.kind for layer in network.layers] == [kind for kind, _ in rows]
    for index, (kind, size_mb) in enumerate(rows):
        size = network.layer_bytes(index) * (1.25 if kind == "BatchNorm2d" else 1)
        assert size / 2**20 == pytest.approx(size_mb, abs=6e-4), index
    assert (
        network.total_bytes == 25_557_032 * 4 + 2 * 26_560 * 4 + 53 * 8
    )  # with BatchNorm's statistics and counters


def test_bert_base_is_the_published_table_and_what_it_left_out() -> None:
    """The table lists 102 modules by `named_children`. Running order has the token types before the positions, an activation
    that is a module here and was a function there, and the embeddings' own lookup of token types in a buffer."""
    network = traced("hf:bert-base").network
    extra = ("GELUActivation", "BertEmbeddings")
    kept = [i for i, layer in enumerate(network.layers) if layer.kind not in extra]
    assert sum(layer.kind == "GELUActivation" for layer in network.layers) == 12
    rows = published("bert_base")
    rows[1], rows[2] = rows[2], rows[1]
    assert [network.layers[i].kind for i in kept] == [kind for kind, _ in rows]
    for index, (_, size_mb) in zip(kept, rows, strict=True):
        weights = [r.storage for r in network.layers[index].reads]
        size = sum(network.storages[s].size_bytes for s in weights if network.storages[s].dtype == "fp32")
        assert size / 2**20 == pytest.approx(size_mb, abs=6e-4), index


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "vit_b_32",
        "convnext_tiny",
        "swin_t",
        "mobilenet_v3_small",
        "hf:bert-base",
        "hf:gpt2-lm",
        TINY_LLAMA,
    ],
)
def test_the_cpu_meets_the_layers_that_meta_met(name: str) -> None:
    seq = 8 if name.startswith("hf:") else None
    built = build(name, seq=seq)
    meta = traced(name, seq=seq).network
    assert trace(built).network.digest == meta.digest

    # an executor's view: no inference mode, so torch takes operators apart by itself, and two runs in a row
    met = _Met()
    with torch.no_grad(), LayerTracker(built.module, StorageTable(built.module).find, met):
        built.module(*built.inputs)
        once = list(met.layers)
        met.layers.clear()
        built.module(*built.inputs)
    assert once == met.layers == [(i, layer.name, layer.kind) for i, layer in enumerate(meta.layers)]


class _Met(Listener):
    def __init__(self) -> None:
        self.layers: list[tuple[int, str, str]] = []

    def layer_starts(self, layer: int, name: str, kind: str) -> None:
        self.layers.append((layer, name, kind))


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "hf:bert-base", "hf:llama-1b:layers=2"])
def test_flops_of_products_are_torchs_own(name: str) -> None:
    built = build(name, device="meta", batch=2)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        built.module(*built.inputs)
    products = [op for ops in trace(built).work for op in ops if op.kind in ("conv", "gemm", "attention")]
    assert sum(op.flops for op in products) == counter.get_total_flops()
    assert all(op.flops == 2 * op.groups * op.m * op.n * op.k for op in products if op.kind != "attention")


def test_a_convolution_is_an_implicit_product() -> None:
    made = trace_of(nn.Conv2d(6, 8, (3, 1), stride=2, groups=2), torch.ones(5, 6, 9, 9))
    (op,) = made.work[0]
    assert (op.kind, op.groups, op.m, op.n, op.k) == ("conv", 2, 5 * 4 * 5, 4, 9)
    assert (op.window, op.stride, op.flops) == (3, 2, 2 * 2 * 100 * 4 * 9)
    up = trace_of(nn.ConvTranspose2d(6, 8, 2, stride=2), torch.ones(1, 6, 3, 3)).work[0][0]
    assert (up.m, up.n, up.k, up.flops) == (9, 8 * 4, 6, 2 * 9 * 32 * 6)


def test_seventy_billion_parameters_cost_seconds_and_no_memory() -> None:
    traced("hf:llama-1b")  # imports
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    network = trace_model("hf:llama-70b", dtype="bf16", seq=4096).network
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert network.total_bytes > 141e9
    assert sum(layer.kind == "Linear" for layer in network.layers) == 7 * 80 + 1


def test_the_same_model_gives_the_same_digest() -> None:
    assert trace_model("resnet18") == trace_model("resnet18")
    assert trace_model("resnet18").network.digest != trace_model("resnet18", batch=2).network.digest


# -- what cannot be traced --------------------------------------------------------------------------------------------


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return x if bool(x.sum() > 0) else -x


def test_a_path_that_depends_on_values_is_one_line() -> None:
    with torch.device("meta"):
        module, x = _Branch(), torch.ones(1, 4)
    with pytest.raises(InputError) as caught:
        trace_of(module, x)
    message = str(caught.value)
    assert message.startswith("model 'story' stopped in layer 0, module '(root)': RuntimeError")
    assert "may depend on shapes only" in message
    assert "\n" not in message
    assert len(trace_of(_Branch(), torch.ones(1, 4)).network.layers) == 1  # with values it runs


def test_a_forward_that_fails_says_where_and_leaves_no_hook() -> None:
    module = nn.Sequential(nn.ReLU(), nn.Linear(5, 5))
    with pytest.raises(
        InputError, match=r"stopped in layer 1, module '1': RuntimeError: .*inputs of \(1, 4\)"
    ):
        trace_of(module, torch.ones(1, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_inputs_that_are_no_tensors_are_told_as_they_are() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, how: str, many: int) -> Tensor:
            raise ValueError(f"no way is called {how}")

    with pytest.raises(
        InputError,
        match=r"stopped before its first layer, .*: ValueError: no way is called odd; .* inputs of \(1, 4\), 'odd', 3$",
    ):
        trace_module(Named(), (torch.ones(1, 4), "odd", 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused_in_one_line() -> None:
    module = nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="module '1' is TorchScript"):
        trace_of(module, torch.ones(1, 2))


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_compiled_is_refused_in_one_line(inside: bool) -> None:
    """Its layers would be traced, and another program run."""
    compiled = torch.compile(nn.Linear(2, 2))
    module = nn.Sequential(nn.ReLU(), compiled) if inside else compiled
    where = "1" if inside else "(root)"
    with pytest.raises(InputError) as refused:
        trace_module(module, torch.ones(1, 2))
    assert str(refused.value).endswith(
        f"module {where!r} is compiled, which shows no operators; give the module that it was made from"
    )
    in_place = nn.Linear(2, 2)
    in_place.compile()
    with pytest.raises(InputError, match=r"module '\(root\)' is compiled"):
        trace_module(in_place, torch.ones(1, 2))


def test_autocast_on_the_meta_device_is_let_pass() -> None:
    class Switched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(device_type=x.device.type, enabled=False):
                return super().forward(x)

    before = torch.autocast
    with torch.device("meta"):
        assert len(trace_of(Switched(2, 2), torch.ones(1, 2)).network.layers) == 1
    assert torch.autocast is before


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the suite runs on both cores
    yield
    torch.set_num_threads(before)
