"""What a trace refuses, in one line with its remedy, and what a trace of a caller's own module leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sim.errors import InputError
from sim.models import Built, build
from sim.network import Network
from sim.trace import trace, trace_module
from tests import toys

LOST = "a cold start brings every weight anew, so what a run writes is lost: take it out of forward"


class Writes(nn.Module):
    """Does something to its own tensors on the way."""

    def __init__(self, act: Callable[[Writes, Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("cnt", torch.zeros(4))
        self.norm, self.table = nn.BatchNorm1d(4), nn.Embedding(5, 4, max_norm=1.0)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        self.act(self, x)
        return x


def counts(module: Any, x: Tensor) -> None:
    module.cnt += 1


def refusal(module: nn.Module, *inputs: Tensor) -> str:
    with pytest.raises(InputError) as caught:
        trace(Built(module, inputs, 1, "fp32", None, "story"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- a forward that writes what a cold start brings -------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("act", "layer", "name"),
    [
        (counts, "1 ((root))", "cnt"),
        (lambda m, x: m.cnt[1:].mul_(2), "1 ((root))", "cnt"),
        (lambda m, x: torch.add(x[0], 1, out=m.cnt), "1 ((root))", "cnt"),
        (lambda m, x: torch._foreach_add_([x[0], m.cnt], 1.0), "1 ((root))", "cnt"),
        (lambda m, x: m.fc.weight.data.copy_(x), "1 ((root))", "fc.weight"),
        (lambda m, x: m.cnt[1:].copy_(x[0, 1:]), "1 ((root))", "cnt"),
        (lambda m, x: (x + m.cnt, m.cnt.copy_(x[0])), "1 ((root))", "cnt"),
        (lambda m, x: m.norm.train()(x), "1 (norm)", "norm.num_batches_tracked"),
        (
            lambda m, x: functional.batch_norm(x, m.norm.running_mean, m.norm.running_var, training=True),
            "1 ((root))",
            "norm.running_mean",
        ),
        (lambda m, x: m.table(torch.zeros_like(x[0], dtype=torch.int64)), "1 (table)", "table.weight"),
    ],
)
def test_a_write_to_a_weight_or_buffer_is_refused_before_it_is_made(
    act: Callable[[Writes, Tensor], Any], layer: str, name: str, device: str
) -> None:
    """Where it was copied it began anew at each start; where it was read in place it was written in the master copy."""
    with torch.device(device):
        module, x = Writes(act).eval(), torch.ones(4, 4)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert refusal(module, x) == f"model 'story': layer {layer} writes its own tensor {name!r}; {LOST}"
    if device == "cpu":
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    with pytest.raises(InputError, match=rf"model 'Writes': layer .* writes its own tensor '{name}'"):
        trace_module(module, (x,))


@pytest.mark.parametrize(
    "act",
    [
        lambda m, x: torch.add(m.cnt, 1, out=torch.empty_like(x[0])),
        lambda m, x: x.add_(m.cnt).mul_(2),
        lambda m, x: torch.zeros_like(m.cnt).copy_(m.cnt),
        lambda m, x: m.cnt.clone().add_(1),
        lambda m, x: m.norm(x),
        lambda m, x: m.fc.weight.detach_(),
        lambda m, x: m.cnt.view(1, 4).squeeze_(0) + m.fc.weight.detach().t_(),
        lambda m, x: m.cnt[:0].copy_(x[0, :0]),
        lambda m, x: m.cnt.copy_(x[0]) + x,
        lambda m, x: m.cnt.zero_().add(1),
    ],
)
def test_writes_to_what_a_run_makes_itself_are_no_harm(act: Callable[[Writes, Tensor], Any]) -> None:
    module = Writes(act).eval()
    assert len(trace_module(module, (torch.ones(4, 4),)).network.layers) >= 1
    assert len(trace(Built(module, (torch.ones(4, 4),), 1, "fp32", None, "story")).network.layers) >= 1


# -- a caller's own module --------------------------------------------------------------------------------------------


def really_run(module: nn.Module, *inputs: Any) -> Network:
    """The network of a run with values, named as `trace_module` names it."""
    found = trace_module(module, inputs).network
    return trace(Built(module, inputs, found.batch, found.dtype, found.seq, found.model)).network


def on_meta(module: nn.Module, *inputs: Any) -> Network:
    """As `trace_module` finds it, and no other way."""
    ran_on: list[str] = []
    hook = module.register_forward_pre_hook(lambda _, args: ran_on.append(args[0].device.type))
    found = trace_module(module, inputs).network
    hook.remove()
    assert ran_on == ["meta"]
    return found


@pytest.mark.parametrize(
    "made",
    [toys.text(), toys.text(tied=False, dtype=torch.bfloat16), toys.text(("views", "bare")), toys.image()],
)
def test_a_module_is_traced_on_the_meta_device_as_a_run_with_values_would_be(made: toys.Toy) -> None:
    found = on_meta(made.module, *made.inputs)
    assert found == really_run(made.module, *made.inputs)
    assert (found.layers, found.storages) == (made.network.layers, made.network.storages)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_32", "hf:bert-base", "hf:gpt2-lm"])
def test_real_models_are_traced_as_by_name(name: str) -> None:
    built = build(name, seq=8 if name.startswith("hf:") else None)
    found = on_meta(built.module, *built.inputs)
    assert found.digest == really_run(built.module, *built.inputs).digest
    # a module of the user's own says nothing of tokens
    by_name = trace(build(name, seq=built.seq, device="meta")).network
    assert (found.layers, found.storages) == (by_name.layers, by_name.storages)


class Notes(nn.Module):
    """Notes on which device it ran, writes its input, and keeps what it made, in an attribute and in a list."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()
        self.mask: Tensor | None = None
        self.kept: list[Tensor] = []
        self.branches = branches
        self.ran_on = RAN_ON

    def forward(self, x: Tensor) -> Tensor:
        RAN_ON.append(x.device.type)
        x += 1
        if self.mask is None:
            self.mask = torch.ones(4, device=x.device)
        y: Tensor = self.relu(self.fc(x * self.mask))
        if self.branches and bool(y.sum() > 1e9):
            return x
        self.kept.append(y)
        return y


