# Thin on purpose: every recipe is a command that can be typed by hand. `make help` lists the targets.
# Nothing is installed outside target/ (but for `make install`).

PYTHON ?= python3
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
FUZZ_SECONDS ?= 30
DEMO_ARGS ?= --model tests/testdata/peft/base --adapters tests/testdata/peft/adapters --tokens 32 --seed 7

# The pinned compiler (build.rs finds it), a reader of what it built, and libclang for the generators.
NVCC_PINS = nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
TOOLS_PINS = nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
LIBCLANG_PINS = libclang==18.1.1
PIP = PIP_ROOT_USER_ACTION=ignore $(PYTHON) -m pip install --quiet --no-deps --upgrade --target

export LIBCLANG_PATH ?= $(CURDIR)/target/libclang/clang/native

.PHONY: help setup demo test gpu-test bench bundle gen install check-candle fuzz

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1: /p' Makefile

setup: target/setup.stamp ## fetch the pinned nvcc, cuobjdump and libclang into target/ (340 MB, once)
target/setup.stamp: Makefile
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
	  echo "make setup needs Python 3 with pip ('$(PYTHON) -m pip' does not run); PYTHON=... names another" >&2; exit 1; }
	$(PIP) target/cuda $(NVCC_PINS)
	$(PIP) target/cuda-tools $(TOOLS_PINS)
	$(PIP) target/libclang $(LIBCLANG_PINS)
	touch build.rs $@ # cargo watches build.rs, and so looks for nvcc again

demo: setup ## decode with adapters switched from token to token (DEMO_ARGS)
	cargo run --release --example decode -- $(DEMO_ARGS)

