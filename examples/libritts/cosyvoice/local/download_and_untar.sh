#!/usr/bin/env bash
# Stage -1 of the recipe: fetches one part of LibriTTS and unpacks it.
#
#     local/download_and_untar.sh DATA_DIR DATA_URL PART
#
# For example: local/download_and_untar.sh corpora https://www.openslr.org/resources/60 dev-clean. Downloads
# DATA_URL/PART.tar.gz, goes on where an earlier run stopped, compares it with DATA_URL/md5sum.txt where the site
# has one, and unpacks it to DATA_DIR/LibriTTS/PART. Does nothing for a part that is complete. The archive is kept
# and may be deleted.
set -euo pipefail

fail() {
    echo "download_and_untar.sh: $*" >&2
    exit 2
}

[ $# -eq 3 ] || fail "three arguments are needed: DATA_DIR DATA_URL PART"
data_dir=$1 data_url=$2 part=$3
case $data_dir in
    /*) ;;
    *) data_dir=./$data_dir ;; # a name that begins with - is no option
esac
archive=$data_dir/$part.tar.gz
complete=$data_dir/LibriTTS/$part/.complete

if [ -f "$complete" ]; then
    echo "$part is complete"
    exit 0
fi
for program in curl md5sum python; do
    command -v "$program" >/dev/null || fail "$program is not installed"
done
mkdir -p "$data_dir" || fail "cannot write $data_dir; choose another data_dir"

fetch() { # curl's options, then the address
    curl --fail --location --retry 5 --retry-connrefused --connect-timeout 30 "$@"
}

# The published sum of the archive; empty where the site publishes none.
published_md5() {
    local sums status=0
    sums=$(fetch --silent --show-error "$data_url/md5sum.txt") || status=$?
    case $status in
        0) awk -v name="$part.tar.gz" '{ sub(/^.*[*\/]/, "", $2) } $2 == name { print $1 }' <<<"$sums" ;;
        22 | 37) ;; # not found, on a server or in a local folder
        *) return "$status" ;;
    esac
}

md5=$(published_md5) || fail "$data_url cannot be reached; run this again later"
[ -n "$md5" ] || echo "$data_url publishes no md5 sum of $part.tar.gz; it is not checked" >&2

if [ ! -f "$archive" ]; then
    fetch --continue-at - --output "$archive.part" "$data_url/$part.tar.gz" ||
        fail "$data_url/$part.tar.gz stopped; run this again to go on"
    mv "$archive.part" "$archive"
fi
if [ -n "$md5" ] && ! md5sum --check --status <<<"$md5  $archive"; then
    rm "$archive"
    fail "$part.tar.gz was damaged on its way and is deleted; run this again"
fi
python - "$archive" "$data_dir" "$part" <<'END' || fail "$archive cannot be unpacked; make room, or delete it and run this again"
import sys
import tarfile

archive, folder, part = sys.argv[1:]


def own(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
    """Let nothing through that lies outside LibriTTS/PART, except files beside it such as LibriTTS/LICENSE.txt."""
    member = tarfile.data_filter(member, path)
    corpus, inside, *deeper = [*member.name.removeprefix("./").split("/"), ""]
    if corpus != "LibriTTS" or not (inside in ("", part) or (member.isfile() and deeper == [""])):
        raise tarfile.FilterError(f"{member.name} does not belong to LibriTTS/{part}")
    return member


try:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter=own)
except (tarfile.TarError, OSError, EOFError) as error:
    sys.exit(f"download_and_untar.sh: {error}")
END
[ -d "$data_dir/LibriTTS/$part" ] || fail "$archive holds no LibriTTS/$part"
touch "$complete"
echo "$part is complete"
