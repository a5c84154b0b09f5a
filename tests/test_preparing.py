"""The way in: what `prepare` takes, what it leaves alone, and one line for whatever does not fit."""

from __future__ import annotations

import copy
import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import hwexec
from hwexec import verify
from hwexec.cpu import CpuDevice
from sim.errors import InputError
from sim.files import PlanFile, read_plan, write_plan
from sim.models import Built
from sim.plan import Launch
from sim.profile import Provenance
from sim.trace import trace_module
from tests import builders, toys
from tests.test_arena import fingerprint
from tests.toys import TWO, Toy, cold_start, dealt

MADE = Provenance("test", "GPU", "test", "", "")


def prepare(made: Toy, plan: Any = None, **changed: Any) -> hwexec.ColdStart:
    given = {"host": TWO, "network": made.network, "device": "cpu", "example_inputs": made.inputs} | changed
    return hwexec.prepare(given.pop("module", made.module), plan or dealt(made), **given)


def says(made: Toy, plan: Any = None, **changed: Any) -> str:
    """Why it is refused, in one line, with the module as it was."""
    before = fingerprint(made.module)
    with pytest.raises(InputError) as caught:
        prepare(made, plan, **changed)
    assert fingerprint(made.module) == before
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.module.modules())
    return str(caught.value)


def file_of(made: Toy, **changed: Any) -> PlanFile:
    """A plan as a file has it, made for the toy and TWO."""
    net = made.network
    found = PlanFile(
        model=net.model,
        dtype=net.dtype,
        batch=net.batch,
        seq=net.seq,
        network_digest=net.digest,
        host=TWO.name,
        host_digest=TWO.digest,
        profile_kind="estimated",
        provenance=MADE,
        plan=dealt(made),
        mean_ns=None,
        predicted_ns=2.0,
        bound_ns=1.0,
    )
    return replace(found, **changed)


# -- what it takes ----------------------------------------------------------------------------------------------------


def test_a_plan_file_is_taken_and_held_against_host_and_network(tmp_path: Path) -> None:
    made = toys.text(("linear", "norm"))
    file = file_of(made)
    write_plan(tmp_path / "plan.yaml", file)
    for plan in (file, read_plan(tmp_path / "plan.yaml")):
        with prepare(made, plan) as cold:
            assert torch.equal(cold(*made.inputs), made.answer)
    other = builders.host(2, pcie=2.0)
    for host in (other, replace(other, name="elsewhere")):
        message = says(made, file, host=host)
        assert message.startswith("plan 'dealt': made for ")
        assert message.endswith(
            f"search again for {host.name}, pass as host= the one that it was made for, or the file's .plan to run it all "
            "the same"
        )
    assert says(made, replace(file, network_digest="0" * 64)).startswith(
        "plan 'dealt': made for another network than toy is here: layers, storages or their names differ"
    )
    assert "made for toy, fp32, batch 7, not for toy, fp32, batch 2" in says(
        made, replace(file, batch=7, network_digest="0" * 64)
    )


def test_a_plan_file_of_a_named_model_is_for_a_module_of_ones_own_too() -> None:
    """A module says nothing of its name and its tokens; all else must be alike."""
    made = toys.text(("linear", "norm"))
    named = replace(made.network, model="hf:toy", seq=5)
    file = file_of(made, model="hf:toy", seq=5, network_digest=named.digest)
    with prepare(made, file, network=None) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)
    assert "made for hf:toy, fp32, batch 3, 5 tokens, not for hf:toy, fp32, batch 2, 5 tokens" in says(
        made, replace(file, batch=3, network_digest="0" * 64), network=None
    )
    longer = (torch.zeros(2, 6, dtype=torch.int64),)
    told = says(made, file, network=None, example_inputs=longer)
    assert told.startswith("plan 'dealt': made for another network than this Text is here: ")
    assert told.endswith("; give the module that it was made for, or search a plan for this one")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"plan": "plan.yaml"},
            "plan 'plan.yaml' is a str; pass a sim.plan.Plan, or what sim.files.read_plan(path) gives",
        ),
        (
            {"host": "p3.8xlarge"},
            "host 'p3.8xlarge' is a str; pass a sim.host.Host: sim.catalog.find_host(name) gives one that ships, "
            "sim.files.read_host(path) one of a file",
        ),
        ({"network": "resnet50"}, "network 'resnet50' is a str; pass a sim.network.Network, or leave it out"),
        ({"module": nn.functional.relu}, "is a function; pass a torch.nn.Module"),
        ({"device": 0}, "device 0 is a int; pass 'cuda', 'cpu' or a hwexec.Device"),
        ({"device": torch.device("cuda:1")}, "device cuda:1: the plan says which GPUs it uses; pass 'cuda'"),
        ({"device": torch.device("meta")}, "device 'meta': there is 'cuda' and 'cpu'; choose one of them"),
        ({"weights": nn.Linear(2, 2)}, "is a Linear; pass a state_dict, or paths of safetensors files"),
        ({"weights": [3]}, "weights [3] is a list; pass a state_dict, or paths of safetensors files"),
        ({"weights": {"table.weight": 3}}, "the state_dict: 'table.weight' is a int; pass a tensor"),
    ],
)
def test_what_is_of_the_wrong_kind_is_one_line(changed: dict[str, Any], text: str) -> None:
    assert text in says(toys.text(("linear",)), **changed)


