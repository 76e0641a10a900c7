"""Liger's fused MoE, when its wheel is here (forward only)."""

import os

import common

NAME = "liger"


def prepare(layer):
    # Its tuner keeps a working set for each candidate; the fixed tiles are what it ships for memory-bound use.
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except Exception as error:
        raise common.Skip(f"no liger_kernel with fused_moe: {type(error).__name__}: {error}") from error

    def call(x, ids, weights, up, down):
        return LigerFusedMoEFunction.apply(x, up, down, ids, weights)

    return call


if __name__ == "__main__":
    # It waits for a count of tiles, which a graph cannot hold.
    common.main(NAME, prepare, graph=False)
