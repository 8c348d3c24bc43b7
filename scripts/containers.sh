#!/usr/bin/env bash
# Builds the container images of the four services, agent360-mesh/SERVICE:latest, with podman or docker.
#   CONTAINER_ENGINE   podman or docker
#   PYTHON_IMAGE       the base image (scripts/base-image.sh)
#   PIP_INDEX_URL      handed to the build; so is PIP_CERT, whose folder is mounted while building
# Exit code 3: there is no engine or no base image, and what is missing was said.
set -euo pipefail
cd "$(dirname "$0")/.."
image=${PYTHON_IMAGE:-docker.io/library/python:3.11-slim-bookworm}
scripts/base-image.sh "$image" python3 python3-venv
engine=${CONTAINER_ENGINE:-$(command -v podman || command -v docker)}
options=(--build-arg "PYTHON_IMAGE=$image")
if [ -n "${PIP_INDEX_URL:-}" ]; then options+=(--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL"); fi
if [ "$(basename "$engine")" = podman ]; then
  options+=(--format docker --pull=never) # only Docker's format keeps the health check
  if [ -n "${PIP_CERT:-}" ]; then
    certificates=$(dirname "$PIP_CERT")
    options+=(--build-arg "PIP_CERT=$PIP_CERT" --volume "$certificates:$certificates:ro")
  fi
fi
for service in inference cache ratelimit metrics; do
  echo "building agent360-mesh/$service"
  "$engine" build --quiet "${options[@]}" --target "$service" --tag "agent360-mesh/$service" \
    --file deploy/containers/Containerfile . >/dev/null
done
