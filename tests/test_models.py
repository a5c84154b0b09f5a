"""Names to modules: sizes as published, weights reproducible, and one clear line for whatever is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sim import later
from sim.errors import InputError
from sim.models import build
from sim.names import known_models, torchvision_models, torchvision_names

TINY_LLAMA = "hf:llama-1b:hidden=64,layers=2,heads=4,kv_heads=2,ffn=128,vocab=100"

FACTORIES = '''
import copy
import torch
from torch import nn

NUMBER = 7
MODEL = nn.Linear(2, 2)
class Plain(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
def image(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
def with_inputs(): return nn.Linear(4, 3), torch.ones(1, 4)
def two_inputs(): return nn.Bilinear(4, 5, 3), (torch.ones(1, 4), torch.ones(1, 5, dtype=torch.float64))
def half():
    return torch.nn.Linear(4, 4).half(), torch.ones(1, 4)


def no_inputs(): return nn.Linear(4, 3), None
def odd_inputs(): return nn.Linear(4, 3), [1, 2]
def example():
    module = nn.Linear(4, 3)
    module.example_inputs = torch.ones(6, 4)
    return module
def needs(width, depth=1): return nn.Linear(width, depth)
def fails(): raise ValueError("no luck today\\nand more")
def leaves(): raise SystemExit(3)
def number(): return 3
def lazy(): return nn.LazyLinear(3)
def sparse():
    module = nn.Linear(4, 3)
    module.register_buffer("sp", torch.eye(4).to_sparse())
    return module, torch.ones(1, 4)
class Careful(nn.Module):
    """Reads values while it is built, ties, and cuts parameters out of one tensor."""
    def __init__(self):
        super().__init__()
        width = int(torch.tensor([4, 8]).max())
        flat = torch.randn(3 * width * width)
        self.a, self.b, self.tied = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.a.weight = nn.Parameter(flat[: width * width].view(width, width))
        self.b.weight = nn.Parameter(flat[width * width : 2 * width * width].view(width, width))
        self.tied.weight = self.b.weight
        self.register_buffer("count", torch.tensor(3))
        self.example_inputs = torch.zeros(1, width)
    def forward(self, x): return self.tied(self.b(self.a(x)))
class Reader(nn.Module):
    """Reads, cuts, copies and overwrites random values while it is built."""
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16, padding_idx=3)
        self.bounded = nn.Parameter(nn.init.trunc_normal_(torch.empty(40, 16), std=0.02, a=-0.03, b=0.03))
        self.first = nn.Linear(16, 16)
        self.second = copy.deepcopy(self.first)
        self.register_buffer("sums", self.first.weight.detach().sum(1))
        self.register_buffer("steps", torch.arange(64) / 64)
        self.whole = nn.Parameter(torch.empty(2, 16, 16).normal_())
        self.part = nn.Parameter(self.whole.detach()[1])
        self.plain = torch.empty(32, 16).normal_(5.0, 0.1)
        self.example_inputs = torch.empty(4, 16).uniform_(2.0, 3.0)
'''


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop.py").write_text(FACTORIES)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "script.py").write_text("raise SystemExit('usage: script.py FILE')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("shop", "broken", "script"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def says(name: str, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        build(name, device="meta", **options)  # type: ignore[arg-type]  # wrong values are the point
    message = str(caught.value)
    assert "\n" not in message
    return message


PUBLISHED = {
    "resnet50": 25_557_032,
    "vit_b_16": 86_567_656,
    "hf:bert-base": 109_482_240,
    "hf:bert-large": 335_141_888,
    "hf:roberta-base": 124_645_632,
    "hf:roberta-large": 355_359_744,
    "hf:gpt2": 124_439_808,
    "hf:gpt2-medium": 354_823_168,
    "hf:gpt2-lm": 124_439_808,
    "hf:llama": 1_235_814_400,
    "hf:llama-1b": 1_235_814_400,
    "hf:llama-8b": 8_030_261_248,
    "hf:llama-70b": 70_553_706_496,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_models_have_their_published_sizes(name: str, parameters: int) -> None:
    built = build(name, batch=2, device="meta")
    assert sum(p.numel() for p in built.module.parameters()) == parameters
    assert all(t.is_meta for t in (*built.module.parameters(), *built.module.buffers(), *built.inputs))
    assert not built.module.training
    assert not any(p.requires_grad for p in built.module.parameters())
    assert built.inputs[0].shape[0] == built.batch == 2


def test_inputs_have_the_size_the_model_wants() -> None:
    assert build("resnet50", batch=3, device="meta").inputs[0].shape == (3, 3, 224, 224)
    assert build("inception_v3", device="meta").inputs[0].shape == (1, 3, 299, 299)
    bert = build("hf:bert-base", device="meta")
    assert (bert.inputs[0].shape, bert.inputs[0].dtype, bert.seq) == ((1, 384), torch.int64, 384)
    assert build("hf:gpt2", device="meta").seq == 1024
    assert build("hf:llama-1b", seq=7, device="meta").inputs[0].shape == (1, 7)
    assert build("resnet50", device="meta").seq is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floating_point_takes_the_dtype_and_whole_numbers_stay(dtype: torch.dtype) -> None:
    built = build("resnet18", dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype])
    kinds = {t.dtype for t in (*built.module.parameters(), *built.module.buffers())}
    assert kinds == {dtype, torch.int64}
    assert built.inputs[0].dtype == dtype
    assert torch.get_default_dtype() == torch.float32


def test_rotary_frequencies_stay_fp32_as_in_a_real_load() -> None:
    built = build(TINY_LLAMA, dtype="bf16", seq=8)
    assert {p.dtype for p in built.module.parameters()} == {torch.bfloat16}
    assert dict(built.module.named_buffers())["model.rotary_emb.inv_freq"].dtype == torch.float32


def test_tied_tables_stay_tied_in_another_dtype() -> None:
    devices: tuple[Literal["cpu", "meta"], ...] = ("cpu", "meta")
    for device in devices:
        tied: Any = build(TINY_LLAMA, dtype="bf16", seq=8, device=device).module
        untied: Any = build(TINY_LLAMA + ",tied=no", dtype="bf16", seq=8, device=device).module
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_one_seed_one_model_and_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, again, other = (build("mobilenet_v3_small", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, one.module.state_dict().values(), again.module.state_dict().values()))
    assert torch.equal(one.inputs[0], again.inputs[0])
    assert not torch.equal(one.inputs[0], other.inputs[0])
    pairs = zip(one.module.parameters(), other.module.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_no_weight_is_one_constant_so_a_wrong_binding_shows() -> None:
    module = build("vit_b_32").module  # its head is all zeros as torchvision makes it
    assert all(p.min() < p.max() for p in module.parameters())


@pytest.fixture
def fillings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Even small tensors are filled late, in pieces of 64 elements; the dtype and size of each piece, as it is filled."""
    seen = []
    fill = later.Filling.fill

    def noted(self: later.Filling, piece: Tensor, number: int) -> None:
        seen.append((piece.dtype, piece.numel()))
        fill(self, piece, number)

    monkeypatch.setattr(later, "LARGE", 64)
    monkeypatch.setattr(later.Filling, "fill", noted)
    return seen


