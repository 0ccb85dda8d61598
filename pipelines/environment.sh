# Makes and enters the project's virtual environment; to be sourced by the scripts beside it and by tests/run.sh.
# RLFR_VENV names another folder; it is made if absent. RLFR_PYTHON names the Python that makes it.
# Safe to run twice: packages are installed again only when pyproject.toml or constraints.txt has changed.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${RLFR_VENV:-$repository/.venv}"
[[ "$venv" = /* ]] || venv="$PWD/$venv"  # since PATH is to hold it whatever folder a script works in

if [ ! -x "$venv/bin/python" ]; then
    python="${RLFR_PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "rlfr needs Python 3.11 or later; $("$python" --version 2>&1) was found (name another with RLFR_PYTHON)" >&2
        exit 2
    }
    echo "making a virtual environment in $venv" >&2
    "$python" -m venv "$venv"
fi

stamp="$venv/.rlfr-installed"
wanted="$(cat "$repository/pyproject.toml" "$repository/constraints.txt" | sha256sum; echo "$repository")"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing rlfr and what it needs (about two minutes)" >&2
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        --constraint "$repository/constraints.txt" --editable "$repository[dev]"
    echo "$wanted" > "$stamp"
fi
PATH="$venv/bin:$PATH"
export PATH
