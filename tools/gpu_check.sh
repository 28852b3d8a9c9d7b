#!/bin/sh
# What someone with a GPU runs first; --help says what it does. Without --build it installs what is missing and builds
# build/release. Logs of all it runs are kept in <build>/gpu_check.
set -eu

usage() {
  cat <<'TEXT'
tools/gpu_check.sh [--virtual] [--build FOLDER] [--out FILE]

Builds distill and checks it on the GPUs of this machine: every operation against its textbook formula, whole models
against torch, the logits channel between two processes, groups over NCCL (two GPUs or more), and the program with
device: cuda against device: cpu, also on grids of two GPUs and with cuDNN's attention. Then times the hot operations
against this machine's own ceilings. Writes one report (Markdown), whose last line is PASSED with what was skipped, or
FAILED with what failed.

  --virtual        on virtual GPUs, for a machine without: a few cases of each test; no number of the benchmark means
                   anything
  --build FOLDER   a build tree that is configured, instead of build/release
  --out FILE       the report (gpu_check/report.md in the build tree)

Exit codes: 0 passed; 1 failed, or not built; 2 it cannot be checked here, for one reason that is said.
TEXT
}
refuse() {
  echo "gpu_check.sh: $*" >&2
  exit 2
}

virtual="" build="" report=""
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage; exit 0 ;;
    --virtual) virtual=yes ;;
    --build | --out)
      [ -n "${2-}" ] || refuse "$1 needs a name; --help shows how"
      # Relative names are those of the folder it was called in.
      case $2 in /*) name=$2 ;; *) name=$PWD/$2 ;; esac
      if [ "$1" = --build ]; then build=$name; else report=$name; fi
      shift ;;
    *) refuse "unknown option '$1'; --help shows what there is" ;;
  esac
  shift
done
if [ -n "$report" ]; then
  [ -d "$(dirname "$report")" ] || refuse "--out $report: there is no folder $(dirname "$report")"
fi
cd "$(dirname "$0")/.."
[ -f CMakePresets.json ] || refuse "needs the source tree of distill: clone it and run tools/gpu_check.sh there"
if [ -z "$virtual" ] && [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ] && ! nvidia-smi -L >/dev/null 2>&1; then
  refuse "no GPU: no NVIDIA driver is loaded; --virtual checks on virtual GPUs"
fi

# --- building
if [ -z "$build" ]; then
  by_hand="cmake --preset release -DDISTILL_TESTS=ON, then tools/gpu_check.sh --build build/release"
  tools/install_dependencies.sh || refuse "packages that the build needs are missing (above): install them, then $by_hand"
  cmake --preset release -DDISTILL_TESTS=ON --log-level=WARNING ||
    refuse "the build cannot be configured (above): once it can be, by $by_hand"
  build=$PWD/build/release
fi
[ -f "$build/CMakeCache.txt" ] || refuse "--build $build: no build tree that is configured"
if [ -n "$virtual" ]; then
  everything=gpu_check_virtual_tests on=_virtual_gpu
  distill=$build/test/apps/distill-virtual-gpu bench=$build/test/gpu_bench_virtual_gpu mpi_on=""
  missing="the headers of the CUDA toolkit and of NCCL, and Debian's libboost-context-dev"
else
  everything=gpu_check_tests on=_cuda mpi_on=_cuda
  distill=$build/apps/distill bench=$build/tools/bench/gpu_bench
  missing="the CUDA toolkit, at least 12.8: put its nvcc into PATH"
fi
cmake --build "$build" --target help | grep "^$everything:" >/dev/null || refuse "building for it needs $missing"
if ! cmake --build "$build" -j "$(nproc)" --target "$everything"; then
  echo "gpu_check.sh: FAILED: the build" >&2
  exit 1
fi

work=$build/gpu_check
rm -rf "$work"
mkdir -p "$work"
[ -n "$report" ] || report=$work/report.md
: >"$report" 2>/dev/null || refuse "--out $report: cannot be written"

# --- what is there
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
if [ -n "$virtual" ]; then
  export VIRTUAL_GPU_RACES=off VIRTUAL_GPU_DEVICES="${VIRTUAL_GPU_DEVICES:-2}" OMP_NUM_THREADS=1
fi
"$bench" machine >"$work/machine" 2>"$work/no_machine" || refuse "$(sed 's/^gpu_bench: //' "$work/no_machine")"
gpus=$(grep -c '^gpu ' "$work/machine")
reached=$(sed -n 's/^peer access 0 -> 1: //p' "$work/machine")
lonely=$(grep '^gpu 0: .* one process at a time' "$work/machine") || lonely=""
alone="GPU 0 takes one process at a time (compute mode Exclusive_Process)"

# --- running
results=$work/results failures=$work/failures skipped=$work/skipped
: >"$results"
: >"$failures"
: >"$skipped"

# note NAME RESULT SECONDS WHY
note() {
  printf '%-58s %-4s %5s s  %s\n' "$1" "$2" "$3" "$4"
  printf '| %s | %s | %s | %s |\n' "$1" "$2" "$3" "$(printf %s "$4" | tr '|\n' '/ ')" >>"$results"
  [ "$2" != FAIL ] || echo "$1" >>"$failures"
}
log_of() { echo "$work/$(printf %s "$1" | tr -c 'a-zA-Z0-9' _).log"; }

# check NAME COMMAND…: passes when it gives 0 in time, and says $expected on $times lines.
expected="" times=0
check() {
  name=$1 log=$(log_of "$1") code=0 begun=$(date +%s)
  shift
  timeout -k 10 "$limit" "$@" >"$log" 2>&1 </dev/null || code=$?
  seconds=$(($(date +%s) - begun))
  sed -i 's/\x1b\[[0-9;]*m//g' "$log"  # colours, because mpirun gives its ranks a terminal
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    note "$name" FAIL "$seconds" "not done after $limit s"
  elif [ "$code" != 0 ]; then
    note "$name" FAIL "$seconds" "exit code $code: $(grep -v '^ *$' "$log" | grep -v '^[-=.]*$' | tail -1)"
  elif [ -n "$expected" ] && [ "$(grep -c "$expected" "$log")" != "$times" ]; then
    note "$name" FAIL "$seconds" "ended well without having run: '$expected' is not there $times times"
  else
    note "$name" pass "$seconds" "$(grep "${expected:-no such line}" "$log" | tail -1)"
    return 0
  fi
  return 1
}
# test_of NAME PROGRAM [CASES]: on one rank or, with $ranks, under mpirun. Catch gives 0 where no case is of that name.
test_of() {
  expected="All tests passed" times=$ranks
  if [ "$ranks" = 1 ]; then
    check "$@" || true
  else
    test_name=$1
    shift
    check "$test_name" env "DISTILL_EXPECT_RANKS=$ranks" mpirun -np "$ranks" --oversubscribe --bind-to none "$@" || true
  fi
  expected=""
}
skip() {
  note "$1" skip 0 "$2"
  echo "$1" >>"$skipped"
}

# --- tests
limit=1800 ranks=1
device_cases="" loss_cases="~[host]" sharded_cases="~[host]" golden_cases=""
if [ -n "$virtual" ]; then
  limit=300 device_cases="zero,add_bias,swiglu lets*" loss_cases="a scale of zero*" sharded_cases="a scale of zero*"
  golden_cases="logits of*"
fi
test_of "operations against their formulas" "$build/test/kernels/device_test$on" ${device_cases:+"$device_cases"}
test_of "losses against their formulas" "$build/test/kernels/loss_test$on" "$loss_cases"
test_of "losses over a cut vocabulary" "$build/test/kernels/sharded_loss_test$on" "$sharded_cases"
test_of "models against torch" "$build/test/apps/golden_test$on" ${golden_cases:+"$golden_cases"}
# Why cuDNN's attention cannot be had here; kernels/cuda/cudnn_attention.cpp knows the same.
no_cudnn=""
if "$distill" --version | grep -q "no cuDNN"; then
  no_cudnn="built without cuDNN"
elif ! grep -q '^gpu 0: .* compute capability \(9\|10\)\.' "$work/machine"; then
  no_cudnn="GPU 0 is not of compute capability 9 or 10"
fi
if [ -n "$no_cudnn" ]; then
  skip "cuDNN's attention against its formula" "$no_cudnn"
else
  test_of "cuDNN's attention against its formula" "$build/test/kernels/cudnn_attention_test$on" "~[virtual]"
fi

limit=300 ranks=2
channel=$build/test/parallel/gpu_channel_test$mpi_on group=$build/test/parallel/group_on_device_test$mpi_on
if [ -n "$lonely" ]; then
  skip "logits channel between two processes on one GPU" "$alone"
else
  test_of "logits channel between two processes on one GPU" "$channel" "[one gpu]"
fi
if [ "$gpus" -lt 2 ]; then
  skip "logits channel between two GPUs" "one GPU"
  skip "logits channel between GPUs without peer access" "one GPU"
elif [ "$reached" = yes ]; then
  test_of "logits channel between two GPUs" "$channel" "[two gpus]"
  skip "logits channel between GPUs without peer access" "GPUs 0 and 1 reach each other"
else
  skip "logits channel between two GPUs" "GPUs 0 and 1 do not reach each other"
  test_of "logits channel between GPUs without peer access" "$channel" "[apart]"
fi
if [ -n "$lonely" ] && [ "$gpus" -lt 2 ]; then
  skip "groups through host memory" "$alone"
else
  test_of "groups through host memory" "$group" "~[nccl]"
fi
# Why there are no groups over NCCL. Where there could be, a build without NCCL is one to do again.
no_nccl=""
if [ "$gpus" -lt 2 ]; then
  no_nccl="one GPU; NCCL wants one for each rank"
  skip "groups over NCCL" "$no_nccl"
elif [ -z "$virtual" ] && ! ldd "$group" | grep -q libnccl; then
  no_nccl="built without NCCL: nccl.h was not found; -DDISTILL_NCCL_HEADERS=FOLDER names its place"
  note "groups over NCCL" FAIL 0 "$no_nccl"
else
  ranks=$((gpus < 4 ? gpus : 4))
  test_of "groups over NCCL" "$group" "[nccl]"
fi

# --- the program
# The quick start's models and records; on virtual GPUs, which are slow, with one small layer.
limit=600 steps=10 batch=16
for role in teacher student; do cp -r "configs/wordnet/$role" "$work/$role"; done
if [ -n "$virtual" ]; then
  steps=2 batch=2
  sed -i 's/"hidden_size": 256/"hidden_size": 32/; s/"hidden_size": 160/"hidden_size": 40/
    s/"num_hidden_layers": [0-9]*/"num_hidden_layers": 1/; s/"intermediate_size": [0-9]*/"intermediate_size": 64/' \
    "$work/teacher/config.json" "$work/student/config.json"
  sed -i 's/"num_hidden_layers": 1/"num_hidden_layers": 2/' "$work/teacher/config.json"  # for a pipeline
