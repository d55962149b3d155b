#!/usr/bin/env bash
# Fuzzes each decoder of the protocol for SECONDS seconds. The fuzzer adds new inputs to the corpora.
#   fuzz.sh SECONDS [TARGET..]
# The corpora also run as ordinary tests (cargo test -p pd-protocol), which need neither cargo-fuzz nor nightly Rust.
set -euo pipefail

seconds=$1
shift
cd "$(dirname "$0")/../protocol"

if ! cargo fuzz --version >/dev/null 2>&1; then
  echo "error: cargo-fuzz is missing: cargo install cargo-fuzz --locked" >&2
  exit 1
fi
if ! cargo +nightly --version >/dev/null 2>&1; then
  echo "error: fuzzing needs a nightly toolchain: rustup toolchain install nightly" >&2
  exit 1
fi

targets=("$@")
if [ ${#targets[@]} = 0 ]; then
  for file in fuzz/fuzz_targets/*.rs; do targets+=("$(basename "$file" .rs)"); done
fi
for target in "${targets[@]}"; do
  echo "fuzzing $target for $seconds s"
  cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -print_final_stats=1
done
