#!/usr/bin/env bash
# Fuzzes every decoder and both machines, SECONDS each (default 20). Needs a C++ compiler; runs on the
# stable toolchain, because the coverage instrumentation is an LLVM pass that stable rustc has. With
# cargo-fuzz and a nightly toolchain, `cargo fuzz run TARGET` in protocol/ also adds the sanitizers.
set -euo pipefail

seconds=${1:-20}
root=$(cd "$(dirname "$0")/.." && pwd)
target=x86_64-unknown-linux-gnu
work=$root/target/fuzz

# On another architecture the host's triple is the one to instrument.
if host=$(rustc -vV | sed -n 's/^host: //p'); then target=$host; fi

flags="-Cpasses=sancov-module -Ccodegen-units=1 -Cdebug-assertions -Cdebuginfo=1"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
  flags+=" -Cllvm-args=-sanitizer-coverage-$option"
done

cd "$root/protocol/fuzz"
# With --target the flags reach the fuzzed code only, not the build scripts.
CARGO_TARGET_DIR=$work RUSTFLAGS=$flags cargo build --release --target "$target" --bins

failed=0
for source in fuzz_targets/*.rs; do
  name=$(basename "$source" .rs)
  mkdir -p "$work/found/$name" "$work/artifacts"
  echo "fuzzing $name for $seconds s"
  if ! "$work/$target/release/$name" -max_total_time="$seconds" -max_len=8192 -rss_limit_mb=2048 \
    -print_final_stats=1 -artifact_prefix="$work/artifacts/$name-" \
    "$work/found/$name" "corpus/$name" ../fixtures >"$work/$name.log" 2>&1; then
    failed=1
    echo "$name: a sample in $work/artifacts makes it fail, see $work/$name.log; add it to corpus/$name"
  fi
  grep -E "number_of_executed_units|peak_rss_mb" "$work/$name.log" || true
done
exit $failed
