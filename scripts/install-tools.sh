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
if [ ! -x "$tools/gubernator" ] && ! command -v gubernator >/dev/null && command -v go >/dev/null; then
  # A large build, worth two minutes and not more. Go keeps what it has built for the next time.
  module=github.com/gubernator-io/gubernator/v2/cmd/gubernator
  GOBIN="$PWD/$tools" timeout 120 sh -c "go install $module@v2.19.1 || go install $module@v2.13.0" >/dev/null 2>&1
  [ -x "$tools/gubernator" ] || echo "gubernator could not be installed: bench ratelimit leaves it out"
fi
if [ ! -d .cache/xds-protos ] && [ -x .venv/bin/python ]; then
  # Not into .venv: it overwrites files of opentelemetry-proto and googleapis-common-protos there.
  .venv/bin/python -m pip install --quiet --no-deps --target .cache/xds-protos 'xds-protos==1.85.*' >/dev/null 2>&1 ||
    echo "xds-protos could not be installed: the test with Envoy's stubs is skipped"
fi
packages=()
for program in redis-server podman debootstrap openssl; do
  command -v "$program" >/dev/null || packages+=("$program")
done
command -v promtool >/dev/null || packages+=(prometheus)
command -v java >/dev/null || packages+=(openjdk-17-jre-headless)
command -v mvn >/dev/null || packages+=(maven)
command -v runc >/dev/null || command -v crun >/dev/null || packages+=(runc)
if [ ${#packages[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}"; } >.cache/apt.log 2>&1 ||
      echo "not installed (.cache/apt.log says why): ${packages[*]}; tests with these are skipped"
  else
    echo "not at hand: ${packages[*]}; tests with these are skipped"
  fi
fi
scripts/cassandra.sh install || echo "tests with Cassandra are skipped"
exit 0
