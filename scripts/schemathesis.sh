#!/bin/bash
# Puts schemathesis, which calls an API by its own description, into target/schemathesis: it is no Debian package, so it
# comes from PyPI. Where there is no way there, this says so, and the tests that need it are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

version=4.32.5
venv=${CARGO_TARGET_DIR:-target}/schemathesis
if "$venv/bin/schemathesis" --version 2>/dev/null | grep -qF "$version"; then
    exit 0
fi
if ! python3 -c 'import ensurepip' 2>/dev/null; then
    echo "schemathesis: python3-venv is not installed (scripts/setup.sh)" >&2
    exit 1
fi
rm -rf "$venv"
python3 -m venv "$venv"
if ! timeout 300 "$venv/bin/pip" install -q --disable-pip-version-check --retries 1 "schemathesis==$version"; then
    rm -rf "$venv"
    echo "schemathesis: PyPI cannot be reached, or has no $version" >&2
    exit 1
fi
