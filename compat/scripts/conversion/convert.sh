#!/usr/bin/env bash
# Megatron-Bridge's scripts/conversion/convert.sh import|export|roundtrip, run by glmconv: see convert.py beside it, or --help.
exec "${PYTHON:-$(command -v python || command -v python3)}" "$(dirname "${BASH_SOURCE[0]}")/convert.py" "$@"
