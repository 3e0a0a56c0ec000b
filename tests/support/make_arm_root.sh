#!/bin/sh
# Make ROOT: an emulator, Debian 12's Python for aarch64, and this checkout's fleetune[device] from real aarch64 wheels.
#
#   make_arm_root.sh PIP ROOT
#
# Nothing is installed on this machine: what its apt and pip sources have is unpacked below ROOT, and no rights are needed.
# Where that cannot be done it says why and leaves with 0; the tests then skip. A second run only renews the wheels.
set -eu
export LC_ALL=C
pip=$1 root=$2 suite=bookworm
# Bookworm's own qemu 7.2 crashes on onnxruntime from 1.28; that of its backports does not.
emulator="qemu-user-static/$suite-backports"
python="python3.11 libstdc++6 ca-certificates tzdata"

cannot() { echo "no ARM environment: $*; the tests that need it will be skipped"; exit 0; }

# apt with lists of its own and its own idea of what is installed: nothing. Here nothing is locked or changed.
apt() {
    architecture=$1 state=$2; shift 2
    apt-get -qq -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" -o APT::Sandbox::User="" \
        -o APT::Install-Recommends=false -o Dir::Etc::sourcelist="$fetched/sources" -o Dir::Etc::sourceparts=- \
        -o Dir::State="$state" -o Dir::State::status="$fetched/none" -o Dir::Cache="$state" -o Debug::NoLocking=1 "$@"
}

# fetch ARCHITECTURE INTO PACKAGE...: packages with all they depend on, unpacked
fetch() {
    architecture=$1 into=$2 state=$fetched/$2; shift 2
    mkdir -p "$state/lists/partial" "$state/archives/partial"
    apt "$architecture" "$state" update && apt "$architecture" "$state" install --yes --download-only "$@" || return 1
    for package in "$state"/archives/*.deb; do dpkg -x "$package" "$root/$into" || return 1; done
}

command -v apt-get >/dev/null && command -v dpkg >/dev/null || cannot "it is made of Debian packages, and here is no apt"
root=$(mkdir -p "$root" && cd "$root" && pwd)

if [ ! -e "$root/system.stamp" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep '/debian/$' | sort -u | head -n 1) || true
    [ -n "$mirror" ] || cannot "apt has no Debian mirror among its sources"
    echo "fetching an emulator and Debian's aarch64 Python into $root"
    fetched=$root/fetched; rm -rf "$fetched" "$root/system"; mkdir -p "$fetched"
    for part in "$suite" "$suite-updates" "$suite-backports"; do echo "deb $mirror $part main"; done >"$fetched/sources"
    : >"$fetched/none"
    fetch "$(dpkg --print-architecture)" emulator "$emulator" || cannot "apt could not fetch the emulator"
    fetch arm64 system $python || cannot "apt could not fetch aarch64 packages"
    cp -L "$root/emulator/usr/bin/qemu-aarch64-static" "$root"; rm -rf "$root/emulator" "$fetched"
    touch "$root/system.stamp"
fi

echo "installing fleetune[device] for aarch64 into $root"
rm -rf "$root/arm.stamp" "$root/packages" "$root/wheel"
"$pip" wheel -qq --disable-pip-version-check --no-deps --wheel-dir "$root/wheel" . || cannot "pip could not build fleetune"
rm -rf build
"$pip" install -qq --disable-pip-version-check --target "$root/packages" --no-compile --python-version 3.11 \
    --platform manylinux_2_34_aarch64 --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    --only-binary :all: "$(echo "$root"/wheel/*.whl)[device]" || cannot "pip could not fetch aarch64 wheels"
touch "$root/arm.stamp"