@pytest.mark.parametrize("tied", ["yes", "no"])
def test_late_weights_are_filled_once_in_their_dtype_and_tell_places_apart(
    tied: str, fillings: list[tuple[torch.dtype, int]]
) -> None:
    built = build(f"{TINY_LLAMA},tied={tied}", dtype="bf16", seq=8)
    module: Any = built.module
    assert (module.lm_head.weight is module.model.embed_tokens.weight) == (tied == "yes")
    matrices = [p for p in module.parameters() if p.ndim == 2]
    assert {dtype for dtype, _ in fillings} == {torch.bfloat16}
    assert sum(size for _, size in fillings) == sum(p.numel() for p in matrices)
    assert all(0.018 < p.float().std() < 0.022 and p.float().mean().abs() < 0.002 for p in matrices)
    norms = [p for p in module.parameters() if p.ndim == 1]
    assert all(0.01 < (p.float() - 1).std() < 0.03 for p in norms)
    rows = torch.cat([p.flatten().view(-1, 32) for p in module.parameters()])
    assert len(rows.unique(dim=0)) == len(rows)  # no row of any weight is another's
    logits = module(*built.inputs).logits
    assert logits.isfinite().all()
    assert len(logits.flatten().unique()) > 100


@pytest.mark.usefixtures("fillings")
def test_late_weights_depend_on_the_seed_and_not_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    made = []
    for seed, threads in ((0, 1), (0, 5), (1, 5)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made.append(build(TINY_LLAMA, seq=8, seed=seed).module.state_dict())
    assert torch.equal(before, torch.get_rng_state())
    one, again, other = (list(state.values()) for state in made)
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))


