#!/usr/bin/env bash
# Unpacks Debian's Prometheus into a directory, without installing it. The tests of the dashboard and the alerts use it.
#   prometheus.sh DIRECTORY
set -euo pipefail

folder=$1
mkdir -p "$folder"
cd "$folder"
apt-get download prometheus
dpkg -x prometheus_*.deb .
rm prometheus_*.deb
