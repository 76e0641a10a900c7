"""SGLang's Triton fused MoE with its tuned tiles, when its wheel is here."""

import common

NAME = "sglang triton"


def prepare(layer):
    try:
        from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_experts_impl
    except Exception as error:
        raise common.Skip(f"no sglang: {type(error).__name__}: {error}") from error

    def call(x, ids, weights, up, down):
        return fused_experts_impl(x, up, down, weights, ids, inplace=False, activation="silu")

    return call


if __name__ == "__main__":
    common.main(NAME, prepare)