def test_what_constructors_compute_stays_when_weights_are_filled_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("hf:llama-1b:hidden=64,layers=1,heads=4,kv_heads=2,ffn=128", "resnet18", "swin_t"):
        plain = build(name, dtype="bf16")
        with monkeypatch.context() as patch:
            patch.setattr(later, "LARGE", 4096)
            late = build(name, dtype="bf16")
        was, now = (dict(m.module.named_buffers()) for m in (plain, late))
        assert was.keys() == now.keys()
        assert all(torch.equal(was[key], now[key]) and was[key].dtype == now[key].dtype for key in was)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_value_that_a_constructor_reads_is_there_when_it_reads(
    dtype: str, fillings: list[tuple[torch.dtype, int]]
) -> None:
    built = build("shop:Reader", dtype=dtype)
    module: Any = built.module
    near = {"rtol": 0.0, "atol": 0.02 if dtype == "bf16" else 1e-5}
    assert module.table.weight[3].eq(0).all()
    assert module.table.weight.float().std() > 0.9
    assert 0.02 < module.bounded.abs().max() <= 0.0301
    assert torch.equal(module.first.weight, module.second.weight)
    torch.testing.assert_close(module.sums, module.first.weight.sum(1), **near)
    assert torch.equal(module.steps, (torch.arange(64) / 64).to(module.steps.dtype))
    assert torch.equal(module.part, module.whole[1])
    assert module.part.untyped_storage()._cdata == module.whole.untyped_storage()._cdata
    assert 4 < module.plain.min() < module.plain.max() < 6
    assert 2 <= built.inputs[0].min() < built.inputs[0].max() <= 3
    again: Any = build("shop:Reader", dtype=dtype).module
    assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))
    assert torch.equal(module.plain, again.plain)
    in_last = sum(size for kind, size in fillings if kind == module.whole.dtype)
    assert in_last >= 2 * module.whole.numel()


@pytest.mark.usefixtures("factories")
def test_nothing_is_filled_for_shapes_alone(fillings: list[tuple[torch.dtype, int]]) -> None:
    assert (
        build("shop:Careful", device="meta").module.training is False
    )  # it cannot be built there, so on the CPU
    assert fillings == []


def test_every_known_name_is_listed() -> None:
    names = known_models()
    assert {"resnet50", "regnet_y_128gf", "hf:bert-base", "hf:llama-70b"} <= set(names)
    assert len(names) == len(set(names)) >= 80


def test_names_read_from_torchvisions_source_are_those_it_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchvision_names() == torchvision_models()
    monkeypatch.setattr("sim.names.find_spec", lambda name: None)
    assert torchvision_names() == torchvision_models(), "where there is no source to read"


def test_unknown_names_answer_with_the_nearest() -> None:
    assert says("resnet5").startswith("model 'resnet5': not known; nearest: resnet50,")
    assert "hf:bert-base" in says("hf:bert")
    assert "hf:gpt2" in says("gpt2")
    assert "nearest: hidden" in says("hf:llama-1b:hiden=3")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("resnet50", {"batch": 0}, "batch 0: must be a whole number from 1 up"),
        ("resnet50", {"batch": -2}, "batch -2"),
        ("resnet50", {"batch": True}, "batch True"),
        ("resnet50", {"batch": 10**9}, "batch 1000000000: at most 65536"),
        ("resnet50", {"dtype": "int8"}, "dtype 'int8': not known; use one of fp32, fp16, bf16"),
        ("resnet50", {"seq": 16}, "seq 16: model 'resnet50' takes no token sequence"),
        ("hf:bert-base", {"seq": 0}, "seq 0: must be"),
        ("hf:bert-base", {"seq": 513}, "seq 513: 'hf:bert-base' has 512 positions"),
        ("hf:roberta-base", {"seq": 513}, "has 512 positions"),
        ("hf:gpt2", {"seq": 1025}, "has 1024 positions"),
        ("hf:bert-base:hidden=4", {}, "takes no options"),
        ("hf:llama-1b:hidden=x", {}, "hidden=x: must be a whole number"),
        ("hf:llama-1b:hidden", {}, "hidden=: must be a whole number"),
        ("hf:llama-1b:layers=0", {}, "layers=0: must be"),
        ("hf:llama-1b:layers=100000", {}, "layers=100000: must be a whole number from 1 to 1000"),
        ("hf:llama-1b:vocab=999999999999999", {}, "must be a whole number from 1 to 10000000"),
        ("hf:llama-1b:layers=4,layers=5", {}, "layers is given twice"),
        ("hf:llama-1b:tied=maybe", {}, "must be yes or no"),
        ("hf:llama-1b:hidden=100,heads=3", {}, "must be an even whole number"),
        ("hf:llama-1b:kv_heads=5", {}, "must be a multiple of kv_heads=5"),
    ],
)
def test_wrong_numbers_are_one_line(name: str, options: dict[str, object], text: str) -> None:
    assert text in says(name, **options)


