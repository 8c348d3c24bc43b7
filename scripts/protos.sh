#!/usr/bin/env bash
# protos.sh generate DIR | lint | drift | breaking: the contract's stubs and checks.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
include=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
files=$(cd protos && find agent360 -name '*.proto' | sort)

generate() {
  PATH="$bin:$PATH" "$bin/python" -m grpc_tools.protoc -I protos -I "$include" \
    --python_out="$1" --mypy_out="quiet:$1" --grpc_python_out="$1" --mypy_grpc_out="quiet:$1" $files
}

image() {
  "$bin/python" -m grpc_tools.protoc -I "$1" -I "$include" --include_imports --include_source_info \
    --descriptor_set_out="$2" $files
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case "${1:?generate, lint, drift or breaking}" in
  generate) generate "${2:?directory}" ;;
  lint)
    image protos "$work/image.binpb"
    if ! "$bin/buf" lint "$work/image.binpb" --config \
      '{"version":"v2","lint":{"use":["STANDARD","COMMENTS"],"ignore":["google"]}}'; then
      exit 1
    fi ;;
  drift)
    generate "$work"
    for file in $(cd "$work" && find . -type f); do
      cmp "$work/$file" "clients/$file" || { echo "stubs differ from protos/: run 'make protos'"; exit 1; }
    done ;;
  breaking)
    tag=$(git tag --list 'v*' --sort=-version:refname | head -n 1)
    if [ -z "$tag" ]; then echo "no release tag yet: nothing to compare with"; exit 0; fi
    mkdir "$work/old"
    git archive "$tag" protos | tar -x -C "$work/old"
    image protos "$work/new.binpb"
    files=$(cd "$work/old/protos" && find agent360 -name '*.proto') image "$work/old/protos" "$work/old.binpb"
    "$bin/buf" breaking "$work/new.binpb" --against "$work/old.binpb" ;;
esac
