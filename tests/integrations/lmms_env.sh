#!/bin/sh
# Creates an environment with lmms-eval (about 7 GB) for the tests marked `lmms`, and prints the command that runs them.
# Usage: tests/integrations/lmms_env.sh FOLDER
set -eu
folder=${1:?give a folder for the environment}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
python3 -m venv "$folder"
# The versions that the plug-in was tested with.
"$folder/bin/pip" install --quiet lmms-eval==0.7.3 transformers==5.23.0 -e "$root[test,lmms]"
echo "cd $root && $folder/bin/python -m pytest -m lmms tests/integrations"
