"""FlashInfer's CuTe MoE for Hopper, when its wheel is here (with a CuTe DSL of 4.6.2 or later, and nvcc for its sort)."""

import common

NAME = "flashinfer cute"


def blocks(torch, inner):
    """Its rows come in blocks of 32, the up product's before the gate's."""
    at = torch.arange(inner)
    linear = at // 32 * 64 + at % 32
    return linear + 32, linear


def prepare(layer):
    try:
        from flashinfer import cute_dsl_fused_moe_bf16
    except Exception as error:
        raise common.Skip(f"no flashinfer: {type(error).__name__}: {error}") from error

    def call(x, ids, weights, up, down):
        return cute_dsl_fused_moe_bf16(x, ids, weights, up, down, num_experts=layer.experts, top_k=layer.top_k)

    return call


if __name__ == "__main__":
    common.main(NAME, prepare, rows=blocks)