def test_devices_of_torchs_kind_count_as_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made = toys.text(("linear",))
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        with prepare(made, device=device) as cold:
            assert torch.equal(cold(*made.inputs), made.answer)
            workers = cold.device._workers  # type: ignore[attr-defined]
            assert workers
        assert not workers, "a device that was opened here is closed here"
    monkeypatch.setattr("hwexec.devices.CudaDevice", lambda: CpuDevice(2))
    assert isinstance(hwexec.open_device(torch.device("cuda")), CpuDevice)


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planned", "here", "words"),
    [
        (torch.float32, torch.float16, ("fp32", "fp16")),
        (torch.float32, torch.bfloat16, ("fp32", "bf16")),
        (torch.bfloat16, torch.float32, ("fp16 or bf16", "fp32")),
    ],
)
def test_a_plan_for_another_dtype_names_both(
    planned: torch.dtype, here: torch.dtype, words: tuple[str, str]
) -> None:
    of_plan, made = toys.text(("linear", "norm"), dtype=planned), toys.text(("linear", "norm"), dtype=here)
    there, now = words
    message = says(made, dealt(of_plan), network=None)
    assert message == (
        f"plan 'dealt': fits Text in {there}, but the module is in {now}; search again with --dtype {now}, or prepare "
        f"the module in {there}"
    )
    net = trace_module(of_plan.module, of_plan.inputs).network
    file = file_of(of_plan, model=net.model, dtype=net.dtype, network_digest=net.digest)
    assert says(made, file, network=None) == (
        f"plan 'dealt': made for Text in {net.dtype}, but the module is in {now}; search again with --dtype {now}, or "
        f"prepare the module in {net.dtype}"
    )


def test_a_plan_that_fits_in_no_dtype_is_told_as_before() -> None:
    made = toys.text(("linear",))
    plan = dealt(made)
    assert "no chunks bring all of it" in says(made, replace(plan, chunks=plan.chunks[1:]), network=None)


# -- what it leaves alone ---------------------------------------------------------------------------------------------


