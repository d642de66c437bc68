#!/bin/bash
# The demo: the policies of examples/shop, enforced by real Envoys in network namespaces on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
set -x
exec bin/mantlet sandbox -f examples/shop --external 203.0.113.0/24:443 --external 203.0.113.128/25:443 --flows 1 --explain 3
