"""The examples in deploy/ are what Kubernetes and compose read, and give flags that `veratune serve` has."""

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from veratune.cli.serve_ import parser

DEPLOY = Path(__file__).parents[1] / "deploy"
RESOURCES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource["kind"])
def test_kubernetes_reads_it(resource):
    assert kubernetes_validate.validate(resource, "1.30", strict=True)
    broken = {**resource, "spec": {**resource["spec"], "selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)


def check(path):
    words = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(path),
    ]
    return subprocess.run(words, capture_output=True, text=True)


def test_compose_reads_it(tmp_path):
    assert check(DEPLOY / "compose.yaml").returncode == 0
    broken = tmp_path / "compose.yaml"
    broken.write_text((DEPLOY / "compose.yaml").read_text().replace("ports:", "port:"))
    assert check(broken).returncode != 0


def test_their_flags_are_known():
    known = parser().flags()
    container = RESOURCES[0]["spec"]["template"]["spec"]["containers"][0]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["veratune"][
        "command"
    ]
    flags = [
        word.partition("=")[0] for word in [*container["args"], *compose] if word.startswith("--")
    ]
    assert flags
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags} <= {
        flag.replace("-", "_") for flag in known
    }


def test_volumes_belong_to_the_servers_user_and_keys_are_a_folder():
    """A mounted key file would stay the old one after a key is revoked."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    targets = [v.split(":")[-2] if v.endswith(":ro") else v.split(":")[-1]
               for v in compose["services"]["veratune"]["volumes"]]  # fmt: skip
    docker = (DEPLOY / "Dockerfile").read_text()
    assert "/keys" in targets
    assert "--owner=veratune --group=veratune /data /keys" in docker
    assert docker.index("--owner=veratune") < docker.index("USER veratune")


def test_a_pod_has_time_to_drain():
    pod = RESOURCES[0]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    drain = next(int(arg.partition("=")[2]) for arg in container["args"]
                 if arg.startswith("--shutdown-timeout"))  # fmt: skip
    assert sleep + drain < pod["terminationGracePeriodSeconds"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
