"""Times a mixture layer in PyTorch: stdin brings its sizes, then numbers of tokens; each JSON line has its answer."""

import json
import sys
import time

import torch
import torch.nn.functional as F


def layer(x, router, gate_up, down, top_k):
    """Softmax router, top-k, gated experts one after another on the rows that chose them."""
    scores = torch.softmax(x.float() @ router.float().T, dim=-1)
    weights, chosen = torch.topk(scores, top_k, dim=-1)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
    out = torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        rows, slot = torch.where(chosen == expert)
        gate, up = F.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, rows, y * weights[rows, slot, None])
    return out


def main():
    request = json.loads(sys.stdin.readline())
    device = request["device"]
    dtype = getattr(torch, request["dtype"])
    hidden, inner, experts = request["hidden"], request["inner"], request["experts"]
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    torch.manual_seed(1)
    make = lambda *shape: torch.empty(*shape, dtype=dtype, device=device).uniform_(-0.05, 0.05)
    router, gate_up, down = make(experts, hidden), make(experts, 2 * inner, hidden), make(experts, hidden, inner)
    answer({"name": "torch", "version": torch.__version__})
    with torch.inference_mode():
        for line in sys.stdin:
            tokens = json.loads(line)
            inputs = [torch.randn(tokens, hidden, dtype=dtype, device=device) for _ in range(8)]
            times = []
            start = time.perf_counter()
            for turn in range(1000):
                before = time.perf_counter()
                layer(inputs[turn % 8], router, gate_up, down, request["top_k"])
                if device != "cpu":
                    torch.cuda.synchronize()
                after = time.perf_counter()
                if turn >= 2:
                    times.append(after - before)
                if len(times) >= 5 and after - start > 1:
                    break
            times.sort()
            answer({"tokens": tokens, "median_ms": times[len(times) // 2] * 1e3, "launches": len(times)})


def answer(value):
    print(json.dumps(value), flush=True)


main()
