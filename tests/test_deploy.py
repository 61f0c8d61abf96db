"""What deployments are described by holds together: every command, path, port, variable and metric that a container, a
manifest, an alert or a dashboard names is really there. `make images` builds and runs them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shared.commands import serve
from shared.settings import Settings
from shared.telemetry import COUNTED, METRICS

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "shared" / "deploy"
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
KUBERNETES = "1.34"
USER = 10001


# --- docker-compose.yml and the Dockerfiles -------------------------------------------------------------------------


def test_docker_compose_reads_the_file_as_it_is_meant() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("there is no docker compose here")
    command = [docker, "compose", "--profile", "*", "config", "--quiet"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def tool(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A program that was installed with the tests."""
    return subprocess.run(
        [Path(sys.executable).with_name(name), *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_compose_specification_takes_the_file(tmp_path: Path) -> None:
    against = ("--builtin-schema", "vendor.compose-spec")
    ran = tool("check-jsonschema", *against, "docker-compose.yml")
    assert ran.returncode == 0, ran.stdout
    broken = tmp_path / "docker-compose.yml"
    broken.write_text((ROOT / "docker-compose.yml").read_text().replace("stop_grace_period:", "stop_grace:"))
    assert tool("check-jsonschema", *against, broken).returncode == 1


@pytest.mark.parametrize("room", ["api", "worker"])
def test_hadolint_finds_nothing_in_a_dockerfile(room: str) -> None:
    # DL3008: a compiler's tool that stays in a stage of its own needs no pin. DL3003: one `cd`, in one command.
    ran = tool("hadolint", "--ignore", "DL3008", "--ignore", "DL3003", ROOT / room / "Dockerfile")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("room", ["api", "worker"])
def test_an_image_runs_as_nobody_in_particular_and_says_how_to_tell_that_it_is_well(room: str) -> None:
    dockerfile = (ROOT / room / "Dockerfile").read_text()
    last_stage = dockerfile[dockerfile.rindex("\nFROM ") :]
    assert re.findall(r"^USER (\S+)$", last_stage, re.MULTILINE) == [str(USER)]
    [command] = re.findall(r"^CMD (.+)$", last_stage, re.MULTILINE)
    assert json.loads(command)[:2] == ["enlarger", "serve"]
    assert "HEALTHCHECK" in last_stage
    # Pixels need torch, and nothing else does.
    assert ("install.py --only-dependencies worker" in dockerfile) == (room == "worker")


def test_no_service_can_write_to_its_root_or_take_all_memory() -> None:
    for name, service in SERVICES.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "memory" in service["deploy"]["resources"]["limits"], name
        # Servers whose images prepare their own root when they first start.
        assert service.get("read_only") or name in ("postgres", "s3"), name


def test_every_volume_is_declared_and_every_file_mounted_is_there() -> None:
    declared = set(yaml.safe_load((ROOT / "docker-compose.yml").read_text())["volumes"])
    used = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source, _, target = volume.rpartition(":") if volume.count(":") == 1 else volume.partition(":")
            if source.startswith("./"):
                assert (ROOT / source).is_dir(), volume
            elif source.startswith("/"):
                # Without a name: a volume of this container's own, made from a folder that the image has.
                assert target == ""
                assert f"/{source.strip('/')}" in (ROOT / service["build"]["dockerfile"]).read_text()
            elif source:
                used.add(source)
    assert used == declared


def test_ports_that_are_published_are_ports_that_are_served() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api", "s3", "grafana"}
    for ports in published.values():
        assert all(re.fullmatch(r"\$\{[A-Z0-9_]+:-(\d+)\}:\1", port) for port in ports)
    port = published["api"][0].rpartition(":")[2]
    assert SERVICES["api"]["command"][-2:] == ["--port", port]
    dockerfile = (ROOT / "api" / "Dockerfile").read_text()
    assert f"EXPOSE {port}\n" in dockerfile
    assert f"127.0.0.1:{port}/livez" in dockerfile
    assert SERVICES["worker-cpu"]["environment"]["ENLARGER_STORAGE_ENDPOINT_URL"] == "http://s3:8333"
    assert f"api:{port}" in (DEPLOY / "prometheus" / "prometheus.yml").read_text()


def test_two_relays_run_and_workers_can_be_scaled() -> None:
    assert SERVICES["relay"]["deploy"]["replicas"] == 2
    # A name or a published port of its own would allow one container only.
    for name in ("worker-cpu", "worker-gpu", "chores", "relay"):
        assert not {"container_name", "ports"} & set(SERVICES[name])


# --- Prometheus and Grafana -----------------------------------------------------------------------------------------


def metrics_named(text: str) -> set[str]:
    """Names of ours in a text, without what Prometheus puts behind a histogram's."""
    return {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\benlarger_[a-z_]+", text)}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_alerts_and_dashboards_name_metrics_that_are_there() -> None:
    known = {*METRICS, *COUNTED}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        assert metrics_named(rule["expr"]) <= known, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "look"}, rule["alert"]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "enlarger.json").read_text())
    shown = metrics_named(" ".join(expressions(dashboard)))
    assert shown <= known
    # A metric that nobody looks at is one that nobody needs.
    assert shown | metrics_named(" ".join(rule["expr"] for rule in rules)) == known


