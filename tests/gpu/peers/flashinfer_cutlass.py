"""FlashInfer's CUTLASS fused MoE, when its wheel (with kernels built ahead of time) is here."""

import common

NAME = "flashinfer cutlass"


def prepare(layer):
    import torch

    try:
        from flashinfer.fused_moe import cutlass_fused_moe
    except Exception as error:
        raise common.Skip(f"no flashinfer: {type(error).__name__}: {error}") from error

    def call(x, ids, weights, up, down):
        return cutlass_fused_moe(input=x, token_selected_experts=ids, token_final_scales=weights,
                                 fc1_expert_weights=up, fc2_expert_weights=down, output_dtype=torch.bfloat16,
                                 quant_scales=[])

    return call


if __name__ == "__main__":
    common.main(NAME, prepare)
