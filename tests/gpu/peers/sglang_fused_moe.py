"""SGLang's Triton fused MoE with its tuned tiles, when its wheel is here.

The wheel is Python only. Its kernels and tables are loaded as they are; the rest of the package and its CUDA library
are stood in for: the sort by two kernels of the same design (one block counts, many place rows), the sum over slots by
the Triton kernel that the wheel has for it. A layer without a table for this GPU takes the nearest one.
"""

import importlib
import importlib.util
import json
import sys
import types
from math import log2
from pathlib import Path

import common
import triton
import triton.language as tl

NAME = "sglang triton"
HOME = "sglang.srt.layers.moe.fused_moe_triton"


@triton.jit
def count(ids, n, ends, at, total, rows, length, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
          CHUNK: tl.constexpr):
    """Program 0: rows of each expert, filled up to BLOCK, as first and one-past-last place; the others fill `rows`."""
    pid = tl.program_id(0)
    if pid == 0:
        bins = tl.arange(0, BINS)
        counts = tl.zeros([BINS], tl.int32)
        for start in range(0, n, CHUNK):
            i = start + tl.arange(0, CHUNK)
            counts += tl.histogram(tl.load(ids + i, mask=i < n, other=E), BINS)
        filled = tl.where(bins < E, (counts + BLOCK - 1) // BLOCK * BLOCK, 0)
        last = tl.cumsum(filled, 0)
        tl.store(ends + bins, last, mask=bins < E)
        tl.store(at + bins, last - filled, mask=bins < E)
        tl.store(total, tl.sum(filled, 0))
    else:
        i = (pid - 1) * CHUNK + tl.arange(0, CHUNK)
        tl.store(rows + i, tl.zeros([CHUNK], tl.int32) + n, mask=i < length)


@triton.jit
def place(ids, n, ends, at, rows, experts, blocks, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
          CHUNK: tl.constexpr):
    """Every slot to the next place of its expert; the expert of every block (-1 past the last one)."""
    pid = tl.program_id(0)
    i = pid * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + i, mask=i < n, other=0)
    to = tl.atomic_add(at + expert, 1, mask=i < n)
    tl.store(rows + to, i, mask=i < n)
    block = pid * 64 + tl.arange(0, 64)
    bins = tl.arange(0, BINS)
    last = tl.load(ends + bins, mask=bins < E, other=2147483647)
    owner = tl.sum((last[None, :] <= block[:, None] * BLOCK).to(tl.int32), 1)
    tl.store(experts + block, tl.where(owner < E, owner, -1), mask=block < blocks)


def align(ids, block, experts):
    """As the wheel's `moe_align_block_size`: rows by expert, the expert of each block, rows with those filled up."""
    import torch

    n = ids.numel()
    length = n * block if n < experts + 1 else n + (experts + 1) * (block - 1)
    blocks = triton.cdiv(length, block)
    new = lambda size: torch.empty(size, dtype=torch.int32, device=ids.device)
    rows, owners, total, ends, at = new(length), new(blocks), new(1), new(experts), new(experts)
    sizes = {"E": experts, "BINS": triton.next_power_of_2(experts + 1), "BLOCK": block, "CHUNK": 1024}
    count[(1 + triton.cdiv(length, 1024),)](ids, n, ends, at, total, rows, length, **sizes)
    place[(max(triton.cdiv(n, 1024), triton.cdiv(blocks, 64)),)](ids, n, ends, at, rows, owners, blocks, **sizes)
    return rows, owners, total


def stand_in(name, **names):
    module = types.ModuleType(name)
    module.__path__ = []
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def wheel(device):
    """The module with `fused_experts_impl`, and the tile tables of this GPU as {(experts, inner): path}."""
    found = next((Path(p) / "sglang" for p in sys.path if (Path(p) / "sglang").is_dir()), None)
    if found is None:
        raise common.Skip("no sglang")
    here = found / "srt" / "layers" / "moe" / "fused_moe_triton"
    no, settings = (lambda *_, **__: False), types.SimpleNamespace(
        enable_deterministic_inference=False, enable_fused_moe_sum_all_reduce=False)
    for name in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.moe", "sglang.srt.layers.quantization"):
        stand_in(name)
    stand_in("sglang.srt.batch_invariant_ops", is_batch_invariant_mode_enabled=no)
    quantized = ("per_token_group_quant_fp8", "scaled_fp8_quant", "sglang_per_token_group_quant_fp8",
                 "per_token_group_quant_int8", "per_token_quant_int8", "sglang_per_token_group_quant_int8")
    for name in ("fp8_kernel", "int8_kernel"):
        stand_in(f"sglang.srt.layers.quantization.{name}", **dict.fromkeys(quantized))
    stand_in("sglang.srt.utils", cpu_has_amx_support=no, get_bool_env_var=no, is_cpu=no, is_hip=no, is_xpu=no,
             use_intel_xpu_backend=no, is_cuda=lambda: True, is_sm90_supported=lambda: True,
             get_device_name=lambda: device)
    stand_in("sglang.srt.utils.custom_op", register_custom_op=lambda **_: lambda f: f)
    stand_in("sglang.srt.server_args", get_global_server_args=lambda: settings)
    stand_in("sglang.srt.layers.moe.moe_runner", MoeRunnerConfig=object)
    stand_in("sgl_kernel", gelu_and_mul=None, silu_and_mul=None, moe_sum_reduce=None)
    home = stand_in(HOME, tile=None)
    home.get_config = lambda: home.tile
    home.__path__ = [str(here)]
    stand_in(f"{HOME}.moe_align_block_size", moe_align_block_size=align)
    module = importlib.import_module(f"{HOME}.fused_moe")
    module.moe_sum_reduce = module.moe_sum_reduce_torch_compile = module.moe_sum_reduce_triton
    tables = {}
    for path in sorted(here.glob(f"configs/*/E=*,N=*,device_name={device.replace(' ', '_')}.json")):
        experts, inner = (int(part.split("=")[1]) for part in path.name.split(",")[:2])
        tables[experts, inner] = path
    return module, home, tables


def prepare(layer):
    import torch

    module, home, tables = wheel(torch.cuda.get_device_name())
    if not tables:
        raise common.Skip("no tables for this GPU")
    away = lambda key: abs(log2(key[0] / layer.experts)) + abs(log2(key[1] / layer.inner))
    table = {int(k): v for k, v in json.loads(tables[min(tables, key=away)].read_text()).items()}

    def call(x, ids, weights, up, down):
        home.tile = table[min(table, key=lambda t: abs(t - x.shape[0]))]
        return module.fused_experts_impl(x, up, down, weights, ids, inplace=False, activation="silu")

    return call


if __name__ == "__main__":
    common.main(NAME, prepare)
