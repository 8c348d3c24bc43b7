#!/usr/bin/env bash
# Sees to it that a container image is at hand: it is there, or is pulled, or a stand-in is made from Debian's packages
# (with podman; needs root, Debian 12 or newer and debootstrap).
# Usage: scripts/base-image.sh IMAGE PACKAGE...
# Exit code 3: none of these is possible, and why was said.
set -euo pipefail
image=$1
shift
engine=${CONTAINER_ENGINE:-$(command -v podman || command -v docker || true)}
if [ -z "$engine" ]; then
  echo "neither podman nor docker is at hand" >&2
  exit 3
fi
if "$engine" image inspect "$image" >/dev/null 2>&1 || timeout 300 "$engine" pull --quiet "$image" >/dev/null 2>&1; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || [ "$(basename "$engine")" != podman ] || ! command -v debootstrap >/dev/null; then
  echo "$image cannot be pulled" >&2
  exit 3
fi
echo "$image cannot be pulled: making a stand-in from Debian's packages"
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-cache policy base-files | awk -v main="$codename/main" '$2 ~ /^https?:/ && $3 == main { print $2; exit }')
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
packages=$(IFS=,; echo "ca-certificates,$*")
if ! debootstrap --variant=minbase --include="$packages" "$codename" "$root/fs" "$mirror" >"$root/log" 2>&1; then
  echo "no stand-in for $image: $(tail -1 "$root/log")" >&2
  exit 3
fi
rm -rf "$root"/fs/var/cache/apt/archives/*.deb "$root"/fs/var/lib/apt/lists/*
tar -C "$root/fs" -c . | "$engine" import --quiet - "$image" >/dev/null