test: setup ## format, lints, docs, all tests; those of the GPU run if there is one
	cargo fmt --check -- fuzz/build.rs fuzz/fuzz_targets/*.rs
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --no-default-features -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps
	LORA_SWITCH_REQUIRE_NVCC=1 cargo test

gpu-test: setup ## all tests, and a missing GPU is an error
	LORA_SWITCH_REQUIRE_NVCC=1 LORA_SWITCH_REQUIRE_GPU=1 cargo test --release

# What the figures are of, and whether the tree differs from it (records apart).
COMMIT = $(shell git rev-parse --short=12 HEAD)$(shell test -z "$$(git status --porcelain -- . ':!benches/record')" || echo -dirty)
bench: setup ## measure (BENCH_ARGS go to the bench)
	LORA_SWITCH_COMMIT=$(COMMIT) cargo bench -- $(BENCH_ARGS)

# For a machine with a GPU and no cargo: in a copy of this tree, LORA_SWITCH_REQUIRE_GPU=1 target/bundle/suite
newest = $$(ls -t target/release/deps/$(1)-* | grep -v '\.d$$' | head -n 1)
bundle: setup ## tests, bench and demo, built and stripped, into target/bundle
	LORA_SWITCH_COMMIT=$(COMMIT) cargo bench --no-run
	LORA_SWITCH_REQUIRE_NVCC=1 cargo test --release --no-run
	cargo build --release --example decode
	mkdir -p target/bundle && cp $(call newest,suite) target/bundle/suite && cp $(call newest,bench) target/bundle/bench
	cp target/release/examples/decode target/release/deps/liblora_switch.so target/release/deps/liblora_switch.a target/bundle
	find target/bundle -maxdepth 1 -type f | xargs strip --strip-debug

gen: setup ## write the committed generated files anew
	LORA_SWITCH_REGENERATE=1 cargo test --test suite -- generated figures

# Built apart: a soname would hide the plain liblora_switch.so from what the tests link with it.
SO = target/install/release/liblora_switch.so
DEST = $(DESTDIR)$(LIBDIR)
install: VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
install: setup ## header, libraries and pkg-config file into PREFIX (DESTDIR, LIBDIR)
	cargo rustc --release --lib --target-dir target/install -- -C link-arg=-Wl,-soname,liblora_switch.so.0
	install -Dm644 -t $(DESTDIR)$(PREFIX)/include include/lora_switch.h
	install -Dm644 -t $(DEST) target/install/release/liblora_switch.a
	install -Dm755 $(SO) $(DEST)/liblora_switch.so.$(VERSION)
	ln -sf liblora_switch.so.$(VERSION) $(DEST)/liblora_switch.so.0
	ln -sf liblora_switch.so.0 $(DEST)/liblora_switch.so
	mkdir -p $(DEST)/pkgconfig
	printf '%s\n' 'Name: lora_switch' 'Description: CUDA kernels for dynamic LoRA' 'Version: $(VERSION)' \
	  'Cflags: -I$(PREFIX)/include' 'Libs: -L$(LIBDIR) -llora_switch' \
	  'Libs.private: -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc' > $(DEST)/pkgconfig/lora_switch.pc

# candle turns cudarc's `dynamic-linking` on and detects the toolkit; a careless choice of our own cudarc
# features stops every crate that uses both (CONTRIBUTING.md). This proves that both compile in one graph
# and share cudarc's types. It proves nothing about running: nothing is linked, and candle's kernels are
# left out, by an nvcc that answers questions but compiles nothing (they take minutes; ours are built).
CANDLE = target/candle-check
define CANDLE_TOML
[package]
name = "candle-check"
edition = "2024"
[dependencies]
candle-core = { version = "0.11", features = ["cuda"] }
cudarc = { version = "0.19", default-features = false }
lora-switch = { path = "../.." }
[workspace]
endef
define CANDLE_RS
use candle_core::cuda_backend::cudarc::driver::CudaStream;
pub use lora_switch;
pub fn one_set_of_types(stream: &CudaStream) -> &cudarc::driver::CudaStream { stream }
endef
define CANDLE_NVCC
#!/bin/sh
case "$$*" in *--version*|*--list-gpu*) exec $(CURDIR)/target/cuda/nvidia/cu13/bin/nvcc "$$@";; esac
while [ $$# -gt 0 ]; do case "$$1" in
  -o) out=$$2;; --output-directory) dir=$$2;; *.cu) stem=$$(basename "$$1" .cu);;
esac; shift; done
: > "$${out:-$$dir/$$stem.ptx}"
endef
check-candle: export TOML = $(CANDLE_TOML)
check-candle: export RS = $(CANDLE_RS)
check-candle: export NVCC_STUB = $(CANDLE_NVCC)
check-candle: setup ## compile beside candle (needs no GPU)
	@mkdir -p $(CANDLE)/src $(CANDLE)/bin
	@echo "$$TOML" > $(CANDLE)/Cargo.toml; echo "$$RS" > $(CANDLE)/src/lib.rs
	@printf '%s\n' "$$NVCC_STUB" > $(CANDLE)/bin/nvcc; chmod +x $(CANDLE)/bin/nvcc
	PATH="$(CURDIR)/$(CANDLE)/bin:$$PATH" CUDA_COMPUTE_CAP=80 \
	  cargo check --manifest-path $(CANDLE)/Cargo.toml --target-dir target

# Stable Rust with the sanitizer that it hides; the seed is fixed, so that a failure comes back.
CARGO_FUZZ = PATH="$(CURDIR)/target/tools/bin:$$PATH" RUSTC_BOOTSTRAP=1 cargo fuzz
fuzz: setup ## each fuzz target for FUZZ_SECONDS
	$(CARGO_FUZZ) --version >/dev/null 2>&1 || cargo install --quiet --locked --root target/tools cargo-fuzz@0.13.2
	set -e; for target in $$($(CARGO_FUZZ) list); do mkdir -p target/corpus/$$target; \
	  $(CARGO_FUZZ) run --target-dir target $$target target/corpus/$$target \
	    $$(ls -d fuzz/seeds/$$target 2>/dev/null) -- -seed=1 -max_total_time=$(FUZZ_SECONDS); done
