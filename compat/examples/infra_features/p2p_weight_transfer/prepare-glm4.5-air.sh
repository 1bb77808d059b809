#!/usr/bin/env bash
# miles' prepare-glm4.5-air.sh [--download-only], run by glmconv: see prepare_glm4_5_air.py beside it, or --help.
exec "${PYTHON:-$(command -v python || command -v python3)}" "$(dirname "${BASH_SOURCE[0]}")/prepare_glm4_5_air.py" "$@"
