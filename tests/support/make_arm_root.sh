#!/bin/sh
# Make ROOT: an emulator, Debian 12's Python for aarch64, and this checkout's fleetune[device] from real aarch64 wheels.
#
#   make_arm_root.sh PIP ROOT
#
# Nothing is installed on this machine: packages come from its apt and pip sources into ROOT, and no rights are needed.
# Where that cannot be done it says why and leaves with 0; the tests then skip. A second run only renews fleetune.
set -eu
export LC_ALL=C
pip=$1 root=$2 suite=bookworm
# Bookworm's own qemu 7.2 crashes on onnxruntime from 1.28; that of its backports does not.
emulator="qemu-user-static/$suite-backports"
python="python3.11 libstdc++6 ca-certificates tzdata"

cannot() { echo "no ARM environment: $*; the tests that need it will be skipped"; rm -rf "$root/new"; exit 0; }

# apt for another architecture, with its own lists and its own idea of what is installed: nothing.
apt() {
    architecture=$1; shift
    apt-get -qq -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" -o APT::Sandbox::User="" \
        -o APT::Install-Recommends=false -o Dir::Etc::sourcelist="$apt/sources" -o Dir::Etc::sourceparts=- \
        -o Dir::State="$apt/$architecture" -o Dir::State::status="$apt/none" -o Dir::Cache="$apt/$architecture" \
        -o Debug::NoLocking=1 "$@"
}

fetch() {
    architecture=$1 into=$2; shift 2
    mkdir -p "$apt/$architecture/lists/partial" "$apt/$architecture/archives/partial" "$into"
    apt "$architecture" update && apt "$architecture" install --yes --download-only "$@" || return 1
    for package in "$apt/$architecture"/archives/*.deb; do dpkg -x "$package" "$into" || return 1; done
}

command -v apt-get >/dev/null && command -v dpkg >/dev/null || cannot "it is made from Debian packages, and here is no apt"

if [ ! -e "$root/system.stamp" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep '/debian/$' | sort -u | head -n 1) || true
    [ -n "$mirror" ] || cannot "apt has no Debian mirror among its sources"
    rm -rf "$root"; mkdir -p "$root/new"; apt=$(cd "$root/new" && pwd)
    for part in "$suite" "$suite-updates" "$suite-backports"; do echo "deb $mirror $part main"; done >"$apt/sources"
    : >"$apt/none"
    echo "fetching an emulator and Debian's aarch64 Python into $root"
    fetch "$(dpkg --print-architecture)" "$root/emulator" "$emulator" || cannot "apt could not fetch the emulator"
    fetch arm64 "$root/system" $python || cannot "apt could not fetch aarch64 packages"
    rm -rf "$root/new"; touch "$root/system.stamp"
fi

echo "installing fleetune[device] for aarch64 into $root"
rm -rf "$root/packages" "$root/wheel"
"$pip" wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$root/wheel" . \
    || cannot "pip could not build fleetune"
"$pip" install --quiet --disable-pip-version-check --target "$root/packages" --only-binary :all: --python-version 3.11 \
    --platform manylinux_2_34_aarch64 --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    "$(echo "$root"/wheel/*.whl)[device]" || { rm -rf "$root/packages"; cannot "pip could not fetch aarch64 wheels"; }
rm -rf build
