#!/bin/sh
# What the compiler made of every CUDA kernel, from the reports that the build keeps beside the objects:
#   tools/kernel_table.sh BUILD          prints the table: registers, spilled bytes, stack bytes, static shared bytes
#   tools/kernel_table.sh BUILD KEPT     compares it with a kept one; 1 when they differ, with the differences
# kernels/cuda/kernels.txt is the kept one: after a change on purpose, write it anew and look at what changed.
set -eu
reports=$(find "$1" -name '*.cu.o.ptxas' | sort)
[ -n "$reports" ] || { echo "kernel_table: no reports of CUDA kernels below $1" >&2; exit 2; }

table() {
  echo "# kernel, architecture: registers, spilled bytes, stack bytes, static shared bytes"
  # shellcheck disable=SC2086  # a list of files
  cat $reports | awk '
    /Compiling entry function/ { split($0, quoted, "\x27"); name = quoted[2]; arch = quoted[4]; spilled = stack = 0 }
    /bytes stack frame/ { stack = $1; spilled = $5 + $9 }
    /Used [0-9]+ registers/ {
      shared = 0
      for (i = 1; i < NF; ++i) if ($(i + 2) ~ /^smem/) shared = $i
      match($0, /Used [0-9]+/)
      print name, arch ":", substr($0, RSTART + 5, RLENGTH - 5), spilled, stack, shared
    }' | c++filt | sed -E 's/^void //; s/\(anonymous namespace\):://g; s/\([^)]*(\([^)]*\))*[^)]*\) (sm_)/ \2/; s/distill::cuda:://g; s/distill:://g' |
    LC_ALL=C sort
}

if [ $# -eq 1 ]; then
  table
else
  table | diff "$2" - || { echo "kernel_table: the kernels are not those of $2" >&2; exit 1; }
fi
