#!/usr/bin/env bash
# Builds gradclip_ext and runs its tests against several versions of torch, each in an environment
# of its own. The defaults are the oldest supported (compiled as C++17) and the newest (C++20).
#
# usage: tools/check_torch_versions.sh [-o FOLDER] [VERSION...]
#   -o FOLDER   where environments and builds go (default: build/torch-versions)
#   PYTHON      environment variable: the interpreter to use (default: python3)
set -euo pipefail
cd "$(dirname "$0")/.."

folder=build/torch-versions
while getopts o: option; do
  case $option in
    o) folder=$OPTARG ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- 2.6.0 2.13.0

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
results=()
failed=0

# In a subshell, so that the caller's working directory does not change.
check() (
  set -e
  version=$1
  python=$folder/$version/venv/bin/python
  tree=$folder/$version/tree
  "${PYTHON:-python3}" -m venv "$folder/$version/venv"
  # setuptools builds wheels without the wheel package from 70.1 on.
  "$python" -m pip install --quiet "torch==$version" 'setuptools>=70.1' ninja pybind11 \
    pytest hypothesis numpy
  # From an sdist, so that files left by a build in the source folder cannot help.
  rm -rf "$tree" "$folder/$version/dist"
  mkdir -p "$tree"
  "$python" setup.py --quiet sdist --dist-dir "$folder/$version/dist"
  tar -xzf "$folder/$version"/dist/*.tar.gz -C "$tree" --strip-components 1
  cd "$tree"
  "$python" setup.py build_ext --inplace
  "$python" -m pytest
)

for version in "$@"; do
  # Not as a condition, where bash would ignore `set -e` inside the function.
  set +e
  check "$version"
  status=$?
  set -e
  if [ $status -eq 0 ]; then
    results+=("torch $version: passed")
  else
    results+=("torch $version: FAILED")
    failed=1
  fi
done
printf '%s\n' "${results[@]}"
exit $failed
