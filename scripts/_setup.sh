#!/usr/bin/env bash
# Sourced by the other scripts. What it makes: .venv with the packages of requirements/*.lock and,
# on a machine without a renderer, the system's GL libraries. What stands is used again.
#   set_up_packages run|dev   dev adds the gates' and the tests' tools
#   set_up_renderer           MuJoCo can draw without a display, and a simulator is compiled
#   share_ray_token           all nodes that see this checkout have one token for Ray
#   pass_signals_on PID       waits for a child, which gets this script's SIGINT and SIGTERM

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
uv=$venv/uv/bin/uv
gl_packages=(libegl1 libopengl0 libgl1-mesa-dri libosmesa6)
in_range='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
simulate='
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.registry import make_env
make_env(EnvConfig()).reset(0, 0)
'
compare_assets='
import sys
from verl_vla.envs.libero.asset_files import check_assets
from verl_vla.core.errors import ConfigError
try:
    check_assets()
except ConfigError as error:
    sys.exit(f"error: {error}")
'
draw='import mujoco; mujoco.GLContext(8, 8).make_current()'

say() { printf '%s\n' "$*" >&2; }

stop() {
    say "error: $*"
    exit 1
}

set_up_packages() { # run | dev
    alone use_packages "$1"
}

set_up_renderer() {
    alone use_renderer
}

# without a token, Ray runs the code of everybody who reaches its port. One that Ray makes for a run
# on one machine is in the user's home: `ray start` asks for it, and training does not send it
share_ray_token() {
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
    export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$venv/ray_token}
    alone make_ray_token
}

make_ray_token() {
    if [ -s "$RAY_AUTH_TOKEN_PATH" ]; then return; fi
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH.partial")
    mv "$RAY_AUTH_TOKEN_PATH.partial" "$RAY_AUTH_TOKEN_PATH"
}

pass_signals_on() { # <process id of a child>: ends with its exit code
    local code passed
    trap 'passed=yes; kill -INT "$1"' INT
    trap 'passed=yes; kill -TERM "$1"' TERM
    while true; do
        passed=no code=0
        wait "$1" || code=$?
        # a signal ends `wait`, not the child
        if [ "$passed" = no ]; then return "$code"; fi
    done
}

alone() { # <command>: a second call from elsewhere waits for the first
    (
        flock 9
        "$@"
    ) 9>>"$root/.setup.lock"
}

