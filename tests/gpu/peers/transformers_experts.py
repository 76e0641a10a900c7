"""The experts implementations of transformers, by their own names: PEER_IMPLEMENTATION is grouped_mm or batched_mm."""

import os

import common

IMPLEMENTATION = os.environ.get("PEER_IMPLEMENTATION", "grouped_mm")
NAME = f"transformers {IMPLEMENTATION}"


def prepare(layer):
    import torch

    try:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise common.Skip(f"no transformers with experts modules: {error}") from error
    config = Qwen3MoeConfig(hidden_size=layer.hidden, moe_intermediate_size=layer.inner, num_experts=layer.experts,
                            num_experts_per_tok=layer.top_k, hidden_act="silu")
    config._experts_implementation = IMPLEMENTATION
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    if tuple(experts.gate_up_proj.shape) != (layer.experts, 2 * layer.inner, layer.hidden):
        raise common.Skip(f"the experts hold weights as {tuple(experts.gate_up_proj.shape)}")

    def call(x, ids, weights, up, down):
        if IMPLEMENTATION == "batched_mm" and ids.numel() * 4 * layer.inner * layer.hidden > 16 << 30:
            raise common.Skip("batched_mm copies the weights of every slot: too much memory")
        for name, value in (("gate_up_proj", up), ("down_proj", down)):
            experts._parameters.pop(name, None)
            experts.__dict__[name] = value
        return experts(x, ids, weights)

    return call


if __name__ == "__main__":
    common.main(NAME, prepare, ids_type="int64", weights_type="bfloat16")
