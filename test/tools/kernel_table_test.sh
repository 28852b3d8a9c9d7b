#!/bin/sh
# tools/kernel_table.sh over made-up reports: a table as it was kept, a kernel too few, none, a spill, another compiler.
set -eu
script=$(cd "$(dirname "$0")/../../tools" && pwd)/kernel_table.sh
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
kept=$build/kept.txt

# compiler VERSION, report SPILLS KERNEL…
compiler() {
  printf '#!/bin/sh\necho "Cuda compilation tools, release 13.0, V%s"\n' "$1" >"$build/nvcc"
  chmod +x "$build/nvcc"
}
report() {
  spills=$1
  shift
  for kernel; do
    echo "ptxas info    : Compiling entry function '$kernel' for 'sm_90'"
    echo "    0 bytes stack frame, $spills bytes spill stores, 0 bytes spill loads"
    echo "ptxas info    : Used 32 registers, used 1 barriers"
  done >"$build/x.cu.o.ptxas"
}
# expect CODE TEXT: what it says of the reports against the kept table.
expect() {
  code=0
  output=$("$script" "$build" "$kept" 2>&1) || code=$?
  case $code$output in
    "$1"*"$2"*) ;;
    *) echo "code $code, expected $1 and '$2': $output" >&2; exit 1 ;;
  esac
}

echo "CMAKE_CUDA_COMPILER:STRING=$build/nvcc" >"$build/CMakeCache.txt"
compiler 13.0.88
report 0 one two
"$script" "$build" >"$kept"
expect 0 "2 kernels as in"
for version in 13.0.88 13.1.1; do
  compiler $version
  report 0 one
  expect 1 "1 kernels, and 2 in"
  report 0
  expect 1 "no kernel in the reports"
  report 4 one two
  expect 1 "spills: one sm_90"
done
report 0 one two
expect 0 "no spills; registers not compared"
