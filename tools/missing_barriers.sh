#!/bin/sh
# Takes the barriers and waits of the CUDA kernels away, one at a time, and expects the virtual GPU to notice: a race, a
# value that is not as it should be. Needs build/…/test/kernels/{device,loss}_test_virtual_gpu built.
#   tools/missing_barriers.sh [build folder] [places]    default: build/release, all; an hour
# places: a pattern of lines of "file:line call", such as team.cuh. Prints a line for each and fails when one goes unnoticed.
set -eu
cd "$(dirname "$0")/.."
source=$PWD
build=$(cd "${1:-build/release}" && pwd)
places=${2-}
copy=$build/missing_barriers
rm -rf "$copy"
mkdir -p "$copy/kernels/cuda"

# Number n is left out when MISSING_BARRIER is n.
cat > "$copy/missing.h" <<'END'
#pragma once
#include <cstdlib>
inline const int missing_barrier = std::getenv("MISSING_BARRIER") ? std::atoi(std::getenv("MISSING_BARRIER")) : 0;
END
number=0
for file in team.cuh reductions.cu attention_plain.cuh attention_mma.cuh; do
  awk -v n=$number -v list="$copy/list" -v file=$file '
    match($0, /(__syncthreads|__syncwarp|copy_async_wait<[0-9]>)\(\);/) {
      call = substr($0, RSTART, RLENGTH - 1)
      ++n
      print n, file ":" NR, call >> list
      $0 = substr($0, 1, RSTART - 1) "missing_barrier == " n " ? void() : " call ";" substr($0, RSTART + RLENGTH)
    }
    { print }' "kernels/cuda/$file" > "$copy/kernels/cuda/$file"
  number=$(wc -l < "$copy/list")
done

# The objects of the build once more, from the copy; what is linked first wins over the library.
compile() {
  original=$source/kernels/cuda/$1.cu
  if [ -e "$copy/kernels/cuda/$1.cu" ]; then original=$copy/kernels/cuda/$1.cu; fi
  command=$(ninja -C "$build" -t commands test/kernels/device_test_virtual_gpu | grep -e "-c .*/$1\.cu\$" | sed \
    -e "s# -MD -MT [^ ]* -MF [^ ]*##" -e "s#-o [^ ]*#-o $copy/$1.o#" -e "s#-c .*#-c $original#" -e "s#-O3#-O1#" \
    -e "s# -I# -include $copy/missing.h -I$copy -I#")
  (cd "$build" && sh -c "$command")
}
link() {
  command=$(ninja -C "$build" -t commands "test/kernels/$1" | tail -n 1 | sed \
    -e "s#-o [^ ]*#-o $copy/$1 $copy/$2.o $copy/$3.o#" -e "s#^: && ##" -e "s# && :\$##")
  (cd "$build" && sh -c "$command")
}
compile attention_bf16
compile reductions
compile loss_f32
link device_test_virtual_gpu attention_bf16 reductions
link loss_test_virtual_gpu loss_f32 reductions

# run N PLACE: the cases that go through a place, without barrier N; 0: with all of them.
run() {
  case $2 in
    team.cuh*) tests="loss_test_virtual_gpu|every objective with*" ;;
    reductions.cu*) tests="device_test_virtual_gpu|column_sums,sum_of_squares*,embedding*,an id*,rms_norm*,the fused*" ;;
    *) tests="device_test_virtual_gpu|attention and its backward" ;;
  esac
  MISSING_BARRIER=$1 "$copy/${tests%%|*}" "${tests#*|}" --abort >"$copy/log" 2>&1
}

grep -e "$places" "$copy/list" >"$copy/chosen" || { echo "missing_barriers: no place is like $places" >&2; exit 2; }
for file in $(cut -d ' ' -f 2 "$copy/chosen" | cut -d : -f 1 | sort -u); do
  run 0 "$file" && grep -q "^All tests passed" "$copy/log" || {
    cat "$copy/log" >&2
    echo "missing_barriers: the tests of $file fail with all barriers in place" >&2
    exit 2
  }
done

unnoticed=0
while read -r n place call; do
  code=0
  run "$n" "$place" || code=$?
  if [ $code != 0 ] && grep -a -q -e 'virtual GPU: ' -e 'FAILED:' "$copy/log"; then
    echo "noticed    $place $call: $(grep -a -o -m 1 'virtual GPU: [a-z ]*: .*' "$copy/log" || echo another value)"
  else
    echo "UNNOTICED  $place $call$([ $code = 0 ] || echo " (exit code $code: $(tail -n 1 "$copy/log"))")"
    unnoticed=1
  fi
done <"$copy/chosen"
exit $unnoticed
