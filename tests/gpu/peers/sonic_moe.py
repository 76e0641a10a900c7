"""SonicMoE (arXiv 2512.14080), when its wheel is here: the entry for a routing that is given."""

import common

NAME = "sonicmoe"


def prepare(layer):
    import torch

    try:
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType
    except Exception as error:
        raise common.Skip(f"no sonicmoe: {type(error).__name__}: {error}") from error
    def call(x, ids, weights, up, down):
        # Its rows of gate and up alternate; the values are random, so the order of rows need not be ours.
        w1, w2 = up.permute(1, 2, 0), down.permute(1, 2, 0)
        tokens = torch.arange(x.shape[0], device=x.device, dtype=torch.int32).repeat_interleave(layer.top_k)
        return moe_general_routing_inputs(
            x, weights.reshape(-1), tokens, ids.reshape(-1), w1, None, w2, None, layer.experts,
            torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, True)[0]

    return call


if __name__ == "__main__":
    common.main(NAME, prepare)
