#!/bin/bash
# Makes a clean root of Debian 12 with systemd, from the mirror that apt is set to: scripts/debian-root.sh ROOT. Needs root
# and mmdebstrap.
set -euo pipefail

# shellcheck disable=SC2016 # apt's own
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 'Component: main' | head -n 1)
mmdebstrap --quiet --mode=root --variant=apt --include=systemd,systemd-sysv,procps bookworm "$1" ${mirror:+"$mirror"} >/dev/null
