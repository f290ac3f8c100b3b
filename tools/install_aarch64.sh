#!/usr/bin/env bash
# Installs what tests/native needs to test the CPU kernels on an emulated aarch64: a compiler for
# such machines and an emulator. Says in one line what came of it; exits with 1 if one is missing.
set -euo pipefail

packages=(g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)

missing() {
  local command found=()
  for command in aarch64-linux-gnu-g++ qemu-aarch64; do
    command -v "$command" > /dev/null || found+=("$command")
  done
  echo "${found[*]}"
}

install() {
  export DEBIAN_FRONTEND=noninteractive
  timeout 60 apt-get update && timeout 180 apt-get install --yes --no-install-recommends "$@"
}

if [[ -n $(missing) && $EUID -eq 0 ]] && command -v apt-get > /dev/null; then
  install "${packages[@]}" > /dev/null 2>&1 || true
fi
if [[ -n $(missing) ]]; then
  echo "the CPU kernels were not tested on an emulated aarch64: no $(missing)" \
    "(Debian, Ubuntu: apt install ${packages[*]})"
  exit 1
fi
echo "emulated aarch64: $(aarch64-linux-gnu-g++ --version | head -n 1)," \
  "$(qemu-aarch64 --version | head -n 1)"
