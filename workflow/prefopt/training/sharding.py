"""Weights, gradients and optimiser state divided among the processes of a run, by torch's FSDP2.

The model must fit on one device once, before and after training: a copy of it is divided and trained, and the result
is put back into the model, which stays an ordinary one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.engine.packed_attention import packs
from prefopt.engine.precision import Precision, set_precision
from prefopt.engine.quantized import is_quantized
from prefopt.errors import BadInput
from prefopt.processes import parallel

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


class Divided(nn.Module):
    """A copy of a model, divided among the processes; calls run inside it, where its weights are whole.

    Objectives use body and head one by one, not the model's own forward pass, so the gathering around a forward pass
    has to be around the objective. Layers are gathered one at a time, all else at once.
    """

    def __init__(self, model: PreTrainedModel, device: str, precision: Precision) -> None:
        super().__init__()
        if is_quantized(model):
            raise BadInput("4-bit weights cannot be divided among processes; set execution.sharding: none")
        self.source, self.precision = [model], precision  # in a list: no submodule
        set_precision(model, "fp32").to("cpu")  # its wrapped forward would belong to the model, also in a copy
        self.model = set_precision(copy.deepcopy(model).to(device), precision).eval()
        packs(self.model)  # seen by a pass that is no part of a step
        mesh = init_device_mesh(device, (parallel.world(),))
        for layer in self.model.base_model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)
        for module in self.modules():
            if isinstance(module, FSDPModule):  # gradients are summed; FSDP's own way is their mean
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(model, *args)."""
        return function(self.model, *args)

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to the norm, taken over all processes; the norm that it had."""
        parameters = list(self.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).full_tensor()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def put_back(self, device: str) -> None:
        """Give the trained weights to the model that this is a copy of, whole, on ``device``."""
        (model,) = self.source
        model.load_state_dict(tree_map_only(DTensor, lambda part: part.full_tensor().cpu(), self.model.state_dict()))
        set_precision(model.to(device), self.precision)


def gathered(state: Any) -> Any:
    """A state with whole tensors, in main memory, in the first process; without them in the others."""

    def whole(part: DTensor) -> Tensor | None:
        full = part.full_tensor()
        return full.cpu() if parallel.is_main() else None

    return tree_map_only(DTensor, whole, state)


def divide_model_state(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts of a whole state."""
    now = model.state_dict()
    return {name: _part(value, now[name]) if name in now else value for name, value in state.items()}


def divide_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """This process's parts of an optimiser's whole state; what is not as large as its parameter is whole everywhere."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        at: {name: _part(value, parameters[at]) for name, value in values.items()}
        for at, values in state["state"].items()
    }
    return {**state, "state": parts}


def _part(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # all processes have it