use_packages() { # run | dev
    local wanted
    wanted=$(cd "$root" && pwd && sha256sum pyproject.toml scripts/_setup.sh requirements/*.lock)
    if [ -x "$python" ] && [ "$(cat "$venv/ready-$1" 2>/dev/null)" = "$wanted" ]; then return; fi
    rm -f "$venv/ready-run" "$venv/ready-dev"
    make_venv
    say "installing requirements/$1.lock (the first time, about 3 GB)"
    # compiled now: where PYTHONDONTWRITEBYTECODE is set, as in containers, every start would do it
    "$uv" pip install --python "$python" --no-deps --compile-bytecode \
        --requirements "$root/requirements/$1.lock" >&2
    "$uv" pip install --python "$python" --no-deps --quiet --editable "$root" >&2
    # once: images of other assets are not those that policies were trained on
    # those of the lock file, whatever a variable says that later runs may heed
    env -u VERL_VLA_LIBERO_ASSETS "$python" -c "$compare_assets" >&2
    printf '%s\n' "$wanted" >"$venv/ready-$1"
    if [ "$1" = dev ]; then printf '%s\n' "$wanted" >"$venv/ready-run"; fi
}

make_venv() {
    local base pip settings
    base=$(find_python)
    if ! "$python" -c "$in_range" 2>/dev/null; then
        say "making .venv with $("$base" --version)"
        if "$base" -c 'import ensurepip' 2>/dev/null; then
            "$base" -m venv --clear "$venv"
        else # Debian ships ensurepip apart
            "$base" -m venv --clear --without-pip "$venv"
        fi
    fi
    pip=$(find_pip "$python" "$base")
    if [ ! -x "$uv" ]; then
        PIP_ROOT_USER_ACTION=ignore "$pip" -m pip install --quiet --target "$venv/uv" \
            --disable-pip-version-check "uv>=0.5,<1" >&2
    fi
    settings=$("$pip" -m pip config list)
    take_over_pip_settings
}

find_python() {
    local name
    for name in python3.11 python3.12 python3.10 python3; do
        if "$name" -c "$in_range" 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    stop "no Python 3.10, 3.11 or 3.12 on the PATH (python3 is $(python3 --version 2>&1)); \
install one, for example with: apt-get install python3 python3-venv"
}

find_pip() { # <python>...: the first of them that has pip
    local name
    for name in "$@"; do
        if "$name" -m pip --version >/dev/null 2>&1; then
            printf '%s' "$name"
            return
        fi
    done
    stop "$2 has neither ensurepip nor pip; as root, run: apt-get install -y python3-venv"
}

take_over_pip_settings() { # uv reads neither pip.conf nor PIP_* variables
    if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        take_over UV_DEFAULT_INDEX ' ' "$(pip_setting index-url)"
    fi
    if [ -z "${UV_INDEX:-}${UV_EXTRA_INDEX_URL:-}" ]; then
        take_over UV_INDEX ' ' "$(pip_setting extra-index-url)"
        take_over UV_INDEX_STRATEGY ' ' "${UV_INDEX:+unsafe-best-match}" # pip's own rule
    fi
    take_over UV_FIND_LINKS , "$(pip_setting find-links)"
    take_over UV_INSECURE_HOST ' ' "$(pip_setting trusted-host)"
    take_over SSL_CERT_FILE ' ' "$(pip_setting cert)"
    take_over UV_HTTP_TIMEOUT ' ' 180 # seconds; the largest wheel has 500 MB
}

pip_setting() { # <name>: pip's own order, from the most to the least special
    local section value
    for section in :env: install global; do
        value=$(sed -n "s/^$section\.$1='\(.*\)'\$/\1/p" <<<"$settings")
        if [ -n "$value" ]; then
            printf '%s' "${value//\\n/ }"
            return
        fi
    done
}

take_over() { # <variable> <separator> <values>; a variable that the user has set stays
    local values
    read -ra values <<<"$3"
    if [ -z "${!1:-}" ] && [ "${#values[@]}" -gt 0 ]; then
        printf -v "$1" '%s' "$(IFS=$2; printf '%s' "${values[*]}")"
        export "${1?}"
    fi
}

use_renderer() {
    if [ -e "$venv/ready-renderer" ] && gl_loads; then return; fi
    if ! can_render; then install_gl; fi
    say "compiling what a simulator runs 500 times in a second (once, some 15 seconds)"
    "$python" -c "$simulate" # else every process of the first run would, all at once
    touch "$venv/ready-renderer"
}

gl_loads() { # cheap: the library is there, whatever it can do
    "$python" -c 'import ctypes; ctypes.CDLL("libEGL.so.1")' 2>/dev/null ||
        "$python" -c 'import ctypes; ctypes.CDLL("libOSMesa.so.8")' 2>/dev/null
}

can_render() {
    MUJOCO_GL=egl "$python" -c "$draw" >/dev/null 2>&1 </dev/null ||
        MUJOCO_GL=osmesa "$python" -c "$draw" >/dev/null 2>&1 </dev/null
}

install_gl() {
    local remedy="apt-get update && apt-get install -y --no-install-recommends ${gl_packages[*]}"
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        stop "MuJoCo can draw neither through EGL nor through OSMesa; as root, run: $remedy"
    fi
    say "MuJoCo cannot draw yet; running: $remedy"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2 </dev/null || stop "apt-get update failed"
    apt-get install -y -qq --no-install-recommends "${gl_packages[@]}" >&2 </dev/null ||
        stop "apt-get install failed"
    can_render || stop "MuJoCo still cannot draw; see why with: MUJOCO_GL=egl $python -c '$draw'"
}
