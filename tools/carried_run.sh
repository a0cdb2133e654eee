#!/bin/sh
# Makes the repository out of the folder that this file lies in, which is only read, and runs the pipeline without any
# network: in ./lorepro, where you are. Made by python -m tools.carry.
#   FOLDER/run              all of it
#   FOLDER/run encode       no further than that stage; whatever dvc repro takes
#   PYTHON=/opt/python3 FOLDER/run
set -eu
here=$(cd "$(dirname "$0")" && pwd)
version=PYTHON_VERSION
python=
for name in ${PYTHON:-"python$version" python3 python}; do
	[ -n "$python" ] || [ "$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ] ||
		python=$name
done
[ -n "$python" ] || {
	echo "error: the wheels here are for Python $version, which is not found; name it: PYTHON=/where/python $0" >&2
	exit 2
}
# a URL, since pip takes a blank in a path for the end of it
PIP_FIND_LINKS="file://$(printf %s "$here/wheels" | sed 's/%/%25/g; s/ /%20/g')"
export PIP_FIND_LINKS PIP_NO_INDEX=1 HF_HUB_OFFLINE=1
if [ ! -e lorepro ]; then
	rm -rf .lorepro.partial
	git clone --quiet "$here/repository.bundle" .lorepro.partial
	cp -R "$here/own/." .lorepro.partial/
	mv .lorepro.partial lorepro
fi
commit=$(git bundle list-heads "$here/repository.bundle" HEAD | cut -d ' ' -f 1)
git -C lorepro merge-base --is-ancestor "$commit" HEAD 2>/dev/null || {
	echo "error: ./lorepro was there before and has not the commit that this folder brings, $commit; bring it there with" \
		"git -C lorepro pull '$here/repository.bundle' HEAD, or run this in another folder, an empty one" >&2
	exit 2
}
[ "$(git -C lorepro rev-parse HEAD)" = "$commit" ] ||
	echo "warning: ./lorepro is further than the commit that this folder brings, $commit; it runs as it is" >&2
cd lorepro
make install PYTHON="$python"
PATH="$PWD/.venv/bin:$PATH"
dvc remote add --quiet --local --force carried "$here/objects"
dvc remote modify --local carried verify true
dvc pull --quiet --remote carried download@model download@data
dvc repro "$@"