def test_the_operators_page_says_what_each_alert_means() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    page = (ROOT / "docs" / "operating.md").read_text()
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in page] == []


def test_labels_that_alerts_and_dashboards_ask_for_are_those_of_the_metric() -> None:
    kinds = {"kind", "worker", "le"}
    labels = {name: {*counted.labels, *kinds} for name, counted in COUNTED.items()}
    labels |= {
        "enlarger_jobs_ended_hour": {"state"},
        "enlarger_live_workers": {"kind"},
        "enlarger_forsaken_jobs": {"queue", "model"},
    }
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "enlarger.json").read_text())
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    for name, selector in re.findall(r"\b(enlarger_[a-z_]+)\{([^{}]+)\}", " ".join([alerts, *expressions(dashboard)])):
        metric = metrics_named(name).pop()
        asked = set(re.findall(r"(\w+)=~?", selector))
        assert asked <= labels.get(metric, {"queue"}), (name, selector)


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("there is no promtool here (Debian's package `prometheus` has it)")
    return subprocess.run([tool, *words], capture_output=True, text=True, check=False)


def test_promtool_takes_the_rules_and_the_configuration() -> None:
    folder = DEPLOY / "prometheus"
    ran = promtool("check", "rules", folder / "alerts.yml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Its file with the key is there in the container only.
    ran = promtool("check", "config", "--syntax-only", folder / "prometheus.yml")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_fires_when_it_should_and_not_otherwise() -> None:
    said = yaml.safe_load((ROOT / "tests" / "alerts.yml").read_text())["tests"]
    quiet, *others = [{each["alertname"]: each.get("exp_alerts") for each in test["alert_rule_test"]} for test in said]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    names = {rule["alert"] for rule in rules}
    assert set(quiet) == names
    assert {name for test in others for name, fired in test.items() if fired} == names
    ran = promtool("test", "rules", ROOT / "tests" / "alerts.yml")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_promtool_takes_what_the_dashboard_and_the_autoscaler_ask(tmp_path: Path) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "enlarger.json").read_text())

    def checked(asked: list[str]) -> subprocess.CompletedProcess[str]:
        # It reads rules only: each question as one that records its answer.
        rules = [{"record": f"enlarger:asked:{number}", "expr": each} for number, each in enumerate(asked)]
        file = tmp_path / "asked.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        return promtool("check", "rules", file)

    scaling = [
        trigger["metadata"]["query"]
        for each in of_kind("ScaledObject").values()
        for trigger in each["spec"]["triggers"]
    ]
    ran = checked([*expressions(dashboard), *scaling])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert checked(["sum by (le (enlarger_jobs)"]).returncode != 0


