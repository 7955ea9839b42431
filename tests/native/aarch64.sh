#!/usr/bin/env bash
# The C++ tests of the NEON paths on any machine: cross-compiled and run in an emulator.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user-static.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for source in csrc/cosine_knn*.cpp csrc/isa/cosine_knn_{portable,neon,neondot}.cpp \
    tests/native/cosine_knn_test.cpp; do
    march=armv8-a
    [[ $source == *_neondot.cpp ]] && march=armv8.2-a+dotprod
    aarch64-linux-gnu-g++ -std=c++20 -O2 -Wall -Wextra -Werror -ffp-contract=off -march=$march \
        -Icsrc -c "$source" -o "$build/$(basename "$source" .cpp).o"
done
aarch64-linux-gnu-g++ -static "$build"/*.o -pthread -o "$build/cosine_knn_test"
for cpu in max cortex-a53; do # with and without dot products of bytes
    echo "== $cpu"
    qemu-aarch64-static -cpu $cpu "$build/cosine_knn_test"
done
