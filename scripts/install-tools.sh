#!/usr/bin/env bash
# Installs the programs that some tests need, where this machine allows it. Never fails: what is missing is said, and the
# tests that need it are skipped with the reason.
set -u
cd "$(dirname "$0")/.."
tools=.cache/bin
mkdir -p "$tools"
if [ ! -x "$tools/grpcurl" ] && ! command -v grpcurl >/dev/null; then
  if command -v go >/dev/null; then
    GOBIN="$PWD/$tools" go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3 >/dev/null 2>&1 ||
      echo "grpcurl could not be installed: tests with grpcurl are skipped"
  else
    echo "go is not at hand: tests with grpcurl are skipped"
  fi
fi
exit 0
