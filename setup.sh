#!/bin/sh
# Installs what building needs on Debian 12: a C compiler, LLVM and MLIR 22 with headers, and the
# libraries they link; with `test`, also what only tests need: an emulator of Arm. Quick when everything is there.
# Rust comes from rustup.
set -eu
packages="build-essential llvm-22-dev libmlir-22-dev libclang-22-dev libpolly-22-dev zlib1g-dev libzstd-dev"
[ "${1:-}" != test ] || packages="$packages qemu-user"
missing=""
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    as_root=""
    [ "$(id -u)" = 0 ] || as_root=sudo
    echo "installing:$missing"
    $as_root apt-get update -qq
    # shellcheck disable=SC2086 # the list is meant to split
    if ! DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null; then
        echo "setup: LLVM 22 is not among this machine's package sources; add LLVM's own Debian packages and run this again" >&2
        exit 1
    fi
fi
if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: cargo was not found; install Rust 1.95 or newer with rustup" >&2
    exit 1
fi
