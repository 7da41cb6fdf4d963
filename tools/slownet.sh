#!/usr/bin/env bash
# Run a command on a slow link: RATE=150mbit unshare -n bash tools/slownet.sh COMMAND... (root, in a network namespace
# of its own). All loopback traffic of the command shares RATE, so communication costs time but no computation.
set -euo pipefail
# Packets of the usual size: one of the loopback's 64 KiB packets would be a burst by itself.
ip link set lo mtu 9000
ip link set lo up
tc qdisc add dev lo root tbf rate "${RATE:?set RATE, for instance RATE=1gbit}" burst 32kb latency 400ms
exec "$@"
