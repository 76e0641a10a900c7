"""torch alone: sort, two grouped products, activation, weighted sum."""

import common

NAME = "torch grouped_mm"


def prepare(layer):
    import torch
    import torch.nn.functional as F

    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        raise common.Skip("this torch has no grouped_mm")

    def call(x, ids, weights, up, down):
        experts, order = torch.sort(ids.reshape(-1), stable=True)
        ends = torch.searchsorted(experts, torch.arange(layer.experts, device=x.device), right=True, out_int32=True)
        gate, linear = grouped(x[order // layer.top_k], up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        y = grouped(F.silu(gate) * linear, down.transpose(1, 2), offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y = y[back].view(*ids.shape, layer.hidden)
        return (y * weights.unsqueeze(-1)).sum(1)

    return call


if __name__ == "__main__":
    common.main(NAME, prepare, weights_type="bfloat16")
