"""What runs on one machine: Prometheus' files, the systemd unit, the image and its composition."""

import pathlib
import re
import shutil
import tempfile

from programs import DEPLOY, problems, run

# Exposure as `systemd-analyze security` counts it: 0 is a service that can do nothing, 100 one without limits.
MOST_EXPOSURE = 15


def yaml_is_tidy():
    yield from problems("yamllint", "--strict", "-c", "checks/yamllint.yaml", ".")


def rules_hold():
    yield from problems("promtool", "check", "config", "prometheus/prometheus.yaml")
    yield from problems("promtool", "test", "rules", "prometheus/tests.yaml")


def unit_is_sound():
    if shutil.which("systemd-analyze") is None:
        print("     systemd-analyze is not on this machine: the unit is not checked")
        return
    text = (DEPLOY / "systemd/rheostat.service").read_text()
    # The verifier wants programs and accounts that exist.
    text = text.replace("/usr/local/bin/rheostat", shutil.which("true"))
    text = re.sub(r"^(User|Group)=rheostat$", r"\1=daemon", text, flags=re.M)
    with tempfile.TemporaryDirectory() as folder:
        unit = pathlib.Path(folder) / "rheostat.service"
        unit.write_text(text)
        # It prints what it does not understand and succeeds all the same.
        said = run("systemd-analyze", "verify", "--man=no", str(unit))
        lines = [line for line in said.stderr.splitlines() if "rheostat.service" in line]
        if said.returncode != 0 or lines:
            yield "systemd-analyze verify\n" + said.stderr
        yield from problems(
            "systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSURE}", str(unit)
        )


def containers_are_sound():
    yield from problems("hadolint", "--failure-threshold", "info", "../Dockerfile")
    yield from problems("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose/compose.yaml")
