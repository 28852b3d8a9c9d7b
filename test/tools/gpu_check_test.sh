#!/bin/sh
# tools/gpu_check.sh where there is no GPU:
#   arguments       what it says instead of checking
#   stubs           with scripts in the place of the programs: what it makes of their answers
#   virtual BUILD   with the programs, on virtual GPUs
#   faults BUILD    the same, with something wrong with the GPUs
set -eu
script=$(cd "$(dirname "$0")/../../tools" && pwd)/gpu_check.sh
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
report=$scratch/report.md

# expect CODE TEXT ARGUMENTS…: the code, and one line of output that says the text.
expect() {
  wanted=$1 text=$2 code=0
  shift 2
  "$script" "$@" >"$scratch/output" 2>&1 || code=$?
  if [ "$code" != "$wanted" ] || [ "$(grep -c -F -e "$text" "$scratch/output")" != 1 ]; then
    echo "gpu_check.sh $*: code $code, expected $wanted and once '$text':" >&2
    cat "$scratch/output" >&2
    exit 1
  fi
}
# reports PATTERN: a line of the report.
reports() {
  grep -q -e "$1" "$report" && return 0
  echo "no '$1' in the report:" >&2
  cat "$report" >&2
  exit 1
}

arguments() {
  expect 0 "Exit codes: 0 passed" --help
  expect 2 "unknown option '--vitual'" --vitual
  expect 2 "--out needs a name" --virtual --out
  expect 2 "--build needs a name" --build ""
  expect 2 "there is no folder $scratch/none" --virtual --out "$scratch/none/report.md"
  expect 2 "--build $scratch: no build tree that is configured" --virtual --build "$scratch"
  if [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || nvidia-smi -L >/dev/null 2>&1; then return 0; fi
  expect 2 "gpu_check.sh: no GPU: no NVIDIA driver is loaded; --virtual checks on virtual GPUs"
  [ "$(wc -l <"$scratch/output")" = 1 ]
}

# stub NAME: the standard input as a program, below $scratch.
stub() {
  mkdir -p "$(dirname "$scratch/$1")"
  { echo '#!/bin/sh'; cat; } >"$scratch/$1"
  chmod +x "$scratch/$1"
}
# make_stubs GPUS REACHED [HOW]: a build tree whose programs find nothing wrong on so many GPUs, which reach each other or
# not and take processes like that.
make_stubs() {
  rm -rf "$scratch/build"
  mkdir -p "$scratch/build"
  : >"$scratch/build/CMakeCache.txt"
  stub bin/cmake <<'TEXT'
[ "$3" != --target ] || echo gpu_check_tests: phony
TEXT
  stub bin/nvidia-smi <<'TEXT'
echo "0, Stub GPU, 580.1"
TEXT
  stub bin/ldd <<'TEXT'
echo "libnccl.so.2 => /usr/lib/libnccl.so.2"
TEXT
  # mpirun -np N --oversubscribe --bind-to none COMMAND…
  stub bin/mpirun <<'TEXT'
n=$2; shift 5
while [ "$n" -gt 0 ]; do "$@" || exit; n=$((n - 1)); done
TEXT
  for test in kernels/device_test kernels/loss_test kernels/sharded_loss_test kernels/cudnn_attention_test apps/golden_test \
    parallel/gpu_channel_test parallel/group_on_device_test; do
    echo 'echo "All tests passed (1 assertion in 1 test case)"' | stub "build/test/${test}_cuda"
  done
  stub build/tools/bench/gpu_bench <<TEXT
if [ "\$1" = cuda ]; then printf '| operation | %s |\n| distill_loss | 1 |\n' "\$2"; exit; fi
echo "driver: CUDA 13.0, runtime: CUDA 13.0"
echo "gpu 0: Stub GPU, 81559 MiB, compute capability 9.0, ${3-any number of processes}"
[ $1 = 1 ] || echo "gpu 1: Stub GPU"
[ $1 = 1 ] || echo "peer access 0 -> 1: $2"
TEXT
  # distill --config FILE exp_name=NAME …: ten steps; $scratch/NAME holds what to do to them.
  stub build/apps/distill <<TEXT
[ "\$1" != --version ] || { echo "distill stub"; exit; }
name=\${3#exp_name=}
logs=\$(sed -n 's/^logging_dir: //p' "\$2")/\$name
mkdir -p "\$logs"
for step in 0 1 2 3 4 5 6 7 8 9 10; do
  [ \$step = 0 ] && echo "step,train/loss,student/grad_norm" || echo "\$step,5.5,-3e-2"
done | { [ ! -f "$scratch/\$name" ] && cat || sed -f "$scratch/\$name"; } >"\$logs/metrics.csv"
TEXT
}

stubs() {
  PATH=$scratch/bin:$PATH
  set -- --build "$scratch/build" --out "$report"
  make_stubs 2 yes
  expect 0 PASSED "$@"
  [ "$(tail -1 "$report")" = "PASSED, 1 skipped: logits channel between GPUs without peer access" ]
  [ "$(grep -c '| pass |' "$report")" = 30 ]
  reports '^| logits channel between GPUs without peer access | skip | 0 | GPUs 0 and 1 reach each other |$'
  reports '^0, Stub GPU, 580.1$'
  reports '^distill stub$'
  reports '^library: libnccl'
  reports '^| operation | full |$'

  make_stubs 2 no
  expect 0 PASSED "$@"
  reports '^| logits channel between two GPUs | skip |'
  reports '^| logits channel between GPUs without peer access | pass |'
  make_stubs 1 no
  expect 0 PASSED "$@"
  [ "$(grep -c '| skip | 0 | one GPU' "$report")" = 4 ]
  [ "$(tail -1 "$report")" = "PASSED, 4 skipped: logits channel between two GPUs; logits channel between GPUs without peer \
access; groups over NCCL; program on grids of two GPUs" ]
  make_stubs 1 no "one process at a time"
  expect 0 "PASSED, 8 skipped: logits channel between two processes on one GPU; " "$@"
  [ "$(grep -c '| skip | 0 | GPU 0 takes one process' "$report")" = 4 ]

  # A second GPU and no NCCL; no cuDNN, and a GPU that it does not take.
  make_stubs 2 yes
  echo true | stub bin/ldd
  expect 1 "FAILED: groups over NCCL" "$@"
  reports '^| program on grids of two GPUs | skip | 0 | built without NCCL'
  make_stubs 2 yes
  sed -i 's/echo "distill stub"/echo "cuda (no cuDNN)"/' "$scratch/build/apps/distill"
  expect 0 "PASSED, 3 skipped: cuDNN's attention against its formula; " "$@"
  make_stubs 2 yes
  sed -i 's/^name=.*/&; case $name in *cudnn) echo "warning: our own attention is used: why" ;; esac/' "$scratch/build/apps/distill"
  expect 0 "PASSED, 2 skipped: " "$@"
  reports "^| program bf16, cuDNN's attention against ours | skip | 0 | warning: our own attention is used: why |$"

  # A test without cases, one of two ranks silent, a wrong result, a benchmark that ends, or one without its last row.
  make_stubs 2 yes
  echo 'echo "No tests ran"' | stub build/test/kernels/device_test_cuda
  echo "mkdir $scratch/first 2>/dev/null && echo 'All tests passed'; true" | stub build/test/parallel/gpu_channel_test_cuda
  echo 'echo "1 of 2 failed"; exit 1' | stub build/test/apps/golden_test_cuda
  sed -i 's/then printf/then exit 3; printf/' "$scratch/build/tools/bench/gpu_bench"
  expect 1 "FAILED: operations against their formulas; models against torch; logits channel between two processes on one \
GPU; logits channel between two GPUs; benchmark" "$@"
  reports '^| operations against their formulas | FAIL | [0-9]* | ended well without having run'
  reports '^| models against torch | FAIL | [0-9]* | exit code 1: 1 of 2 failed |$'
  reports '^### models against torch$'

  make_stubs 2 yes
  sed -i 's/.n| distill_loss | 1 |//' "$scratch/build/tools/bench/gpu_bench"
  expect 1 "FAILED: benchmark" "$@"

  # Losses a bit too far apart, and just not; a bit that differs; no number; a step too few; a run that fails.
  make_stubs 2 yes
  echo '3s/5.5/5.501/' >"$scratch/fp32-cuda"
  cp "$scratch/fp32-cuda" "$scratch/fp32-cuda2"
  echo '3s/5.5/5.501/; 4s/3e-2/2.5e-2/' >"$scratch/bf16-cuda"
  echo '3s/5.5/6/' >"$scratch/bf16-cudnn"
  echo '3s/5.5/5.501/' >"$scratch/student-pp"
  expect 1 "FAILED: program fp32, cuda against cpu; program bf16, two ranks against one: the same bits; program bf16, \
cuDNN's attention against ours; program on two GPUs, pp: 2, against cpu" "$@"
  rm "$scratch/bf16-cudnn" "$scratch/student-pp"
  reports '^| program fp32, cuda against cpu | FAIL | 0 | .* in 10 steps: 0.00018 0; allowed 1e-4'
  echo '11s/5.5/nan/' >"$scratch/fp32-cuda"
  echo '11d' >"$scratch/bf16-cuda"
  cp "$scratch/bf16-cuda" "$scratch/bf16-cuda2"
  cp "$scratch/bf16-cuda" "$scratch/bf16-cudnn"
  expect 1 "FAILED: program fp32, cuda against cpu; program fp32, two ranks against one: the same bits; \
program bf16, cuda against cpu; program bf16, two ranks against one: the same bits; program bf16, cuDNN's attention \
against ours" "$@"
  reports '^| program fp32, cuda against cpu | FAIL | 0 | .*: incomparable;'
  sed -i 's/^name=.*/&; case $* in *fp32*=cuda* | *=cuda*fp32*) echo "distill: lost"; exit 1 ;; esac/' "$scratch/build/apps/distill"
  rm "$scratch"/bf16-*
  expect 1 "FAILED: program fp32, device: cuda, one rank; program fp32, device: cuda, two ranks; program on two GPUs, \
tp: 2; program on two GPUs, pp: 2; program on two GPUs, dp: 2" "$@"
  reports '^| program fp32, cuda against cpu | skip | 0 | a run failed |$'
  echo 'echo "gpu_bench: no GPU is visible" >&2; exit 2' | stub build/tools/bench/gpu_bench
  expect 2 "gpu_check.sh: no GPU is visible" "$@"
  stub bin/cmake <<'TEXT'
[ "$3" = --target ] && echo gpu_check_tests: phony
TEXT
  expect 1 "gpu_check.sh: FAILED: the build" "$@"
  echo true | stub bin/cmake
  expect 2 "gpu_check.sh: building for it needs the CUDA toolkit" "$@"

  # Nothing can be installed; what is there cannot be configured.
  for command in dpkg-query apt-get sudo cmake; do echo 'exit 1' | stub bin/$command; done
  expect 2 "install them, then cmake --preset release -DDISTILL_TESTS=ON, then tools/gpu_check.sh --build build/release"
  echo 'echo installed' | stub bin/dpkg-query
  expect 2 "gpu_check.sh: the build cannot be configured (above)"
}

virtual() {
  expect 0 PASSED --virtual --build "$1" --out "$report"
  reports '^| groups over NCCL | pass |'
  reports '^| program on two GPUs, pp: 2, against cpu | pass |'
  reports "^PASSED, 3 skipped: cuDNN's attention against its formula; logits channel between GPUs without peer access; "
}

faults() {
  set -- --virtual --build "$1" --out "$report"
  (
    export VIRTUAL_GPU_DRIVER=12040
    expect 2 "gpu_check.sh: the NVIDIA driver is for CUDA 12.4 and this program for CUDA 13" "$@"
  )
  (
    export VIRTUAL_GPU_DEVICES=1
    expect 0 PASSED "$@"
  )
  reports '^| groups over NCCL | skip | 0 | one GPU'
  (
    export VIRTUAL_GPU_PEER_ACCESS=0
    expect 0 PASSED "$@"
  )
  reports '^| logits channel between GPUs without peer access | pass |'
  (
    export VIRTUAL_GPU_DEVICES=1 VIRTUAL_GPU_COMPUTE_MODE=3
    expect 0 PASSED "$@"
  )
  reports '^| program bf16, device: cuda, two ranks | skip | 0 | GPU 0 takes one process at a time'
  # The second allocation of every process fails.
  (
    export VIRTUAL_GPU_FAIL=cudaMalloc:2:cudaErrorECCUncorrectable
    expect 1 "FAILED: losses against their formulas; losses over a cut vocabulary; program fp32, device: cuda, one rank; \
program fp32, device: cuda, two" "$@"
  )
  reports cudaErrorECCUncorrectable
}

"$@"
