"""An exponential moving average of the parameters, kept with the optimizer's states.

It is the state `average` of each parameter: sharded as the other states are, saved and resumed with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pieces import local_tensor

AVERAGE = "average"


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """`average = decay * average + (1 - decay) * parameter` for every trained parameter, in place.

    To be called between `optimizer.step()` and the removal of the gradients. An average begins as the value of its
    parameter after that parameter's first step, as in `torch.optim.swa_utils.AveragedModel`: not earlier, because
    AdamW makes its own states only where there are none. A parameter that never has a gradient has no average.
    """
    averages: list[Tensor] = []
    values: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if AVERAGE not in state and parameter.grad is not None:
                state[AVERAGE] = parameter.detach().clone()
            elif AVERAGE in state:
                averages.append(local_tensor(state[AVERAGE]))
                values.append(local_tensor(parameter.detach()))
    if averages:
        torch._foreach_lerp_(averages, values, 1.0 - decay)
