#!/bin/sh
# Shows what the machine code of the hot CUDA kernels is made of, and fails when a kernel lacks what it is meant to use:
#   tools/sass_check.sh BUILD            counts per kernel, for sm_90; 1 when something is missing
#   tools/sass_check.sh --fetch FOLDER   puts NVIDIA's disassembler there, where the toolkit came without (from PyPI, 5 MB; python3)
# Needs cuobjdump and nvdisasm: of the toolkit, or in BUILD/disassembler. 77 when there are none.
set -eu
if [ "${1-}" = --fetch ]; then
  folder=${2:?a folder}
  python3 -m pip download -q --no-deps -d "$folder" nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
  for wheel in "$folder"/*.whl; do
    python3 -m zipfile -e "$wheel" "$folder/wheel"
    rm "$wheel"
  done
  mv "$folder"/wheel/nvidia/*/bin/* "$folder"
  rm -r "$folder/wheel"
  chmod +x "$folder"/*
  exit
fi
build=${1:?usage: sass_check.sh BUILD}
PATH=$PATH:${CUDA_PATH:-/usr/local/cuda}/bin:$build/disassembler
command -v cuobjdump >/dev/null && command -v nvdisasm >/dev/null ||
  { echo "sass_check: skipped: neither in PATH nor in $build/disassembler is a cuobjdump with nvdisasm: tools/sass_check.sh --fetch $build/disassembler"; exit 77; }
objects=$build/kernels/CMakeFiles/distill_cuda_objects.dir/cuda
failed=0

# Instructions of one object: "kernel instruction" lines, the kernel's name without namespaces and arguments.
instructions() {
  cuobjdump -sass -arch sm_90 "$objects/$1.cu.o" | c++filt | awk '
    /Function :/ {
      kernel = $0
      sub(/.*Function : (void )?/, "", kernel)
      gsub(/\(anonymous namespace\)::|distill::cuda::|distill::/, "", kernel)
      sub(/\(.*/, "", kernel)
      gsub(/ /, "", kernel)
    }
    match($0, /(HMMA|LDG|STG|LDGSTS|LDSM)[.A-Z0-9]*/) { print kernel, substr($0, RSTART, RLENGTH) }'
}

# wants OBJECT KERNEL INSTRUCTION…: every kernel whose name contains KERNEL has each of them.
wants() {
  object=$1 kernel=$2
  shift 2
  [ -f "$work/$object" ] || instructions "$object" >"$work/$object"
  names=$(awk -v k="$kernel" 'index($1, k) { print $1 }' "$work/$object" | sort -u)
  [ -n "$names" ] || { echo "sass_check: no kernel $kernel in $object.cu"; failed=1; return 0; }
  for name in $names; do
    counts=""
    for instruction; do
      n=$(awk -v k="$name" -v i="$instruction" '$1 == k && index($2, i) == 1 { ++n } END { print n + 0 }' "$work/$object")
      counts="$counts  $n $instruction"
      [ "$n" -gt 0 ] || { counts="$counts (missing)"; failed=1; }
    done
    echo "$object: $name:$counts"
  done
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for type in bf16 f16; do
  # Tensor cores, fed from shared memory that is filled 16 bytes a thread without registers.
  wants attention_$type attention_mma_ HMMA.16816.F32 LDSM.16. LDGSTS.E.BYPASS.128
done
wants attention_bf16 attention_mma_ HMMA.16816.F32.BF16
for kernel in "add_kernel<bf16>" "swiglu_kernel<bf16>" "swiglu_backward_kernel<bf16>" "rope_kernel<bf16>" "adamw_kernel<bf16>" \
  "cast_kernel<bf16,float>" "copy_rows_kernel<uint4>"; do
  wants elementwise "$kernel" LDG.E.128 STG.E.128
done
wants reductions "rms_norm_kernel<bf16" LDG.E.128
wants reductions "rms_norm_backward_kernel<bf16" LDG.E.128
wants reductions "square_parts_kernel<float>" LDG.E.128
for pass in "pass_kernel<MaximaPass,float,bf16>" "pass_kernel<SumsPass,float,bf16>" "pass_kernel<DivergencePass<ForwardKl>,float,bf16>"; do
  wants loss_bf16 "$pass" LDG.E.128
done
wants loss_bf16 "gradient_kernel<ForwardKl,float,bf16>" LDG.E.128 STG.E.128
[ $failed -eq 0 ] || { echo "sass_check: FAILED: a hot kernel lacks an instruction"; exit 1; }
