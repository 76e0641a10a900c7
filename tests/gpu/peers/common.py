"""What all peers share: the routing that the runner left, weights, graph replay and clear skips.

usage: python PEER.py ROUTING_FOLDER SECONDS   (prints one line of JSON for each cell, at once)

A peer is a file with `NAME` and `prepare(layer)`, which returns `call(x, ids, weights, up, down)` or raises `Skip`. All
get the same rows, experts and route weights; they do what follows the router: sorting, both products, the weighted sum.
Ids and route weights come in the types that the peer wants, and before a cell is timed its result is compared with the
plain sum over slots, so that a peer which computes something else is not a peer.
"""

import json
import sys
import time
from pathlib import Path

COLD = 256 << 20  # bytes that must pass before weights are gone from the second-level cache
COPIES = 48 << 30  # most bytes of all copies of a layer's weights


class Skip(Exception):
    """The peer is not here, or does not run this layer."""


class Layer:
    """Shapes of a layer and copies of random weights: gate_up [E, 2I, H] (gate rows first), down [E, H, I], bf16."""

    def __init__(self, shape, torch):
        self.hidden, self.inner, self.experts, self.top_k = (
            shape[k] for k in ("hidden", "inner", "experts", "top_k"))
        one = 6 * self.hidden * self.inner
        touched, all_bytes = one * self.top_k, one * self.experts
        self.copies = max(1, min(8, -(-COLD // touched), COPIES // all_bytes))
        self.weights = []
        for _ in range(self.copies):
            up = torch.empty(self.experts, 2 * self.inner, self.hidden, dtype=torch.bfloat16, device="cuda")
            down = torch.empty(self.experts, self.hidden, self.inner, dtype=torch.bfloat16, device="cuda")
            self.weights.append((up.uniform_(-0.06, 0.06), down.uniform_(-0.06, 0.06)))


def cells(folder, torch):
    """All cells of the runner, by layer: shape and tensors hidden [S, T, H], ids [S, T, k], weights [S, T, k]."""
    by_layer = {}
    for path in sorted(Path(folder).glob("*/shape.json")):
        shape = json.loads(path.read_text())
        by_layer.setdefault(shape["layer"], []).append((shape, path.parent))
    for layer, found in by_layer.items():
        found.sort(key=lambda f: (f[0]["tokens"], str(f[1])))
        yield layer, found


def tensors(shape, folder, torch):
    s, t, h, k = (shape[n] for n in ("sets", "tokens", "hidden", "top_k"))
    read = lambda name, dtype: torch.frombuffer(bytearray((folder / name).read_bytes()), dtype=dtype).to("cuda")
    return (read("hidden.bf16", torch.bfloat16).view(s, t, h), read("ids.i32", torch.int32).view(s, t, k),
            read("weights.f32", torch.float32).view(s, t, k))


def check(torch, layer, rows, call, x, ids, w, up, down):
    """Raises if the peer's result of some tokens is not theirs; `rows(inner)` are the gate's and the up product's rows."""
    gate, linear = (r.to(x.device) for r in rows(torch, layer.inner))
    got = call(x, ids, w, up, down).float()
    for t in sorted({0, x.shape[0] // 2, x.shape[0] - 1}):
        wanted = torch.zeros(layer.hidden, device=x.device)
        for e, share in zip(ids[t].tolist(), w[t].tolist()):
            both = up[e].float() @ x[t].float()
            wanted += share * (down[e].float() @ (torch.nn.functional.silu(both[gate]) * both[linear]))
        off = (got[t] - wanted).norm() / wanted.norm()
        if not off < 0.03:
            raise ValueError(f"token {t} is off by {off.item():.3g} of its length: not the same layer")


def halves(torch, inner):
    """Rows of gate_up as the layers here have them: all of the gate, then all of the up product."""
    return torch.arange(inner), torch.arange(inner, 2 * inner)


def timed(torch, once, launches, graph):
    """Microseconds of a call: median, least and most of five samples of a replayed graph, or of plain calls."""
    once()
    torch.cuda.synchronize()
    graphed = graph
    try:
        if not graph:
            raise RuntimeError("waits for the device: a graph cannot hold it")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            once()
        replay = recorded.replay
    except Exception:
        torch.cuda.synchronize()
        graphed, replay = False, once
    replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    replay()
    torch.cuda.synchronize()
    turns = max(1, min(1000, int(0.02 / max(time.perf_counter() - start, 1e-6)) + 1))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(turns):
            replay()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / turns / launches * 1e6)
    samples.sort()
    return {"us": samples[2], "us_least": samples[0], "us_most": samples[-1], "graph": graphed}


def main(name, prepare, ids_type="int32", weights_type="float32", rows=halves, graph=True):
    folder, seconds = sys.argv[1], float(sys.argv[2])
    emit = lambda **row: print(json.dumps({"kind": "peer", "peer": name, **row}), flush=True)
    try:
        import torch
    except ImportError as error:
        return emit(skipped=f"no torch: {error}")
    if not torch.cuda.is_available():
        return emit(skipped="torch sees no GPU")
    end = time.monotonic() + seconds
    with torch.inference_mode():
        for layer, found in cells(folder, torch):
            try:
                weights = Layer(found[0][0], torch)
                call = prepare(weights)
            except Skip as reason:
                emit(layer=layer, skipped=str(reason))
                continue
            except Exception as error:
                emit(layer=layer, failed=f"{type(error).__name__}: {error}"[:500])
                continue
            for shape, path in found:
                routing = path.name[len(layer) + 1:].rsplit("-", 1)[0]
                cell = {"layer": layer, "tokens": shape["tokens"], "routing": routing}
                if time.monotonic() > end:
                    emit(**cell, skipped="out of time")
                    continue
                try:
                    x, ids, w = tensors(shape, path, torch)
                    ids, w = ids.to(getattr(torch, ids_type)), w.to(getattr(torch, weights_type))
                    sets = x.shape[0]
                    launches = -(-max(8, weights.copies) // sets) * sets

                    def once():
                        for i in range(launches):
                            up, down = weights.weights[i % weights.copies]
                            call(x[i % sets], ids[i % sets], w[i % sets], up, down)

                    check(torch, weights, rows, call, x[0], ids[0], w[0], *weights.weights[0])
                    emit(**cell, **timed(torch, once, launches, graph))
                except Skip as reason:
                    emit(**cell, skipped=str(reason))
                except Exception as error:
                    emit(**cell, failed=f"{type(error).__name__}: {error}"[:500])
                    if "CUDA error" in str(error):
                        return emit(failed="the context is lost")
            weights = call = None
            torch.cuda.empty_cache()
