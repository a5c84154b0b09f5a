"""A module's weights in arenas: every kind of tensor, every source, and the module back as it was."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from hwexec.arena import Extents, HostArena
from hwexec.binding import Binding, check_tensors, load, point, region, slots_of
from hwexec.cpu import CpuDevice
from sim.errors import InputError
from sim.network import Network
from tests import toys


def fingerprint(module: nn.Module) -> list[tuple[object, ...]]:
    """Identity and memory of every tensor."""
    return [
        (name, id(t), t.data_ptr(), t.shape, t.stride(), t.dtype, t.device.type)
        for name, t in [*module.named_parameters(), *module.named_buffers()]
    ]


def bound(module: nn.Module, network: Network, weights: object = None) -> tuple[HostArena, Binding]:
    slots = slots_of(module, network)
    arena = HostArena(CpuDevice(1), network.arena_bytes, 0)
    load(slots, network, arena.tensor, weights, "toy")  # type: ignore[arg-type]
    return arena, Binding(slots, network, arena.tensor)


@pytest.mark.parametrize("made", [toys.text(), toys.text(tied=False, dtype=torch.bfloat16), toys.image()])
def test_a_bound_module_answers_from_the_arena_and_release_gives_it_back(made: toys.Toy) -> None:
    before = fingerprint(made.module)
    arena, binding = bound(made.module, made.network)
    low, high = arena.tensor.data_ptr(), arena.tensor.data_ptr() + arena.size_bytes
    assert all(low <= t.data_ptr() < high for t in made.module.parameters() if t.numel())
    with torch.no_grad():
        assert torch.equal(made.module(*made.inputs), made.answer)
        arena.tensor.fill_(0xFF)
        assert not torch.equal(made.module(*made.inputs), made.answer)
    binding.release()
    assert fingerprint(made.module) == before
    with torch.no_grad():
        assert torch.equal(made.module(*made.inputs), made.answer)


def test_fp8_scalars_and_integers_lie_where_the_network_says() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 3).to(torch.float8_e4m3fn), requires_grad=False)
            self.register_buffer("n", torch.tensor(7))
            self.register_buffer("flag", torch.tensor([True, False]))
            self.register_buffer("fine", torch.tensor(2.5, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.w.to(x.dtype).t()) * self.n * self.fine.to(x.dtype) * self.flag[0]

    made = toys.toy(Odd(), torch.randn(2, 3))
    arena, binding = bound(made.module, made.network)
    assert [s.dtype for s in made.network.storages] == ["float8_e4m3fn", "int64", "fp64", "bool"]
    assert made.network.arena_bytes == 4 * 256
    assert torch.equal(made.module(*made.inputs), made.answer)
    assert region(made.network, arena.tensor, 1).view(torch.int64).item() == 7
    binding.release()


def test_views_point_one_storage_elsewhere() -> None:
    made = toys.text(("views",))
    _, binding = bound(made.module, made.network)
    index = next(i for i, s in enumerate(made.network.storages) if "first" in s.name)
    other = torch.full((made.network.storages[index].size_bytes,), 0xFF, dtype=torch.uint8)
    point(binding.views(index, other))
    first, second = made.module.blocks[0].first, made.module.blocks[0].second  # type: ignore[union-attr]
    assert first.isnan().all()
    assert second.isnan().all()
    assert second.stride() == (1, 16)
    binding.rest()
    assert not first.isnan().any()
    binding.release()


def test_what_is_loaded_while_bound_goes_to_the_arena_and_outlives_it() -> None:
    made = toys.text(("linear",))
    arena, binding = bound(made.module, made.network)
    made.module.load_state_dict({k: torch.ones_like(v) for k, v in made.module.state_dict().items()})
    index = next(i for i, s in enumerate(made.network.storages) if s.name == "table.weight")
    assert (region(made.network, arena.tensor, index).view(torch.float32) == 1).all()
    binding.release()
    assert all((p == 1).all() for p in made.module.parameters())
    assert made.module.head.weight is made.module.table.weight


def test_a_module_on_the_meta_device_is_filled_from_a_state_dict() -> None:
    made = toys.text(("linear", "norm"))
    state = made.module.state_dict()
    with torch.device("meta"):
        bare = toys.Text(["linear", "norm"], 16, True).eval()
    before = {name: id(p) for name, p in bare.named_parameters()}
    _, binding = bound(bare, made.network, state)
    assert torch.equal(bare(*made.inputs), made.answer)
    assert {name: id(p) for name, p in bare.named_parameters()} == before
    binding.release()
    assert all(p.is_meta for p in bare.parameters())
    with pytest.raises(InputError, match=r"meta device and has no bytes; give weights="):
        bound(bare, made.network)


def test_a_meta_tensor_that_something_else_refers_to_is_named_and_the_others_are_as_they_were() -> None:
    made = toys.text(("linear", "norm"), tied=False)
    with torch.device("meta"):
        bare = toys.Text(["linear", "norm"], 16, False).eval()
    state, before = made.module.state_dict(), fingerprint(bare)
    *_, last = slots_of(bare, made.network)
    kept = weakref.ref(last.tensor)
    with pytest.raises(InputError, match=r"^'head.weight' is on the meta device .* \(.*weakref") as caught:
        bound(bare, made.network, state)
    assert "\n" not in str(caught.value)
    assert fingerprint(bare) == before
    assert all(p.is_meta for p in bare.parameters())
    del kept, caught
    _, binding = bound(bare, made.network, state)
    assert torch.equal(bare(*made.inputs), made.answer)
    binding.release()
    assert fingerprint(bare) == before


def test_a_meta_tensor_that_cannot_go_back_keeps_no_other_and_nobody_from_the_module() -> None:
    made = toys.text(("linear", "norm"), tied=False)
    with torch.device("meta"):
        bare = toys.Text(["linear", "norm"], 16, False).eval()
    _, binding = bound(bare, made.network, made.module.state_dict())
    kept = weakref.ref(bare.head.weight)
    with pytest.raises(
        InputError, match=r"^a tensor cannot go back to the meta device \(.*weakref"
    ) as caught:
        binding.release()
    assert "\n" not in str(caught.value)
    assert [name for name, p in bare.named_parameters() if not p.is_meta] == ["head.weight"]
    check_tensors(bare)  # free again
    del kept, caught
    binding.release()
    assert all(p.is_meta for p in bare.parameters())


def test_safetensors_files_are_read_straight_into_the_arena(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    made, other = toys.text(("linear", "norm", "buffers")), toys.text(("linear", "norm", "buffers"))
    state = {
        k: v for k, v in made.module.state_dict().items() if k != "head.weight"
    }  # tied: files keep one name
    names = sorted(state)
    safetensors.save_file({k: state[k] for k in names[:4]}, tmp_path / "a.safetensors")
    safetensors.save_file({k: state[k] for k in names[4:]}, tmp_path / "b.safetensors")
    for p in other.module.parameters():
        p.data.zero_()
    _, binding = bound(other.module, made.network, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert torch.equal(other.module(*made.inputs), made.answer)
    binding.release()
    assert all((p == 0).all() for p in other.module.parameters())
    with pytest.raises(InputError, match=r"a\.safetensors lacks \d+ tensors of the module"):
        bound(other.module, made.network, tmp_path / "a.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(InputError, match=r"c\.safetensors: no readable safetensors file"):
        bound(other.module, made.network, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"gone: no readable safetensors file"):
        bound(other.module, made.network, str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: s | {"table.weight": torch.zeros(3)},
            r"'table.weight' is float32 \[3\], but float32 \[29, 16\]",
        ),
        (lambda s: s | {"table.weight": s["table.weight"].half()}, r"is float16 \[29, 16\], but float32"),
        (lambda s: s | {"who": torch.zeros(1)}, r"has 'who', which the module has not"),
        (
            lambda s: s | {"table.weight": s["table.weight"].to("meta")},
            r"'table.weight' is on the meta device and has no bytes; give one that has",
        ),
        (lambda s: {k: v for k, v in s.items() if "dense" not in k}, r"the state_dict lacks 2 tensors"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_line(change: object, says: str) -> None:
    made = toys.text(("linear",))
    before = fingerprint(made.module)
    with pytest.raises(InputError, match=says):
        bound(made.module, made.network, change(made.module.state_dict()))  # type: ignore[operator]
    assert fingerprint(made.module) == before


def test_a_module_that_is_not_the_network_is_refused() -> None:
    made = toys.text(("linear",))
    with pytest.raises(InputError, match=r"'blocks.1.dense.weight' is no storage of network"):
        slots_of(toys.text(("linear", "linear")).module, made.network)
    with pytest.raises(
        InputError, match=r"has 928 bytes of bf16, but 1856 of fp32 .* build the module as it was traced"
    ):
        slots_of(toys.text(("linear",), dtype=torch.bfloat16).module, made.network)
    with pytest.raises(InputError, match=r"has 'table.weight', but the module has no such tensor"):
        slots_of(nn.Identity(), made.network)
    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(3).to_sparse())
    with pytest.raises(InputError, match=r"'s' is a Tensor .* only plain strided tensors"):
        slots_of(sparse, made.network)


def test_a_partner_holds_only_what_crosses_it() -> None:
    extents = Extents.of([(5000, 5100), (256, 512), (512, 700)])
    assert extents.rows == ((256, 700, 0), (5000, 5100, 512 + 5000 % 256))
    buffer = torch.arange(extents.size_bytes) % 251
    assert extents.slice(buffer, 300, 600).tolist() == buffer[44:344].tolist()
    assert extents.slice(buffer, 40, 40).numel() == 0
    with pytest.raises(InputError, match="not on this GPU"):
        extents.slice(buffer, 600, 800)


def test_a_host_arena_is_exact_and_goes_with_its_last_view() -> None:
    device = CpuDevice(1)
    arena = HostArena(device, 1_000_003, 0)
    assert arena.tensor.numel() == 1_000_003
    assert list(device.pinned.values()) == [1_000_003]
    arena.close()
    assert device.pinned == {}
    with pytest.raises(InputError, match="closed"):
        arena.view(0)
    with pytest.raises(InputError, match=r"refuses to pin 10 bytes"):
        HostArena(CpuDevice(1, fail_at="pin"), 10, 0)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not show its mappings")
def test_arenas_are_of_huge_pages_where_there_are_any_and_no_forked_childs() -> None:
    device = CpuDevice(1)
    arena = HostArena(device, 5 * 2**20 + 1, 0)
    assert arena.tensor.numel() == 5 * 2**20 + 1
    address, flags = arena.tensor.data_ptr(), list[str]()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            low, _, high = line.split()[0].partition("-")
            inside = int(low, 16) <= address < int(high, 16)
        elif inside and line.startswith("VmFlags"):
            flags = line.split()[1:]
    assert "dc" in flags, "a child of a fork would have every pinned page copied"
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags
    arena.close()
    device.close()
