#!/usr/bin/env bash
# What setup cannot install itself.  Usage: check_host.sh PYTHON.  Exit 2 names what is missing.
set -euo pipefail
python=${1:-python3}

missing() {
  echo "setup: missing: $1" >&2
  exit 2
}

command -v "$python" >/dev/null || missing "Python 3.11 or newer ($python not found); make setup PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
  missing "a Python that starts ($python does not); make setup PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  missing "Python 3.11 or newer ($python is $version); make setup PYTHON=..."
"$python" -c 'import sys
if sys.prefix == sys.base_prefix: import ensurepip' 2>/dev/null ||
  missing "Python's ensurepip, to make an environment (Debian: apt install python$version-venv)"

compiler=
for name in ${CXX:-} c++ g++ clang++; do
  if command -v "$name" >/dev/null; then
    compiler=$name
    break
  fi
done
[ -n "$compiler" ] ||
  missing "a C++ compiler, which DeepSpeed needs: c++, g++, clang++ or \$CXX (Debian: apt install g++)"

headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ -f "$headers/Python.h" ] ||
  missing "Python's headers, $headers/Python.h (Debian: apt install python$version-dev)"