RAN_ON: list[str] = []


def test_tracing_runs_no_real_forward_and_touches_neither_inputs_nor_module() -> None:
    """It took seconds, and example inputs came back changed."""
    module, x = Notes(branches=False).eval(), torch.zeros(2, 4)
    names = [name for name, _ in module.named_modules()]
    RAN_ON.clear()
    network = trace_module(module, (x,)).network
    assert RAN_ON == ["meta"]
    assert (module.mask, module.kept) == (None, [])
    assert x.eq(0).all()
    assert [layer.name for layer in network.layers] == ["fc", "relu"]
    assert names == [name for name, _ in module.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module(x).device.type == "cpu"


def test_a_forward_that_looks_at_values_is_run_with_copies_of_its_inputs() -> None:
    module, x = Notes(branches=True).eval(), torch.zeros(2, 4)
    RAN_ON.clear()
    assert [layer.name for layer in trace_module(module, (x,)).network.layers] == ["fc", "relu"]
    assert RAN_ON == ["meta", "cpu"]
    assert x.eq(0).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Round(nn.Module):
    """What it calls is bound to the module that it was made in, and no copy of it."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.fc, self.relu, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.step = (lambda x: functional.linear(x, self.fc.weight)) if weights else (lambda x: self.relu(x))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.step(self.fc(x)))
        return out


@pytest.mark.parametrize("weights", [False, True])
def test_calls_that_go_past_a_copy_are_seen_all_the_same(weights: bool) -> None:
    module, x = Round(weights).eval(), torch.ones(2, 4)
    names = [layer.name for layer in trace_module(module, (x,)).network.layers]
    assert names == (["fc", "(root)", "last"] if weights else ["fc", "relu", "last"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Keeps(nn.Module):
    """Looks at values, and keeps what it made in one run for the next to write."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.kept = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        self.kept = torch.zeros_like(out) if self.kept is None or bool(out.isnan().any()) else self.kept
        return self.kept.copy_(out)


def test_what_a_forward_keeps_of_a_traced_run_no_later_run_meets() -> None:
    module, x = Keeps().eval(), torch.ones(2, 4)
    assert len(trace_module(module, (x,)).network.layers) == 1
    assert module.kept is None, "a run in inference mode made it, and no other could write it"
    with torch.no_grad():
        assert module(x).equal(module.fc(x))


def test_what_cannot_be_copied_is_run_as_it_is() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: object) -> Locked:
            raise TypeError("there is one of me")

    assert trace_module(Locked(4, 4), (torch.ones(2, 4),)).network.layers[0].kind == "Locked"