class Adds(nn.Module):
    """Writes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        out: Tensor = self.fc(x)
        return out


def test_example_inputs_come_back_as_they_were() -> None:
    made = toys.toy(Adds(), torch.zeros(2, 4))
    made.inputs[0].zero_()
    with prepare(made, network=None):
        assert made.inputs[0].eq(0).all()


# -- tensors in use ---------------------------------------------------------------------------------------------------

IN_USE = "'{}' is in use by another ColdStart; close that, or prepare a copy (copy.deepcopy)"


@pytest.mark.parametrize("traced", [True, False])
def test_a_module_is_prepared_once_at_a_time(traced: bool) -> None:
    made = toys.text()
    again = {"network": made.network if traced else None}
    with prepare(made) as cold:
        assert says(made, **again) == IN_USE.format("table.weight")
        assert torch.equal(cold(*made.inputs), made.answer), "the first is as good as before"
    with prepare(made, **again) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)


def test_modules_that_share_a_part_are_prepared_one_at_a_time() -> None:
    shared = nn.Linear(4, 4)
    one = toys.toy(nn.Sequential(nn.Linear(4, 4), shared), torch.ones(2, 4))
    two = toys.toy(nn.Sequential(shared, nn.ReLU()), torch.ones(2, 4))
    with prepare(one) as cold:
        for network in (two.network, None):
            assert says(two, network=network) == IN_USE.format("0.weight")
        assert torch.equal(cold(*one.inputs), one.answer)
    with prepare(two) as cold:
        assert torch.equal(cold(*two.inputs), two.answer)


@pytest.mark.parametrize("fault", ["pin", "arena", "kernel#5", "peer"])
def test_tensors_are_free_again_where_preparing_failed(fault: str) -> None:
    made = toys.text(("linear", "norm"))
    with pytest.raises(InputError):
        cold_start(made, dealt(made), CpuDevice(2, fail_at=fault))
    with prepare(made) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)


def test_tensors_of_a_cold_start_that_was_dropped_are_free_again() -> None:
    made = toys.image()
    gc.disable()
    try:
        cold = prepare(made)
        del cold  # refers to itself, so that only a collection ends it
        with prepare(made) as cold:
            assert torch.equal(cold(*made.inputs), made.answer)
    finally:
        gc.enable()
    with prepare(made) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)


def test_a_copy_of_a_module_in_use_can_be_prepared_beside_it() -> None:
    """Its buffers were views of a copy of the whole arena."""
    made = toys.image()
    with prepare(made) as first:
        copied = copy.deepcopy(made.module)
        with prepare(made, module=copied) as second:
            for cold in (first, second, first):
                cold.evict()
                assert torch.equal(cold(*made.inputs), made.answer)
    sizes = {t.untyped_storage().nbytes() for t in copied.buffers()}
    assert max(sizes) == 16


# -- inputs -----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Takes tensors, numbers and what holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, by: float = 1.0, *, add: Tensor, more: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.fc(x)
        y = y if math.isnan(by) else y * by
        return y + add - more["a"] * more["b"]


def scaled(by: float = 1.0) -> tuple[Toy, dict[str, Any]]:
    """A toy of inputs by keyword, whose network is traced by position."""

    class Positional(Scaled):
        def forward(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, by, add=a, more={"a": b, "b": c})

    torch.manual_seed(0)
    x, a, b, c = torch.randn(4, 2, 4)
    made = toys.toy(Positional(), x, a, b, c)
    module = Scaled().eval()
    module.load_state_dict(made.module.state_dict())
    return Toy(module, (x,), made.network, made.answer), {
        "x": x,
        "by": by,
        "add": a,
        "more": {"a": b, "b": c},
    }


def test_inputs_by_keyword_are_traced_as_they_are() -> None:
    made, named = scaled(2.0)
    network = trace_module(made.module, named).network
    assert [layer.name for layer in network.layers] == ["fc"]
    assert (network.batch, network.storages) == (2, made.network.storages)
    plan = dealt(replace(made, network=network))
    with hwexec.prepare(made.module, plan, named, host=TWO, device=CpuDevice(2)) as cold:
        assert torch.equal(cold(**named), made.answer)
    with pytest.raises(InputError) as refused:
        trace_module(made.module, named["x"])
    assert str(refused.value).endswith("check that its forward takes inputs of (2, 4)")
    with pytest.raises(InputError, match="check that its forward takes no inputs"):
        trace_module(made.module, ())


@pytest.mark.parametrize("launch", [Launch.GRAPH, Launch.EAGER])
def test_inputs_by_keyword_come_in_any_order(launch: Launch) -> None:
    made, named = scaled(2.0)
    turned = {key: named[key] for key in reversed(named)}
    turned["more"] = {key: named["more"][key] for key in ("b", "a")}
    with prepare(made, dealt(made, launch), example_inputs=named) as cold:
        for given in (named, turned):
            cold.evict()
            assert torch.equal(cold(**given), made.answer)
        for wrong in ({"x": named["x"]}, named | {"who": 1}, named | {"more": {"a": named["add"]}}):
            with pytest.raises(InputError, match="the inputs are not built like the example's; give as many"):
                cold(**wrong)


def test_numbers_are_the_examples_and_a_nan_is_like_a_nan() -> None:
    made, named = scaled(math.nan)
    with prepare(made, example_inputs=named) as cold:
        assert torch.equal(cold(**named | {"by": float("nan")}), made.answer)
        with pytest.raises(
            InputError, match=r"input 1 is 2.0, but nan in the example; prepare the module again"
        ):
            cold(**named | {"by": 2.0})
        with pytest.raises(InputError, match=r"input 1 is None, but nan in the example"):
            cold(**named | {"by": None})


class Loud:
    """An input that cannot be compared and says too much."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value of this is ambiguous")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "loud\n" * 100


