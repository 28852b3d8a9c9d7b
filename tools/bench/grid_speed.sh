#!/bin/sh
# Tokens per second of the quick start's student on one rank and on two data-parallel ranks, one core each, in turn, and
# what the logits channel costs: tools/bench/grid_speed.sh [rounds]. Needs a release build and a machine that does nothing else.
set -eu
cd "$(dirname "$0")/../.."
rounds=${1:-3}
distill=build/release/apps/distill
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1

# run NAME RANKS overrides…: the median of system/tps over the later half of the steps.
run() {
  name=$1 ranks=$2
  shift 2
  rm -rf "$out/$name" "$out/logs/$name"
  mpirun -np "$ranks" --oversubscribe --bind-to none "$distill" --config configs/wordnet_distill.yaml exp_name="$name" \
    output_dir="$out" logging_dir="$out/logs" student.data_args.file_name=configs/wordnet/train.jsonl \
    validation.data_args.file_name=~ max_steps=24 save_steps=0 logging_steps=1 peak_flops=1e11 "$@" >/dev/null
  column "$name" system/tps
}

# column NAME METRIC: median over the later half of the steps.
column() {
  awk -F, -v name="$2" 'NR == 1 { for (i = 1; i <= NF; ++i) if ($i == name) at = i } NR > 13 { print $at }' \
    "$out/logs/$1/metrics.csv" | sort -g | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}

half=student.training_args.per_device_train_batch_size=32
for round in $(seq "$rounds"); do
  one=$(run one 1 distill_loss_weight=0)
  two=$(run two 2 distill_loss_weight=0)
  same=$(run same 2 distill_loss_weight=0 $half)
  awk "BEGIN { printf \"$round: one rank %.0f tokens/s; two data-parallel ranks %.0f, %.2f times; with the same global batch %.0f, \"\
    \"%.2f times\\n\", $one, $two, $two / $one, $same, $same / $one }"
done
tps=$(run channel 2 teacher_pretrain="${TEACHER:-output/wordnet-teacher/export}")
echo "distillation, one student and one teacher rank: $tps tokens/s, step $(column channel train/step_train) s," \
  "the student waits $(column channel time/teacher_wait) s for the teacher, the teacher $(column channel time/student_wait) s for the student"
