"""A module sharded on one rank: which parts are, in which types they compute, what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from verl_vla.trainer.engine import fsdp
from verl_vla.trainer.engine.fsdp import keep_gathered, shard, shed_gathered
from verl_vla.trainer.engine.optimizers import build_optimizer, make_state


class Layer(nn.Module):
    """Notes the types that it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.types: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.types = [x.dtype, self.linear.weight.dtype]
        return self.linear(x)


class Model(nn.Module):
    """An embedding that is read directly, and layers that are not split further."""

    _no_split_modules = ("Layer",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding.weight[ids]
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    torch.distributed.destroy_process_group()


def config_of(reshard: bool = True) -> Any:
    precision = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    return SimpleNamespace(mixed_precision=precision, reshard_after_forward=reshard)


def test_layers_and_the_rest_are_sharded_and_hold_the_weights_of_before(mesh: Any) -> None:
    before = {name: weight.clone() for name, weight in Model().state_dict().items()}
    module = Model()
    assert shard(module, mesh, config_of(), None) is module
    parts = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    assert parts == ["", "layers.0", "layers.1"]
    for name, weight in module.named_parameters():
        assert isinstance(weight, DTensor)
        assert weight.dtype == torch.float32, "the optimizer's"
        assert torch.equal(weight.full_tensor(), before[name])


def test_weights_and_inputs_are_used_in_fewer_bits_and_gradients_are_not(mesh: Any) -> None:
    module: Any = shard(Model(), mesh, config_of(), None)
    answer = module(torch.tensor([1, 2]))
    assert module.layers[0].types == [torch.bfloat16] * 2
    answer.float().sum().backward()
    gradients = {weight.grad.dtype for weight in module.parameters()}
    assert gradients == {torch.float32}


def test_inputs_are_cast_for_a_layer(mesh: Any) -> None:
    module: Any = shard(Model(), mesh, config_of(), None)
    module.layers[1](torch.zeros(1, 4, dtype=torch.float32))
    assert module.layers[1].types == [torch.bfloat16] * 2


@pytest.mark.parametrize("offload", [None, CPUOffloadPolicy(pin_memory=False)])
@pytest.mark.parametrize("reshard", [True, False])
def test_the_options_of_the_recipe_reach_every_part(
    mesh: Any, monkeypatch: pytest.MonkeyPatch, offload: Any, reshard: bool
) -> None:
    given: list[dict[str, Any]] = []
    loaded: list[Any] = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda _, **options: given.append(options))
    monkeypatch.setattr(fsdp, "fsdp2_load_full_state_dict", lambda *all_: loaded.append(all_))
    module = Model()
    shard(module, mesh, config_of(reshard), offload)
    assert len(given) == 3
    for options in given:
        policy = options["mp_policy"]
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert policy.cast_forward_inputs
        assert options["mesh"] is mesh
        assert options["reshard_after_forward"] is reshard
        assert ("offload_policy" in options) == (offload is not None)
    ((_, state, *rest),) = loaded
    assert state.keys() == module.state_dict().keys()
    assert rest == [mesh, offload]


def test_weights_are_kept_for_a_rollout_and_given_up_for_an_update(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = shard(Model(), mesh, config_of(), None)
    calls: list[Any] = []
    kind = type(module.layers[0])
    for name in ("set_reshard_after_forward", "reshard"):
        monkeypatch.setattr(
            FSDPModule,
            name,
            lambda part, *given, name=name, **more: calls.append((name, *given, more)),
        )
    assert issubclass(kind, FSDPModule)
    keep_gathered(module)
    assert calls == [("set_reshard_after_forward", False, {"recurse": False})] * 3
    calls.clear()
    shed_gathered(module, True)
    again = ("set_reshard_after_forward", True, {"recurse": False})
    assert calls == [again, ("reshard", {})] * 3


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_an_optimizer_has_the_settings_of_the_recipe(mesh: Any, name: str) -> None:
    module: Any = shard(Model(), mesh, config_of(), None)
    weights = list(module.parameters())
    options: Any = SimpleNamespace(optimizer=name, lr=0.5, betas=[0.7, 0.8], weight_decay=0.25)
    optimizer = build_optimizer(weights, options)
    (group,) = optimizer.param_groups
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.5, (0.7, 0.8), 0.25)
    assert len(group["params"]) == len(weights)
    before = [weight.full_tensor().clone() for weight in weights]
    module(torch.tensor([0, 1])).float().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before[1:], (w.full_tensor() for w in weights[1:])))
    if name != "adamw":
        assert all(shard.grad is None for shard in group["params"]), "their memory is given up"
    # a weight without a gradient stays
    module.zero_grad()
    before = [weight.full_tensor().clone() for weight in weights]
    optimizer.step()
    assert all(map(torch.equal, before, (w.full_tensor() for w in weights)))


class Noting(torch.optim.AdamW):
    """Notes at each step whether its state would be paged, its rates, and the gradients."""

    def __init__(self, weights: list[nn.Parameter], is_paged: bool | None) -> None:
        groups = [{"params": [weight], "lr": 0.1 * (i + 1)} for i, weight in enumerate(weights)]
        super().__init__(groups, weight_decay=0.5)
        self.steps: list[Any] = []
        if is_paged is not None:
            self.is_paged = is_paged

    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        gradients = [float(w.grad.abs().sum()) for g in self.param_groups for w in g["params"]]
        self.steps.append((vars(self).get("is_paged"), rates, gradients))
        return super().step(closure)


@pytest.mark.parametrize("is_paged", [True, False, None])
def test_a_state_that_is_soon_dropped_is_not_paged_and_moves_nothing(is_paged: bool | None) -> None:
    """bitsandbytes never gives up paged memory."""
    weights = list(nn.Linear(2, 3).parameters())
    before = [weight.detach().clone() for weight in weights]
    optimizer = Noting(weights, is_paged)
    make_state(optimizer, weights)
    assert optimizer.steps == [(None if is_paged is None else False, [0.0, 0.0], [0.0, 0.0])]
    assert vars(optimizer).get("is_paged") is is_paged
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert all(map(torch.equal, before, weights))
    assert all(weight.grad is None for weight in weights)
    assert len(optimizer.state) == 2
