#!/usr/bin/env bash
# The C++ tests of the NEON paths on any machine: cross-compiled and run in an emulator.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user or qemu-user-static.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64)
for name in answer_consistency cosine_knn token_stats; do
    mkdir "$build/$name"
    for source in csrc/"$name"*.cpp csrc/isa/"$name"_{portable,neon,neondot}.cpp \
        "tests/native/${name}_test.cpp"; do
        [ -e "$source" ] || continue
        march=armv8-a
        [[ $source == *_neondot.cpp ]] && march=armv8.2-a+dotprod
        aarch64-linux-gnu-g++ -std=c++20 -O2 -Wall -Wextra -Werror -ffp-contract=off -march=$march \
            -Icsrc -c "$source" -o "$build/$name/$(basename "$source" .cpp).o"
    done
    aarch64-linux-gnu-g++ -static "$build/$name"/*.o -pthread -o "$build/$name/test"
    for cpu in max cortex-a53; do # with and without dot products of bytes
        echo "== $name on $cpu"
        "$qemu" -cpu $cpu "$build/$name/test"
    done
done
