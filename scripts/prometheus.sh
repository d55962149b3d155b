#!/usr/bin/env bash
# Unpacks Debian's Prometheus into a directory, without installing it. The tests of the dashboard and the alerts use it.
#   prometheus.sh DIRECTORY
exec "$(dirname "$0")/unpack.sh" "$1" prometheus
