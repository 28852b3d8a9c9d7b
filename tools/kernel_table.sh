#!/bin/sh
# What the compiler made of every CUDA kernel, from the reports that the build keeps beside the objects:
#   tools/kernel_table.sh BUILD          prints the table
#   tools/kernel_table.sh BUILD KEPT     compares it with a kept one; 1 when they differ, with the differences
# kernels/cuda/kernels.txt is the kept one: after a change on purpose, write it anew and look at what changed. Another
# version of nvcc allocates other registers: then only the rule is checked that holds for all, no spills but in f64.
set -eu
reports=$(find "$1" -name '*.cu.o.ptxas' | sort)
[ -n "$reports" ] || { echo "kernel_table: no reports of CUDA kernels below $1" >&2; exit 2; }
nvcc=$(sed -n 's/^CMAKE_CUDA_COMPILER:[A-Z]*=//p' "$1/CMakeCache.txt")

# Of the 64 warps that an H100 (and an A100) runs on a multiprocessor at once, as many as its 65,536 registers allow: a
# warp takes them in steps of 256. Shared memory that a launch asks for is in kernels/cuda/README.md.
table() {
  "$nvcc" --version | sed -n 's/.*release.*, V\([0-9.]*\)$/# nvcc \1/p'
  echo "# kernel, architecture: registers a thread, warps of 64 that these allow, spilled bytes, stack bytes, static shared bytes a block"
  # shellcheck disable=SC2086  # a list of files
  cat $reports | awk '
    /Compiling entry function/ { split($0, quoted, "\x27"); name = quoted[2]; arch = quoted[4]; spilled = stack = 0 }
    /bytes stack frame/ { stack = $1; spilled = $5 + $9 }
    /Used [0-9]+ registers/ {
      shared = 0
      for (i = 1; i < NF; ++i) if ($(i + 2) ~ /^smem/) shared = $i
      match($0, /Used [0-9]+/)
      registers = substr($0, RSTART + 5, RLENGTH - 5)
      warps = int(65536 / (int((registers * 32 + 255) / 256) * 256))
      print name, arch ":", registers, (warps > 64 ? 64 : warps), spilled, stack, shared
    }' | c++filt | sed -E 's/^void //; s/\(anonymous namespace\):://g; s/\([^)]*(\([^)]*\))*[^)]*\) (sm_)/ \2/; s/distill::cuda:://g; s/distill:://g' |
    LC_ALL=C sort -u
}

if [ $# -eq 1 ]; then
  table
  exit
fi
found=$(mktemp)
trap 'rm -f "$found"' EXIT
table >"$found"
kernels=$(grep -c -v '^#' "$found") || { echo "kernel_table: no kernel in the reports below $1" >&2; exit 1; }
kept=$(grep -c -v '^#' "$2") || { echo "kernel_table: no kernel in $2" >&2; exit 1; }
[ "$kernels" -ge "$kept" ] || { echo "kernel_table: $kernels kernels, and $kept in $2" >&2; exit 1; }
if grep -v -E '^#|double' "$found" | awk '$(NF - 2) > 0 { print "kernel_table: spills: " $0; bad = 1 } END { exit bad }'; then :; else exit 1; fi
if [ "$(head -n 1 "$2")" != "$(head -n 1 "$found")" ]; then
  echo "kernel_table: no spills; registers not compared: $2 is of $(head -n 1 "$2"), this build of $(head -n 1 "$found")"
else
  diff "$2" "$found" || { echo "kernel_table: the kernels are not those of $2 (left: kept, right: found)" >&2; exit 1; }
  echo "kernel_table: $kernels kernels as in $2, no spills"
fi