def test_hf_names_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'deepplan[hf]'" in says("hf:bert-base")


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("shop:fails", "the factory raised ValueError: no luck today"),
        ("shop:leaves", "the factory raised SystemExit: 3"),
        ("shop:number", "returned int; it must return a torch.nn.Module"),
        ("shop:needs", "missing a required argument: 'width'"),
        ("shop:NUMBER", "is a int, not a function"),
        ("shop:MODEL", "is a Linear, not a function"),
        ("shop:imag", "has no 'imag'; nearest: image"),
        ("shop:image.deep", "has no 'deep'; name a function of it that makes a module"),
        ("shop:", "a factory is named package.module:callable"),
        (":image", "a factory is named package.module:callable"),
        ("shop:no_inputs", "returned no inputs"),
        ("shop:odd_inputs", "must be a tensor or a tuple of tensors"),
        ("shop:lazy", "'weight' has no shape yet"),
        ("shop:sparse", "'sp' is torch.sparse_coo, whose bytes cannot be moved; make it a dense tensor"),
        (
            "no_such_package.x:make",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'; name a module of an installed package or "
            "of the current folder",
        ),
        ("shop.py:image", "; name as shop:image"),
        ("broken:make", "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("script:make", "cannot be imported: SystemExit: usage: script.py FILE"),
    ],
)
def test_a_factory_that_is_none_is_one_line(name: str, text: str) -> None:
    assert text in says(name)


@pytest.mark.usefixtures("factories")
def test_factories_bring_their_inputs_or_take_an_image() -> None:
    assert build("shop:Plain", device="meta").inputs[0].shape == (1, 3, 224, 224)
    assert build("shop:image", batch=2).inputs[0].shape == (2, 3, 224, 224)
    assert build("shop:with_inputs", batch=5).inputs[0].shape == (5, 4)
    first, second = build("shop:two_inputs", dtype="bf16").inputs
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.bfloat16)
    assert build("shop:example").batch == 6
    assert "batch 4: model 'shop:example' brings inputs of shape (6, 4)" in says("shop:example", batch=4)
    assert "takes no token sequence" in says("shop:image", seq=4)


@pytest.mark.usefixtures("factories")
def test_a_factorys_module_is_cast_where_that_was_asked_for() -> None:
    """An fp32 plan would fit no module that the user has."""
    assert "model 'shop:half': its weights are in fp16; pass --dtype fp16 to take them as they are" in says(
        "shop:half"
    )
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        built = build("shop:half", dtype=name)
        assert (built.module.weight.dtype, built.inputs[0].dtype, built.dtype) == (dtype, dtype, name)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shared_storages_survive_the_way_to_any_device_and_dtype(
    device: Literal["cpu", "meta"], dtype: str
) -> None:
    built = build("shop:Careful", device=device, dtype=dtype)
    module: Any = built.module
    assert {t.device.type for t in (*module.parameters(), *module.buffers(), *built.inputs)} == {device}
    assert module.tied.weight is module.b.weight
    assert module.a.weight.untyped_storage()._cdata == module.b.weight.untyped_storage()._cdata
    assert module.b.weight.storage_offset() == 64
    assert module.a.weight.untyped_storage().nbytes() == 3 * 64 * (4 if dtype == "fp32" else 2)
    assert module.count.dtype == torch.int64
    assert module(*built.inputs).shape == (1, 8)


@pytest.mark.usefixtures("factories")
def test_a_factory_in_the_current_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.py").write_text("import torch\ndef make(): return torch.nn.Conv2d(3, 1, 1)")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert isinstance(build("mine:make", device="meta").module, nn.Conv2d)
