#!/usr/bin/env bash
# A Docker engine for the tests in this folder, out of Debian's packages, on a machine that has none.
#
#   engine.sh up      install what is missing, start the engine, make the base image; prints the variables to export
#   engine.sh down    stop the engine; images and packages stay for the next time
#   engine.sh clean   stop it, and remove all that `up` made in $ISTHMUS_DOCKER
#
# It needs root and Debian. Everything lies in $ISTHMUS_DOCKER (/var/tmp/isthmus-docker): the engine has a socket and
# data of its own there, and disturbs no other. The base image is made by debootstrap under the name that the Dockerfile
# starts from, with this machine's certificates and settings of pip, so that images build where no registry is reached.
set -euo pipefail

HOME_DIR=${ISTHMUS_DOCKER:-/var/tmp/isthmus-docker}
SOCKET=$HOME_DIR/docker.sock
BASE=python:3.11-slim
SUITE=bookworm
MIRROR=${ISTHMUS_DEBIAN:-http://deb.debian.org/debian}
START_S=30

say() { echo "engine: $*" >&2; }
fail() { say "$*"; exit 1; }
engine() { docker --host "unix://$SOCKET" "$@"; }

need_packages() {
    local missing=()
    command -v dockerd >/dev/null || missing+=(docker.io)
    command -v debootstrap >/dev/null || missing+=(debootstrap)
    command -v iptables >/dev/null || missing+=(iptables)
    command -v tc >/dev/null || missing+=(iproute2)
    if ((${#missing[@]})); then
        say "installing ${missing[*]}"
        apt-get update -q >/dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
    fi
}

# Compose and buildx are plugins of the command line, which this Debian does not have; the next one's run here too.
need_plugins() {
    local plugins=$HOME_DIR/config/cli-plugins work=$HOME_DIR/trixie
    [[ -x $plugins/docker-compose && -x $plugins/docker-buildx ]] && return
    say "fetching Compose and buildx from Debian trixie"
    mkdir -p "$plugins" "$work/lists/partial" "$work/unpacked"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR trixie main" >"$work/sources.list"
    local options=(-q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists"
        -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update >/dev/null
    (cd "$work" && apt-get "${options[@]}" download docker-compose docker-buildx >/dev/null)
    for package in "$work"/*.deb; do dpkg -x "$package" "$work/unpacked"; done
    for name in docker-compose docker-buildx; do
        find "$work/unpacked" -name "$name" -type f -perm -u+x -exec cp {} "$plugins/$name" \;
        [[ -x $plugins/$name ]] || fail "$name is not in Debian's package"
    done
}

start_engine() {
    engine info >/dev/null 2>&1 && return
    say "starting the engine"
    rm -f "$HOME_DIR/docker.pid"
    setsid dockerd --data-root "$HOME_DIR/data" --exec-root "$HOME_DIR/exec" --pidfile "$HOME_DIR/docker.pid" \
        --host "unix://$SOCKET" >"$HOME_DIR/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq $((START_S * 5))); do
        engine info >/dev/null 2>&1 && return
        sleep 0.2
    done
    fail "the engine did not start within $START_S s; its log is $HOME_DIR/dockerd.log"
}

make_base() {
    engine image inspect "$BASE" >/dev/null 2>&1 && return
    say "making the base image $BASE out of Debian $SUITE (some minutes)"
    local root=$HOME_DIR/root
    rm -rf "$root"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates,iproute2 \
        "$SUITE" "$root" "$MIRROR" >"$HOME_DIR/debootstrap.log" 2>&1 || fail "debootstrap failed: $HOME_DIR/debootstrap.log"
    ln -sf python3 "$root/usr/bin/python"
    # Debian's pip refuses to install beside its own packages; in an image of our own nothing else does.
    rm -f "$root"/usr/lib/python3.*/EXTERNALLY-MANAGED
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    write_pip_settings "$root"
    tar -C "$root" -c . | engine import \
        --change 'ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
        - "$BASE" >/dev/null
    rm -rf "$root"
}

# pip in the image finds wheels where pip on this machine does: in folders of wheels, which are copied.
write_pip_settings() {
    local root=$1 folder folders
    folders=$(python3 -m pip config get global.find-links 2>/dev/null || true)
    { echo "[global]"; echo "cert = /etc/ssl/certs/ca-certificates.crt"; } >"$root/etc/pip.conf"
    for folder in ${folders} ${PIP_FIND_LINKS:-}; do
        [[ -d $folder && ! -e $root$folder ]] || continue
        mkdir -p "$root$folder"
        cp -L "$folder"/*.whl "$root$folder/"
        echo "find-links = $folder" >>"$root/etc/pip.conf"
    done
}

up() {
    [[ $(id -u) == 0 ]] || fail "needs root"
    command -v apt-get >/dev/null || fail "needs Debian's packages (apt-get)"
    mkdir -p "$HOME_DIR"
    need_packages
    need_plugins
    start_engine
    make_base
    echo "export DOCKER_HOST=unix://$SOCKET DOCKER_CONFIG=$HOME_DIR/config DOCKER_BUILDKIT=1"
}

down() {
    [[ -f $HOME_DIR/docker.pid ]] || return 0
    local pid
    pid=$(cat "$HOME_DIR/docker.pid")
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    fail "the engine (process $pid) does not end"
}

case ${1:-} in
    up) up ;;
    down) down ;;
    clean) down; rm -rf "$HOME_DIR" ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
