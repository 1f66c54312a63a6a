#!/bin/bash
# The fatbinary of CUDA 13, under the options of CUDA 12 that clang passes:
#   --image=profile=sm_70,file=F       ->  --image3=kind=elf,sm=70,file=F
#   --image=profile=compute_70,file=F  ->  --image3=kind=ptx,sm=70,file=F
set -eu
arguments=()
for argument in "$@"; do
  argument="${argument/#--image=profile=sm_/--image3=kind=elf,sm=}"
  argument="${argument/#--image=profile=compute_/--image3=kind=ptx,sm=}"
  arguments+=("$argument")
done
exec "$(dirname "$0")/fatbinary13" "${arguments[@]}"
