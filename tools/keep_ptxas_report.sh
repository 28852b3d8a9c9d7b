#!/bin/sh
# Runs a compile command (nvcc with -Xptxas=-v) and puts what ptxas says of each kernel into <object>.ptxas instead of
# on the screen. For kernels/CMakeLists.txt; tools/kernel_table.sh reads the reports.
report=""
previous=""
for argument in "$@"; do
  [ "$previous" = -o ] && report=$argument.ptxas
  previous=$argument
done
messages=$("$@" 2>&1)
code=$?
[ -n "$report" ] && printf '%s\n' "$messages" | grep -E '^ptxas info|bytes stack frame' >"$report"
printf '%s\n' "$messages" | grep -v -E '^$|^ptxas info|bytes stack frame' >&2
exit $code
