#!/usr/bin/env bash
# The C++ tests under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer.
# Usage: tests/native/sanitize.sh [python [sanitizer...]]; the Python only has to have pybind11.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python}
sanitizers=("${@:2}")
((${#sanitizers[@]})) || sanitizers=(address,undefined thread)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
for sanitizer in "${sanitizers[@]}"; do
    echo "== -fsanitize=$sanitizer"
    cmake -S . -B "$build/$sanitizer" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
        -DROBUSTFT_NATIVE_TESTS=ON -DCMAKE_CXX_FLAGS="-fsanitize=$sanitizer -fno-omit-frame-pointer" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
        -DPython_EXECUTABLE="$(command -v "$python")" >"$build/log" || { cat "$build/log"; exit 1; }
    cmake --build "$build/$sanitizer" --target native_tests --parallel "$(nproc)" >"$build/log" ||
        { cat "$build/log"; exit 1; }
    ctest --test-dir "$build/$sanitizer" --output-on-failure
done