fi
head -500 configs/wordnet/train.jsonl >"$work/train.jsonl"
cat >"$work/run.yaml" <<YAML
student_pretrain: $work/student
teacher_pretrain: $work/teacher-made/export
output_dir: $work
logging_dir: $work/logs
sequence_length: 64
max_steps: $steps
max_grad_norm: 1.0
logging_steps: 1
save_steps: 0
eval_steps: 0
peak_flops: 1.0e+12
student:
  data_args: {file_name: $work/train.jsonl}
  training_args: {learning_rate: 1.0e-3, per_device_train_batch_size: $batch, gradient_accumulation_steps: 2}
YAML
# run_of WHAT RANKS NAME KEY=VALUE…
run_of() {
  what=$1 on_ranks=$2 run_name=$3
  shift 3
  set -- "$distill" --config "$work/run.yaml" "exp_name=$run_name" "$@"
  [ "$on_ranks" = 1 ] || set -- mpirun -np "$on_ranks" --oversubscribe --bind-to none "$@"
  check "$what" "$@"
}
# compare WHAT IS_THERE RUN IS_THERE OTHER TOLERANCE: loss and gradient norm of every step.
compare() {
  if [ -z "$2" ] || [ -z "$4" ]; then
    skip "$1" "a run failed"
    return 0
  fi
  difference=$(paste -d '\n' "$work/logs/$3/metrics.csv" "$work/logs/$5/metrics.csv" | awk -F, -v wanted="$steps" '
    function is_number(x) { return x ~ /^-?[0-9.]+(e[-+]?[0-9]+)?$/ }
    function apart(a, b) { if (!is_number(a) || !is_number(b)) { bad = 1; return 0 }
      d = a > b ? a - b : b - a; m = (b < 0 ? -b : b); return d == 0 ? 0 : d / m }
    NR == 1 { for (i = 1; i <= NF; ++i) { if ($i == "train/loss") loss = i; if ($i == "student/grad_norm") norm = i } }
    NR > 2 && NR % 2 == 1 { l = $loss; n = $norm }
    NR > 2 && NR % 2 == 0 { ++rows; d = apart(l, $loss); if (d > most) most = d
      d = apart(n, $norm); if (d > most_norm) most_norm = d }
    END { if (bad || rows != wanted || !loss || !norm) print "incomparable"
          else printf "%.2g %.2g\n", most, most_norm }')
  result=FAIL
  if awk -v d="$difference" -v t="$6" 'BEGIN { exit !(split(d, x, " ") == 2 && x[1] <= t && x[2] <= 10 * t) }'; then
    result=pass
  fi
  note "$1" "$result" 0 "largest relative difference of loss and gradient norm in $steps steps: $difference; allowed $6 and 10 times that"
}
# In f32 rounding differs; in bf16 every stored number carries 2⁻⁹ of its own.
if run_of "a teacher, made on the CPU" 1 teacher-made device=cpu distill_loss_weight=0 "student_pretrain=$work/teacher"; then
  for dtype in fp32:1e-4 bf16:2e-2; do
    allowed=${dtype#*:} dtype=${dtype%:*}
    keys="student.model_args.dtype=$dtype teacher.model_args.dtype=$dtype" on_cpu="" on_gpu="" on_two=""
    # shellcheck disable=SC2086  # a list of words
    {
      run_of "program $dtype, device: cpu" 1 "$dtype-cpu" device=cpu $keys && on_cpu=yes
      run_of "program $dtype, device: cuda, one rank" 1 "$dtype-cuda" device=cuda $keys && on_gpu=yes
    }
    compare "program $dtype, cuda against cpu" "$on_gpu" "$dtype-cuda" "$on_cpu" "$dtype-cpu" "$allowed"
    if [ -n "$lonely" ] && [ "$gpus" -lt 2 ]; then
      skip "program $dtype, device: cuda, two ranks" "$alone"
      continue
    fi
    # shellcheck disable=SC2086
    run_of "program $dtype, device: cuda, two ranks" 2 "$dtype-cuda2" device=cuda $keys && on_two=yes
    compare "program $dtype, two ranks against one: the same bits" "$on_two" "$dtype-cuda2" "$on_gpu" "$dtype-cuda" 0
  done
  # Last were the bf16 runs, with our own attention.
  if [ -n "$no_cudnn" ]; then
    skip "program bf16, cuDNN's attention against ours" "$no_cudnn"
  else
    by_cudnn="" sdpa="student.model_args.attn_implementation=sdpa teacher.model_args.attn_implementation=sdpa"
    # shellcheck disable=SC2086
    run_of "program bf16, attention by cuDNN" 1 bf16-cudnn device=cuda $keys $sdpa && by_cudnn=yes
    refused=$(grep -m 1 'our own attention is used' "$(log_of "program bf16, attention by cuDNN")") || refused=""
    if [ -n "$refused" ]; then
      skip "program bf16, cuDNN's attention against ours" "$refused"
    else
      compare "program bf16, cuDNN's attention against ours" "$by_cudnn" bf16-cudnn "$on_gpu" bf16-cuda "$allowed"
    fi
  fi
else
  skip "program with device: cuda" "there is no teacher"
fi
# Two students, on a GPU each, with the teacher's shape, whose heads can be cut; the loss of a grid is that of one rank.
if [ -n "$no_nccl" ]; then
  skip "program on grids of two GPUs" "$no_nccl"
else
  on_cpu="" students="student_pretrain=$work/teacher distill_loss_weight=0 student.model_args.dtype=fp32"
  # shellcheck disable=SC2086
  run_of "program without a teacher, device: cpu" 1 student-cpu device=cpu $students && on_cpu=yes
  for grid in tp pp dp; do
    on_grid="" key="student.strategy_args.strategy_config.${grid}_size=2"
    [ $grid != dp ] || key=student.training_args.gradient_accumulation_steps=1
    # shellcheck disable=SC2086
    run_of "program on two GPUs, $grid: 2" 2 "student-$grid" device=cuda $students "$key" && on_grid=yes
    compare "program on two GPUs, $grid: 2, against cpu" "$on_grid" "student-$grid" "$on_cpu" student-cpu 1e-4
  done
fi

# --- the benchmark
limit=600 size=full
[ -z "$virtual" ] || size=tiny
expected="^| distill_loss " times=1  # the last row
check "benchmark" "$bench" cuda "$size" || true
expected=""

# --- the report
{
  echo "# GPU check of distill"
  echo
  [ -z "$virtual" ] || printf 'On **virtual GPUs**: it shows that the check works, and nothing about a GPU.\n\n'
  echo "- date: $(date -u '+%Y-%m-%d %H:%M:%S') UTC"
  echo "- source: $(git describe --always --dirty 2>/dev/null || echo 'no git')"
  echo "- host: $(uname -srm), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc --all) processors," \
    "$(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo)"
  nvcc=$(sed -n 's/^CMAKE_CUDA_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
  [ -z "$nvcc" ] || echo "- toolkit: $("$nvcc" --version | tail -1) ($nvcc)"
  echo
  echo '```'
  cat "$work/machine"
  if [ -z "$virtual" ] && command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=index,name,driver_version,memory.total,compute_cap,clocks.max.sm,power.limit --format=csv || true
    [ "$gpus" -lt 2 ] || nvidia-smi topo -m || true
  fi
  "$distill" --version
  ldd "$distill" | awk '/cuda|cublas|cudnn|nccl|libmpi|dnnl|hdf5/ && $3 ~ /^\// { print $3 }' | sort -u |
    while read -r library; do echo "library: $(basename "$(readlink -f "$library")")"; done
  echo '```'
  printf '\n## Checks\n\n| check | result | seconds | |\n|---|---|---:|---|\n'
  cat "$results"
  printf '\n## Benchmark\n\n'
  [ -z "$virtual" ] || printf 'Meaningless: a virtual GPU computes on the host.\n\n'
  cat "$(log_of benchmark)"
  printf '\nThe ceiling is what this machine reached in the same run: a plain copy in memory (bytes read and written), and the\n'
  printf 'fastest square matrix product of the number format. Bytes are those that must move, median of five runs.\n'
  if [ -s "$failures" ]; then
    printf '\n## Output of what failed\n'
    while read -r name; do
      [ -f "$(log_of "$name")" ] || continue
      printf '\n### %s\n\n```\n' "$name"
      tail -60 "$(log_of "$name")"
      echo '```'
    done <"$failures"
    printf '\nFAILED: %s\n' "$(paste -s -d ';' "$failures" | sed 's/;/; /g')"
  elif [ -s "$skipped" ]; then
    printf '\nPASSED, %s skipped: %s\n' "$(wc -l <"$skipped")" "$(paste -s -d ';' "$skipped" | sed 's/;/; /g')"
  else
    printf '\nPASSED\n'
  fi
} >"$report"

echo "report: $report"
tail -1 "$report"
[ ! -s "$failures" ]
