#!/bin/sh
# Builds and runs all tests: tools/test.sh [preset] [ctest arguments…]; the preset is release, debug, ci, asan or tsan.
set -eu
cd "$(dirname "$0")/.."
[ -f CMakePresets.json ] || { echo "test.sh: needs the source tree of distill: clone it and run tools/test.sh there" >&2; exit 1; }
preset=${1:-release}
[ $# -gt 0 ] && shift
tools/install_dependencies.sh
cmake --preset "$preset" -DDISTILL_TESTS=ON --log-level=WARNING
cmake --build --preset "$preset" -j "$(nproc)"
ctest --preset "$preset" --no-tests=error -j "$(nproc)" "$@"
