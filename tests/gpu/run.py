"""The steps of run.sh, one after another, each with a limit; the report is written whatever happens."""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
DEVICE = os.environ.get("DEVICE", "cuda")
# Seconds of all steps together; a step gets no more than what is left.
BUDGET = float(os.environ.get("BUDGET") or 460)
# Goldens for the sanitizers: small ones of different kernels (plain, grouped, shared experts, packed weights).
SANITIZED = "mixtral__f32_t17,qwen3_moe__bf16_t130_skew,deepseek_v3__bf16_t17_fp8,gpt_oss__bf16_t17_mxfp4"


class Run:
    def __init__(self, work):
        self.work, self.start, self.steps = work, time.monotonic(), []

    def left(self):
        return BUDGET - (time.monotonic() - self.start)

    def note(self, name, status, seconds=0.0, reason=None, lines=()):
        step = {"step": name, "status": status, "seconds": round(seconds, 1), "reason": reason, "lines": list(lines)}
        self.steps.append(step)
        print(f"{name}: {status}{f' ({reason})' if reason else ''}, {len(step['lines'])} results, {seconds:.0f} s",
              flush=True)
        return step

    def __call__(self, name, limit, command, environment=None, wanted=0):
        """Runs a command that prints JSON lines; its status is `done`, `timeout`, `failed`, or `skipped`."""
        limit = min(limit, self.left())
        if limit < 5:
            return self.note(name, "skipped", reason="the time of the whole run is spent")
        begun = time.monotonic()
        path = self.work / f"{name.replace(' ', '-')}.jsonl"
        with open(path, "wb") as out, open(path.with_suffix(".err"), "wb") as err:
            try:
                # A session of its own: what it started (a sanitizer's program, a compiler's workers) ends with it.
                process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=err, start_new_session=True,
                                           env={**os.environ, **(environment or {})})
                try:
                    code = process.wait(limit)
                    status = "done" if code == wanted else "failed"
                    reason = None if code == wanted else f"exit code {code}"
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    status, reason = "timeout", f"after {limit:.0f} s"
            except OSError as error:
                status, reason = "failed", str(error)
        lines = []
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    pass
        said = path.with_suffix(".err").read_text(errors="replace").strip()
        if status == "failed" and said:
            reason = f"{reason}: {said[-600:]}"
        return self.note(name, status, time.monotonic() - begun, reason, lines)


def sanitizers(run, runner, made):
    tool = shutil.which("compute-sanitizer") or next(iter(sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))), None)
    for check in ("memcheck", "racecheck"):
        if tool is None:
            run.note(f"sanitizer {check}", "skipped", reason="compute-sanitizer is not on this machine")
            continue
        log = run.work / f"{check}.log"
        command = [tool, "--tool", check, "--error-exitcode", "9", "--log-file", log, runner, "goldens",
                   made / "goldens", TESTS / "goldens", "--device", DEVICE, "--only", SANITIZED]
        step = run(f"sanitizer {check}", 40, command)
        said = log.read_text(errors="replace") if log.exists() else ""
        step["summary"] = [line for line in said.splitlines() if "SUMMARY" in line or "Error:" in line][:20]
        if "Device not supported" in said:
            step["status"], step["reason"] = "skipped", "compute-sanitizer does not take this device"


def wheels(run, peer):
    """Unpacks the wheels for all peers and those in a folder of this one's name: `PYTHONPATH` with both."""
    folder = Path(os.environ.get("WHEELS") or HERE / "wheels")
    path = []
    for name in (peer, ""):
        site = run.work / "site" / (name or "all")
        found = sorted((folder / name).glob("*.whl"))
        if found and not site.exists():
            for wheel in found:
                shutil.unpack_archive(wheel, site, "zip")
        if found:
            path.append(str(site))
        # What a `.pth` names is on the path of an installed package only.
        for pth in sorted(site.glob("*.pth")):
            lines = (line.strip() for line in pth.read_text().splitlines())
            path += [str(site / line) for line in lines if line and (site / line).is_dir()]
    return {"PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])} if path else {}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    work = Path(os.environ.get("KEEP") or tempfile.mkdtemp(prefix="moec-gpu-"))
    work.mkdir(parents=True, exist_ok=True)
    run = Run(work)
    about = report.machine()
    runner, packed = HERE / "out" / "gpu-runner", HERE / "out" / "made.tar.gz"
    made = work / "made"
    if not runner.exists() or not packed.exists():
        run.note("prepared", "failed", reason="run tests/gpu/prepare.sh on a machine that builds moec first")
    else:
        with tarfile.open(packed) as archive:
            archive.extractall(made, filter="data")
        about["commit"] = (made / "commit").read_text().split("\n")[0] + (
            " with changes" if "with changes" in (made / "commit").read_text() else "")
        device = run("device", 60, [runner, "device", "--device", DEVICE])
        if device["status"] == "done":
            about.update(device["lines"][0] if device["lines"] else {})
            run("goldens", 120, [runner, "goldens", made / "goldens", TESTS / "goldens", "--device", DEVICE])
            run("ptx cases", 60, [runner, "ptx", TESTS / "ptx-cases", "--device", DEVICE])
            routing = work / "routing"
            layers = json.loads((HERE / "layers.json").read_text())
            only = os.environ.get("LAYERS") or ",".join(layer["name"] for layer in layers)
            tokens = ["--tokens", os.environ["TOKENS"]] if os.environ.get("TOKENS") else []
            # Time that is left after the cases: half for us, half for the peers.
            bench = max(10.0, min(110.0, run.left() * 0.4))
            run("bench", bench + 20, [runner, "bench", HERE / "layers.json", made / "layers", routing, "--device", DEVICE,
                                      "--only", only, "--seconds", bench, *tokens])
            sanitizers(run, runner, made)
            peers = []
            for path in sorted((HERE / "peers").glob("*.py")):
                implementations = ("grouped_mm", "batched_mm") if path.stem == "transformers_experts" else (None,)
                if path.stem != "common":
                    found = wheels(run, path.stem)
                    peers += [(path, {**({"PEER_IMPLEMENTATION": i} if i else {}), **found}) for i in implementations]
            only = os.environ.get("PEERS")
            peers = [p for p in peers if not only or p[0].stem in only.split(",")]
            about["packages"] = report.packages(run.work / "site")
            for i, (path, env) in enumerate(peers):
                share = max(5.0, (run.left() - 10) / (len(peers) - i))
                label = f"peer {path.stem}" + (f" {env['PEER_IMPLEMENTATION']}" if "PEER_IMPLEMENTATION" in env else "")
                run(label, share + 5, [sys.executable, path, routing, max(1.0, share - 20)], env)
        else:
            run.note("all other steps", "skipped", reason="the device cannot be used")
    out = report.write(HERE / "results", name, about, run.steps, time.monotonic() - run.start)
    print(out)
    if not os.environ.get("KEEP"):
        shutil.rmtree(work, ignore_errors=True)
    return 0 if report.good(run.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
