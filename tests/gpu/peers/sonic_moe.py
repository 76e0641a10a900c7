"""SonicMoE (arXiv 2512.14080), when its wheel is here: the entry for a routing that is given.

Its products are tuned for each number of tokens, 31 kernels each: minutes. They run with the tile that its library
takes without tuning; TUNE=1 tunes, for a run of this peer alone.
"""

import os

import common

NAME = "sonicmoe"


def alternate(torch, inner):
    """Its rows of gate and up product alternate, the gate's first."""
    return torch.arange(0, 2 * inner, 2), torch.arange(1, 2 * inner, 2)


def prepare(layer):
    import torch

    try:
        from quack import gemm_interface
        from quack.autotuner import AutotuneConfig
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType
    except Exception as error:
        raise common.Skip(f"no sonicmoe: {type(error).__name__}: {error}") from error
    if os.environ.get("TUNE") != "1":
        for product in (gemm_interface.gemm_tuned, gemm_interface.gemm_gated_tuned):
            product.configs = [AutotuneConfig(config=gemm_interface.default_config(torch.device("cuda")))]
    tokens = {}

    def call(x, ids, weights, up, down):
        t = x.shape[0]
        if t not in tokens:
            tokens[t] = torch.arange(t, device=x.device, dtype=torch.int32).repeat_interleave(layer.top_k)
        return moe_general_routing_inputs(
            x, weights.reshape(-1), tokens[t], ids.reshape(-1), up.permute(1, 2, 0), None, down.permute(1, 2, 0), None,
            layer.experts, torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, True)[0]

    return call


if __name__ == "__main__":
    common.main(NAME, prepare, rows=alternate)
