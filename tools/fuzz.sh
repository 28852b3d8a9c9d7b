#!/bin/sh
# Fuzzes every reader of files from outside: tools/fuzz.sh [seconds a target] [targets…]. Builds test/fuzz with clang,
# starts from the kept corpus and from what earlier runs made of it (build/fuzz/corpus), as many targets at a time as there
# are processors. Ends with 1 where an input crashes, hangs, leaks or takes too much memory, and says where that input lies.
set -eu
found=build/fuzz/found

fuzz_one() {
  target=$1 seconds=$2 log=$found/$1.log
  set -- -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=1024 -print_final_stats=1 \
    -artifact_prefix="$found/$target-" "build/fuzz/corpus/$target" "test/fuzz/corpus/$target"
  dictionary=test/fuzz/dictionaries/$target.txt
  [ ! -f "$dictionary" ] || set -- -dict="$dictionary" "$@"
  mkdir -p "build/fuzz/corpus/$target"
  if "build/fuzz/test/fuzz/fuzz_$target" "$@" >"$log" 2>&1; then
    echo "fuzz: $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs, nothing found"
  else
    tail -n 60 "$log"
    echo "fuzz: $target: FAILED; its log is $log, the input:" "$found/$target-"*
    return 1
  fi
}

cd "$(dirname "$0")/.."
if [ "${1-}" = --one ]; then
  fuzz_one "$2" "$3"
  exit
fi
[ -f CMakePresets.json ] || { echo "fuzz.sh: needs the source tree of distill: clone it and run tools/fuzz.sh there" >&2; exit 1; }
seconds=${1:-60}
[ $# -eq 0 ] || shift
tools/install_dependencies.sh clang libclang-rt-dev llvm
cmake --preset fuzz --log-level=WARNING
cmake --build --preset fuzz -j "$(nproc)"
rm -rf "$found"
mkdir -p "$found"
export UBSAN_OPTIONS=print_stacktrace=1
if [ $# -gt 0 ]; then printf '%s\n' "$@"; else ls test/fuzz/corpus; fi |
  xargs -P "$(nproc)" -I TARGET tools/fuzz.sh --one TARGET "$seconds" || exit 1  # xargs has codes of its own
