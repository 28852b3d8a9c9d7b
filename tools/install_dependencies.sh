#!/bin/sh
# Installs the Debian packages that the build needs and those that are named, and only what is missing.
set -eu
packages="g++ cmake ninja-build ccache pkg-config openmpi-bin libopenmpi-dev libyaml-cpp-dev libcli11-dev libhdf5-dev catch2
libdnnl-dev libhwy-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev libxxhash-dev wordnet-base
iproute2 util-linux mold $*"
# The virtual GPU runs threads of a GPU as fibers.
if command -v nvcc >/dev/null || [ -e "${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}/include/cuda_runtime.h" ]; then
  packages="$packages libboost-context-dev"
fi
command -v dpkg-query >/dev/null ||
  { echo "dependencies: not Debian: install what these packages are for by hand: $packages" | tr '\n' ' ' >&2; echo >&2; exit 1; }

missing=""
for package in $packages; do
  # pkg-config may be provided by pkgconf, so the command counts, not the package.
  [ "$package" = pkg-config ] && command -v pkg-config >/dev/null && continue
  dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
[ -z "$missing" ] && { echo "dependencies: all there"; exit 0; }

echo "dependencies: installing$missing"
as_root=""
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "dependencies: run as root: apt-get install$missing" >&2; exit 1; }
  as_root=sudo
fi
# shellcheck disable=SC2086  # a list of words on purpose
{
  $as_root apt-get update -q >/dev/null
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >/dev/null
}
echo "dependencies: done"
