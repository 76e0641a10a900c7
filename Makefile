# Two commands do everything: `make demo` runs the main job on the CPU, `make test` passes the tests.
.PHONY: demo test setup build

OUT ?= target/demo

setup:
	@./setup.sh

build: setup
	@cargo build --quiet -p moec-cli

# Compiles a real model for this CPU and for Hopper GPUs, runs a layer with random weights, and
# compares it with the reference interpreter.
demo: build
	@target/debug/moec compile tests/models/qwen3-30b-a3b/config.json -o $(OUT) --target cpu,sm_90a --outputs output,topk_indices
	@target/debug/moec run $(OUT) --weights random:1 --input random:16 --compare

test:
	@./setup.sh test
	cargo test --workspace --quiet
