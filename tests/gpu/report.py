"""One JSON from the lines of all steps: machine, cases, timings, ratios to peers and to the floor."""

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distributions, version
from math import exp, log


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


PACKAGES = ("torch", "triton", "transformers", "sglang", "sonic-moe", "quack-kernels", "nvidia-cutlass-dsl", "liger-kernel",
            "flashinfer-python")


def packages(site=None):
    """Versions of the peers' packages: installed ones, then those unpacked under `site`, by folder."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    for folder in sorted(site.iterdir()) if site and site.is_dir() else ():
        for one in distributions(path=[str(folder)]):
            if one.name in PACKAGES:
                found[one.name if folder.name == "all" else f"{one.name} for {folder.name}"] = one.version
    return found


def machine():
    smi = shutil.which("nvidia-smi")
    query = "name,driver_version,clocks.sm,clocks.mem,memory.total"
    return {
        "nvidia_smi": said(smi, f"--query-gpu={query}", "--format=csv,noheader") if smi else None,
        "nvcc": (said("nvcc", "--version") or "").split("\n")[-1] or None,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": packages(),
    }


def tables(steps):
    """Cells with our time, the peers' times, and how many times faster we are."""
    ours, peers = {}, {}
    for step in steps:
        for line in step["lines"]:
            if "us" not in line:
                continue
            key = (line["layer"], line["tokens"], line["routing"])
            if line.get("kind") == "bench":
                ours[key] = line
            else:
                peers.setdefault(key, {})[line["peer"]] = line["us"]
    cells, best, by_peer = [], [], {}
    for key, line in ours.items():
        others = peers.get(key, {})
        ratio = {peer: us / line["us"] for peer, us in others.items()}
        for peer, r in ratio.items():
            by_peer.setdefault(peer, []).append(r)
        least = min(ratio.values(), default=None)
        if least:
            best.append(least)
        cells.append({"layer": key[0], "tokens": key[1], "routing": key[2], "us": line["us"],
                      "floor_us": line["floor_us"], "share_of_floor": line["share_of_floor"], "tflops": line["tflops"],
                      "peers_us": others, "times_faster": ratio, "times_faster_than_best": least})
    mean = lambda all_: exp(sum(map(log, all_)) / len(all_)) if all_ else None
    skew = {}
    for cell in cells:
        skew.setdefault((cell["layer"], cell["tokens"]), {})[cell["routing"]] = cell["us"]
    return {
        "cells": cells,
        "geometric_mean_than_best": mean(best),
        "geometric_mean_than": {peer: mean(all_) for peer, all_ in by_peer.items()},
        "zipf_over_uniform": [{"layer": k[0], "tokens": k[1], "ratio": v["zipf-1.0"] / v["uniform"]}
                              for k, v in skew.items() if len(v) == 2],
    }


def cases(steps, kind):
    rows = [line for step in steps for line in step["lines"]
            if line.get("kind") == kind and not step["step"].startswith("sanitizer")]
    count = lambda status: sum(r["result"]["status"] == status for r in rows)
    beside = [r["beside_sim"] for r in rows if r.get("beside_sim")]
    return {
        "pass": count("PASS"), "fail": count("FAIL"), "skip": count("SKIP"),
        "exact": sum(b["exact"] for b in beside), "equal_to_sim": sum(b["equal"] for b in beside),
        "exact_but_different": [r["result"]["name"] for r in rows if (r.get("beside_sim") or {}).get("agrees") is False],
        "rows": rows,
    }


def good(steps):
    ends = all(s["status"] in ("done", "skipped") for s in steps)
    rows = [line for step in steps for line in step["lines"] if "result" in line]
    agrees = all((r.get("beside_sim") or {}).get("agrees") is not False for r in rows)
    usable = any(s["step"] == "device" and s["status"] == "done" for s in steps)
    return usable and ends and agrees and all(r["result"]["status"] != "FAIL" for r in rows)


def write(folder, name, about, steps, seconds):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    strip = lambda s: {k: v for k, v in s.items() if k != "lines"}
    value = {
        "format": "moec-gpu-run-1",
        "good": good(steps),
        "machine": about,
        "seconds": round(seconds, 1),
        "steps": [strip(s) for s in steps],
        "goldens": cases(steps, "golden"),
        "ptx_cases": cases(steps, "ptx"),
        "bench": tables(steps),
        "peers": [line for s in steps for line in s["lines"] if line.get("kind") == "peer"],
        "kernels": [line for s in steps for line in s["lines"] if line.get("kind") == "bench"],
    }
    path.write_text(json.dumps(value, indent=1) + "\n")
    return path
