# Sourced by demo.sh and test.sh: makes .venv (or uses $VQDM_VENV), installs the named requirement files into it, and
# puts its python first in PATH. Nothing is installed again while the files have not changed.
#
#     source scripts/install.sh requirements.txt [requirements-dev.txt]

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VQDM_VENV:-$root/.venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -c 'import sys; sys.exit("vqdm needs Python 3.11 or newer") if sys.version_info < (3, 11) else 0'
wanted="$root $(cd "$root" && cat "$@" constraints.txt pyproject.toml | cksum)"
if [ "$(cat "$venv/vqdm-installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $venv (about three minutes the first time)"
    files=()
    for file in "$@"; do files+=(-r "$file"); done
    (cd "$root" && "$venv/bin/python" -m pip install --quiet "${files[@]}" -c constraints.txt)
    echo "$wanted" >"$venv/vqdm-installed"
fi
export PATH="$venv/bin:$PATH"
cd "$root"