# --- Kubernetes -----------------------------------------------------------------------------------------------------


def documents() -> list[dict[str, Any]]:
    return [
        document
        for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def of_kind(kind: str) -> dict[str, Any]:
    return {each["metadata"]["name"]: each for each in documents() if each["kind"] == kind}


def test_every_manifest_is_what_kubernetes_says_it_is() -> None:
    # KEDA and kustomize have schemas of their own, which no package carries.
    of_others = {"keda.sh/v1alpha1", "kustomize.config.k8s.io/v1beta1"}
    checked = [each for each in documents() if each["apiVersion"] not in of_others]
    for document in checked:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    assert len(checked) == 13
    broken = {**checked[0], "spec": {**checked[0]["spec"], "replicaz": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_every_file_is_in_its_kustomization() -> None:
    for folder in (DEPLOY / "kubernetes", DEPLOY / "kubernetes" / "migrate"):
        named = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        assert sorted(named) == sorted(path.name for path in folder.glob("*.yaml") if path.stem != "kustomization")


def test_every_pod_runs_a_process_of_ours_with_as_few_rights_as_it_needs() -> None:
    [known] = [parameter.type.choices for parameter in serve.params if parameter.name == "process"]  # type: ignore[attr-defined]
    pods = {**of_kind("Deployment"), **of_kind("Job")}
    assert {pod["spec"]["template"]["spec"]["containers"][0]["args"][2] for pod in pods.values()} == set(known)
    for name, pod in pods.items():
        spec = pod["spec"]["template"]["spec"]
        [container] = spec["containers"]
        assert container["args"][:2] == ["enlarger", "serve"], name
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] == USER, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert "memory" in container["resources"]["limits"], name
        # A Service called enlarger-api would otherwise set ENLARGER_API_PORT, as if it were a setting.
        assert spec["enableServiceLinks"] is False, name


def test_pods_are_probed_stop_gracefully_and_are_not_all_evicted_at_once() -> None:
    budgets = [each["spec"]["selector"]["matchLabels"] for each in of_kind("PodDisruptionBudget").values()]
    for name, deployment in of_kind("Deployment").items():
        pod = deployment["spec"]["template"]
        assert "livenessProbe" in pod["spec"]["containers"][0], name
        labels = pod["metadata"]["labels"]
        assert labels == deployment["spec"]["selector"]["matchLabels"] == deployment["metadata"]["labels"]
        assert labels in budgets, name
        assert pod["spec"]["terminationGracePeriodSeconds"] >= (30 if name == "enlarger-relay" else 90), name


def test_workers_are_scaled_by_the_age_of_their_queue() -> None:
    scaled = of_kind("ScaledObject")
    assert {each["spec"]["scaleTargetRef"]["name"] for each in scaled.values()} == {
        name for name in of_kind("Deployment") if "worker" in name
    }
    for name, each in scaled.items():
        # Replicas are KEDA's to say: a number of our own would fight it at every `apply`.
        assert "replicas" not in of_kind("Deployment")[name]["spec"]
        queries = [trigger["metadata"]["query"] for trigger in each["spec"]["triggers"]]
        assert "enlarger_queue_oldest_seconds" in queries[0]
        assert metrics_named(" ".join(queries)) <= set(METRICS)


def test_every_setting_in_a_manifest_is_one() -> None:
    known = {f"ENLARGER_{name.upper()}" for name in Settings.model_fields}
    text = "".join(path.read_text() for path in (DEPLOY / "kubernetes").rglob("*.yaml"))
    named = set(re.findall(r"(?:^  |name: )(ENLARGER_[A-Z_]+)", text, re.MULTILINE))
    assert {name.removesuffix("_FILE") for name in named} <= known