def test_what_is_no_tensor_is_told_in_one_line() -> None:
    made, named = scaled()
    array = numpy.zeros((100, 100))
    wanted = "input 0 is a numpy array; pass torch.from_numpy(...) of it"
    assert says(made, example_inputs=named | {"x": array}) == f"Scaled: {wanted}"
    assert says(made, example_inputs=(array,), network=None) == f"Scaled: {wanted}"
    assert says(made, example_inputs=array, network=None) == f"Scaled: {wanted}"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"x": array}, f"toy: {wanted}"),
        (
            {"x": 3},
            "toy: input 0 is 3, but a torch.float32 tensor [2, 4] in the example; prepare the module again for that",
        ),
        (
            {"by": torch.ones(2)},
            "toy: input 1 is a torch.float32 tensor [2], but 1.0 in the example; prepare the module again for that",
        ),
        (
            {"x": ["a"] * 100},
            "toy: the inputs are not built like the example's; give as many, by the same names",
        ),
        (
            {"x": torch.ones(2, 4, device="meta")},
            "toy: input 0 is on the meta device and has no values; give one that has",
        ),
        (
            {"x": torch.ones(2, 4).to_sparse()},
            "toy: input 0 is torch.sparse_coo, but torch.strided in the example; convert it",
        ),
    ]
    bare = named | {"x": torch.ones(2, 4, device="meta")}
    assert (
        says(made, example_inputs=bare)
        == "Scaled: input 0 is on the meta device and has no values; give one that has"
    )
    with prepare(made, example_inputs=named) as cold:
        for changed, text in refused:
            with pytest.raises(InputError) as caught:
                cold(**named | changed)
            assert str(caught.value) == text
        assert torch.equal(cold(**named), made.answer)
    odd = named | {"by": 1.0}
    one, other = Loud(), Loud()

    class Takes(Scaled):
        def forward(self, x: Tensor, by: Any = 1.0, **more: Any) -> Tensor:  # type: ignore[override]
            return super().forward(x, 1.0, **more)

    module = Takes().eval()
    module.load_state_dict(made.module.state_dict())
    with prepare(made, module=module, example_inputs=odd | {"by": one}) as cold:
        assert torch.equal(cold(**odd | {"by": one}), made.answer)
        with pytest.raises(InputError) as caught:
            cold(**odd | {"by": other})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


# -- inference mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize("traced", [True, False])
def test_a_module_prepared_in_inference_mode_starts_anywhere(launch: Launch, traced: bool) -> None:
    made = toys.text(("linear", "norm", "buffers"))
    before = fingerprint(made.module)
    with torch.inference_mode():
        inputs = tuple(t.clone() for t in made.inputs)
        network = made.network if traced else None
        cold = prepare(made, dealt(made, launch, direct=(1,)), network=network, example_inputs=inputs)
    with cold:
        for inside in (False, True, False):
            with torch.inference_mode(inside):
                cold.evict()
                assert torch.equal(cold(*inputs), made.answer)
                assert torch.equal(cold.warm(*made.inputs), made.answer)
                cold.settle()
                assert torch.equal(cold.warm(*inputs), made.answer)
                assert torch.equal(cold.resident(*inputs), made.answer)
                cold.timeline()
    assert fingerprint(made.module) == before
    with prepare(made, dealt(made, launch)) as cold:
        for inside in (True, False):
            with torch.inference_mode(inside):
                assert torch.equal(cold.in_place(*inputs), made.answer), "captured when first asked for"
    assert torch.is_grad_enabled()


# -- verify -----------------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Answers otherwise each time, by a number that it keeps."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.fc, self.by, self.runs = nn.Linear(4, 4), by, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y: Tensor = self.fc(x)
        return y * (1 + self.by * min(self.runs, 3))


@pytest.mark.parametrize(
    ("by", "remark", "failure"),
    [
        (
            1e-6,
            "launched as graph, the resident run chooses other library algorithms than plain PyTorch: difference ",
            "",
        ),
        (
            1.0,
            "",
            "the resident answer is not plain PyTorch's (difference 1, allowed 0.001): a forward that keeps state or "
            "writes its inputs does that",
        ),
    ],
)
def test_library_algorithms_are_blamed_within_the_tolerance_only(
    by: float, remark: str, failure: str
) -> None:
    made = toys.toy(Counts(by), torch.ones(2, 4))
    made.module.runs = 0
    task = verify.Task(
        built=Built(made.module, made.inputs, 2, "fp32", None, "toy"),
        plan=dealt(made),
        network=made.network,
        profile=builders.profile(made.network, TWO),
        host=TWO,
        provenance=MADE,
        runs=1,
    )
    device = CpuDevice(2)
    report = verify.verify(task, device).report
    device.close()
    assert [r.startswith(remark) for r in report.remarks] == ([True] if remark else [])
    assert report.failures == ((failure,) if failure else ())
