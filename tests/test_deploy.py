"""Deployments, automations and base job templates: Prefect's own classes take them."""

import json
from pathlib import Path

import pytest
import yaml

from tests import project

if not (project.ROOT / "prefect.yaml").exists():
    pytest.skip("prefect.yaml and deploy/ are not here", allow_module_level=True)
DEPLOY = project.ROOT / "deploy"
DEPLOYMENTS = yaml.safe_load((project.ROOT / "prefect.yaml").read_text())


def test_deployments_name_flows_and_parameters_that_they_take():
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.flows import load_flow_from_entrypoint

    names = {}
    for deployment in DEPLOYMENTS["deployments"]:
        flow = load_flow_from_entrypoint(str(project.ROOT / deployment["entrypoint"]))
        names[f"{flow.name}/{deployment['name']}"] = deployment["work_pool"]["name"]
        if "parameters" in deployment:
            flow.validate_parameters(deployment["parameters"])
            assert deployment["parameters"]["push"] is False
        for schedule in deployment.get("schedules", ()):
            CronSchedule(**schedule)
    assert names == {
        "scheduled/night": "runs", "scheduled/week": "runs",
        "stage/cpu": "cpu", "stage/gpu": "gpu", "stage/exclusive": "exclusive",
    }  # fmt: skip


def test_no_deployment_holds_a_path_of_whoever_deploys():
    text = (project.ROOT / "prefect.yaml").read_text()
    assert "pwd" not in text and str(Path.home()) not in text and str(project.ROOT) not in text
    first, second = DEPLOYMENTS["pull"]
    assert "$" + "{PRUNEQUANT_CLONE:?" in first["prefect.deployments.steps.run_shell_script"]["script"]
    assert second["prefect.deployments.steps.set_working_directory"]["directory"] == "{{ clone.stdout }}"


def test_automations_are_prefects():
    from prefect.events.schemas.automations import AutomationCore

    automations = yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    parsed = [AutomationCore.model_validate(automation) for automation in automations]
    assert [automation.trigger.within.seconds for automation in parsed] == [75, 150]


def test_a_kubernetes_pool_runs_a_stage_with_its_gpu():
    worker = pytest.importorskip("prefect_kubernetes.worker")
    template = json.loads((DEPLOY / "kubernetes.json").read_text())
    configuration = of(worker.KubernetesWorkerJobConfiguration, template, gpus="1", memory="40Gi")
    manifest = configuration.job_manifest
    assert (manifest["kind"], manifest["spec"]["backoffLimit"]) == ("Job", 0)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "40Gi"}, "limits": {"memory": "40Gi", "nvidia.com/gpu": "1"},
    }  # fmt: skip
    assert container["envFrom"] == [{"secretRef": {"name": "prunequant"}}]
    assert container["image"] == "prunequant:latest"
    assert "{{" not in json.dumps(manifest)


def test_a_docker_pool_runs_a_stage_with_its_gpu():
    worker = pytest.importorskip("prefect_docker.worker")
    template = json.loads((DEPLOY / "docker.json").read_text())
    gpu = {"device_requests": [{"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}]}
    volume = "prunequant-cache:/runs/.dvc/cache"
    configuration = of(
        worker.DockerWorkerJobConfiguration, template, container_create_kwargs=gpu, volumes=[volume]
    )
    assert (configuration.image, configuration.network_mode) == ("prunequant:latest", "host")
    assert (configuration.volumes, configuration.container_create_kwargs) == ([volume], gpu)
    assert configuration.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def of(kind, template, **values):
    """The job of a flow run, as a worker of the pool would prepare it."""
    import asyncio
    from unittest.mock import MagicMock

    from prefect.utilities.schema_tools.validation import is_valid_schema, validate

    is_valid_schema(template["variables"])
    assert not validate({"image": "prunequant:latest", **values}, template["variables"], raise_on_error=False)
    return asyncio.run(kind.from_template_and_values(template, values, client=MagicMock()))