def test_recurrent_modules_keep_their_weights_and_those_on_the_meta_device_need_none() -> None:
    module, x = nn.Sequential(nn.LSTM(4, 4, 2), nn.Identity()).eval(), torch.ones(3, 1, 4)
    flat = [id(w) for w in module[0]._flat_weights]
    (layer,) = on_meta(module, x).layers
    assert len(layer.reads) == 8
    assert [id(w) for w in module[0]._flat_weights] == flat
    with torch.device("meta"):
        bare = toys.Text(["linear"], 16, True).eval()
    made = toys.text(("linear",))
    assert on_meta(bare, *made.inputs).digest == made.network.digest


# -- remedies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [
        lambda m, x: x + torch.ones(4),
        lambda m, x: torch.cat([x, torch.ones(4, 4)]),
        lambda m, x: torch.where(torch.ones(4) > 0, x, x),
        lambda m, x: nn.LSTM(4, 4, device="cpu")(x),
    ],
)
def test_a_tensor_made_on_the_cpu_is_to_be_made_on_the_inputs_device(
    act: Callable[[Writes, Tensor], Any],
) -> None:
    with torch.device("meta"):
        module, x = Writes(act).eval(), torch.ones(4, 4)
    message = refusal(module, x)
    assert message.startswith("model 'story' stopped in layer 0, module ")
    assert "make it on its input's device (device=x.device)" in message
    assert "depend on shapes" not in message


@pytest.mark.filterwarnings("ignore")
def test_quantized_operators_are_named_as_such() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    module = quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)).eval(), {nn.Linear})
    message = refusal(module, torch.ones(1, 4, device="meta"))
    assert "quantized::linear_dynamic" in message
    assert message.endswith(
        "quantized operators cannot be traced: give the module as it was before it was quantized"
    )


def test_values_that_a_forward_looks_at_are_still_told_as_such() -> None:
    with torch.device("meta"):
        for act in (lambda m, x: bool(x.sum() > 0), lambda m, x: x.numpy(), lambda m, x: x.nonzero()):
            assert "take the branch on values out of its forward" in refusal(
                Writes(act).eval(), torch.ones(4, 4)
            )


SCRIPTED = """
import torch
from torch import nn
class Plain(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.example_inputs = torch.ones(1, 2)
    def forward(self, x): return self.inner(x)
def root(): return torch.jit.script(nn.Linear(2, 2)), torch.ones(1, 2)
def part(): return Plain(torch.jit.script(nn.Linear(2, 2)))
def keyed(): return nn.Linear(2, 2), {"x": torch.ones(1, 2)}
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scripted.py").write_text(SCRIPTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scripted", raising=False)


@pytest.mark.usefixtures("scripted")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(("name", "where"), [("root", "(root)"), ("part", "inner")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_factory_of_torchscript_is_refused_in_one_line(name: str, where: str, device: Any) -> None:
    with pytest.raises(InputError) as caught:
        build(f"scripted:{name}", device=device)
    assert str(caught.value) == (
        f"model 'scripted:{name}': module {where!r} is TorchScript, which shows no operators; give the module that it "
        "was made from"
    )


@pytest.mark.usefixtures("scripted")
def test_example_inputs_by_keyword_are_told_the_way_round() -> None:
    with pytest.raises(InputError) as caught:
        build("scripted:keyed")
    assert str(caught.value) == (
        "model 'scripted:keyed': example inputs by keyword ('x') are not taken; wrap the module in one whose forward "
        "takes them by position, and give a tuple"
    )
