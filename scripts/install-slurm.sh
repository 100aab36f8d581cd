#!/usr/bin/env bash
# Install what tests/slurm_rig needs to run a real Slurm: its daemons, munge, and a database.
# May be repeated, and does nothing where everything is there. No daemon is started.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurmdbd slurm-client munge mariadb-server-core mariadb-client-core)
PROGRAMS=(munged slurmctld slurmd slurmdbd mariadbd mariadb-install-db sbatch sacct)
POLICY=/usr/sbin/policy-rc.d
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing() {
  for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || return 0; done
  return 1
}

refuse() {
  echo "Slurm is not installed: $1" >&2
  exit 1
}

# Debian's packages start their daemons unless this file says no (its exit status is 101).
install_packages() {
  if [ ! -e "$POLICY" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${AS_ROOT[@]}" tee "$POLICY" >/dev/null
    "${AS_ROOT[@]}" chmod 755 "$POLICY"
    trap '"${AS_ROOT[@]}" rm -f "$POLICY"' EXIT
  fi
  "${AS_ROOT[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --quiet --quiet --no-install-recommends "${PACKAGES[@]}" >/dev/null
}

missing || exit 0
command -v apt-get >/dev/null ||
  refuse "this script knows apt alone; install Slurm, munge and MariaDB with your system's means"
AS_ROOT=()
if [ "$(id -u)" != 0 ]; then
  sudo -n true 2>/dev/null || refuse "it takes root; run: sudo $0"
  AS_ROOT=(sudo -n)
fi
if ! install_packages 2>/dev/null; then
  # The lists may be missing, as in a container's image, or older than the archive.
  "${AS_ROOT[@]}" apt-get update --quiet --quiet
  install_packages
fi
if missing; then refuse "${PACKAGES[*]} are installed, and a program of them is not on PATH"; fi
