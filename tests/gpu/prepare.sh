#!/bin/sh
# Prepares tests/gpu/out for a machine with a GPU: a runner without a compiler, and everything that run.sh reads.
# Needs what `make test` needs; ptxas, where it is found (a CUDA toolkit, or one of the Python packages that ship it),
# makes binaries, else the driver there compiles the PTX.
set -eu
cd "$(dirname "$0")/../.."
out=tests/gpu/out
rm -rf "$out"
mkdir -p "$out/made"
cargo build --release -q -p moec-tests-gpu
cp "${CARGO_TARGET_DIR:-target}/release/gpu-runner" "$out/gpu-runner"
strip "$out/gpu-runner" 2>/dev/null || true
cargo run -q -p moec-tests --example gpu-artefacts -- "$out/made"
git rev-parse HEAD > "$out/made/commit"
git diff --quiet HEAD || echo " with changes" >> "$out/made/commit"
# PTX is large and alike; the machine there has tar and gzip.
tar -C "$out/made" -czf "$out/made.tar.gz" .
rm -rf "$out/made"
size=$(du -sk "$out" tests/gpu/wheels 2>/dev/null | awk '{ n += $1 } END { print n }')
echo "$out: $size KiB"
if [ "$size" -gt 65536 ]; then
    echo "more than 64 MiB: take wheels out" >&2
    exit 1
fi
