"""`cluster.yaml` and `kubernetes/`: valid, of the client's version, closed to the outside; and on a fake cloud."""

import functools
import importlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from palate import config as configs
from palate.card.stages import CardConfig
from toy_cluster import ray_head

ROOT = Path(__file__).resolve().parents[1]


def read() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ray_pin() -> str:
    (pin,) = (line for line in project()["dependencies"] if line.startswith("ray["))
    return pin.partition("==")[2]


def images(config: dict[str, Any]) -> list[str]:
    named = [kind.get("docker", {}).get("worker_image") for kind in config["available_node_types"].values()]
    return [config["docker"]["image"], *filter(None, named)]


def start_commands(config: dict[str, Any]) -> list[str]:
    found = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    return [command for command in found if "ray start" in command]


def test_rays_own_schema_and_checks_accept_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(read(), schema)
    prepared = prepare_config(read())
    validate_config(prepared)
    workers = {name: kind["max_workers"] for name, kind in prepared["available_node_types"].items()}
    assert workers == {"head": 0, "cpu": 8, "gpu": 4}
    # The defaults of a provider must not have crept in where this file says otherwise.
    assert prepared["head_start_ray_commands"] == read()["head_start_ray_commands"]
    assert "pip install --quiet /home/ray/palate" in prepared["head_setup_commands"]
    assert "pip install --quiet /home/ray/palate" in prepared["worker_setup_commands"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_worker": 3}, "Additional properties are not allowed"),
        ({"head_node_type": "none"}, "must be one of `available_node_types`"),
        ({"max_workers": -1}, "less than the minimum"),
    ],
)
def test_rays_checks_would_refuse_a_mistake(change: dict[str, Any], message: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises((jsonschema.ValidationError, ValueError), match=message):
        validate_config(prepare_config({**read(), **change}))


def test_the_images_are_of_the_clients_ray_and_of_a_python_that_it_supports() -> None:
    import ray

    assert ray.__version__ == ray_pin()
    for image in images(read()):
        version, python, _ = image.removeprefix("rayproject/ray:").split("-")
        assert version == ray_pin()
        lowest = re.search(r">=3\.(\d+)", project()["requires-python"])
        assert lowest
        assert python == f"py3{lowest.group(1)}"
    assert sys.version_info >= (3, int(lowest.group(1)))


def test_the_head_does_no_work_and_workers_are_spot_machines_below_a_cap() -> None:
    config = read()
    kinds = dict(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert any("GPU" in kind["resources"] for kind in kinds.values())
    assert any("GPU" not in kind["resources"] for kind in kinds.values())
    for kind in kinds.values():
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert kind["min_workers"] == 0
        assert "IamInstanceProfile" in kind["node_config"]  # without one, a worker has no rights to any bucket
        assert kind["max_workers"] <= config["max_workers"]


def test_nothing_listens_to_the_outside_and_the_token_is_on_everywhere() -> None:
    config = read()
    assert "0.0.0.0" not in json.dumps(config)
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    commands = start_commands(config)
    assert len(commands) == 2
    for command in commands:
        assert "RAY_AUTH_MODE=token ray start" in command
        assert re.search(r"--object-store-memory=\d+", command)
    assert "--dashboard-host=127.0.0.1" in commands[0]


def test_serves_proxies_answer_for_replicas_that_died_and_are_soon_replaced() -> None:
    """On machines and in the image: Serve imports what this names when a proxy starts, and calls it."""
    options = {one.removeprefix("-e ") for one in read()["docker"]["run_options"] if "RAY_SERVE" in one}
    image = (ROOT / "kubernetes" / "Dockerfile").read_text()
    assert options == set(re.findall(r"^ENV (RAY_SERVE\S*)$", image, re.MULTILINE))
    settings = dict(one.split("=") for one in options)
    known = Path(importlib.import_module("ray.serve._private.constants").__file__ or "").read_text()
    assert all(f'"{name}"' in known for name in settings)
    assert settings["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] == "1"
    place = settings["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    module, _, function = place.partition(":")
    assert [one.cls.__name__ for one in getattr(importlib.import_module(module), function)()] == ["Retryable"]


def test_what_machines_serve_is_found_on_them_and_is_what_kubernetes_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    config, served = read(), yaml.safe_load((ROOT / "serve" / "cluster.yaml").read_text())
    ServeDeploySchema.model_validate(served)
    (path,) = (one.partition("=")[2] for one in config["docker"]["run_options"] if "PYTHONPATH=" in one)
    assert config["file_mounts"][path] == "."
    assert f"ENV PYTHONPATH={path}" in (ROOT / "kubernetes" / "Dockerfile").read_text()
    module, _, name = served["applications"][0]["import_path"].partition(":")
    source = Path(module.replace(".", "/") + ".py")
    assert (ROOT / source).is_file()
    assert source.parts[0] not in config["rsync_exclude"]
    on_pods = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    database = served["applications"][0]["args"].pop("database")
    assert database.startswith("postgresql://")
    assert served["applications"][0].pop("runtime_env") == {"env_vars": {"PGPASSWORD": "YOUR-PASSWORD"}}
    on_pods["applications"][0]["args"].pop("database")
    assert served == on_pods
    monkeypatch.syspath_prepend(str(ROOT))
    settings = importlib.import_module(module).TextSettings.model_validate(
        {**served["applications"][0]["args"], "database": database}
    )
    assert hasattr(importlib.import_module(module), name)
    assert settings.cpus_per_replica <= config["available_node_types"]["cpu"]["resources"]["CPU"]
    assert served["http_options"]["port"] == 8000


def test_mounted_folders_have_no_slash_at_their_end() -> None:
    assert [path for pair in read()["file_mounts"].items() for path in pair if path.endswith("/")] == []


# kubernetes/


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "kubernetes" / f"{name}.yaml").read_text())


@functools.cache
def kuberay() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "tests" / "fixtures" / "kuberay-1.6.2.yaml").read_text())


def ray_cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"].get("rayClusterSpec") or document["spec"]["rayClusterConfig"]


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_manifests_are_what_kuberay_takes(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(kuberay())
    found = list(jsonschema.Draft202012Validator(kuberay()).iter_errors(manifest(name)))
    assert [f"{error.json_path}: {error.message}" for error in found] == []


GONE = object()


def change(document: Any, path: str, value: object) -> None:
    """Set the value at a path like `spec/workerGroupSpecs/0/replicas`, or remove what is there (GONE)."""
    *way, last = path.split("/")
    for step in way:
        document = document[int(step) if isinstance(document, list) else step]
    if value is GONE:
        del document[last]
    else:
        document[last] = value


CLUSTER = {"rayjob": "spec/rayClusterSpec", "rayservice": "spec/rayClusterConfig"}
HEAD = "CLUSTER/headGroupSpec"
WORKERS = "CLUSTER/workerGroupSpecs/0"
CONTAINER = f"{WORKERS}/template/spec/containers/0"


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        # misspelt
        ("rayjob", "spec/backOffLimit", 5, "'backOffLimit' was unexpected"),
        ("rayservice", "spec/serveConfig", "", "'serveConfig' was unexpected"),
        ("rayjob", "CLUSTER/autoscalerOptions/idleTimeoutMinutes", 5, "'idleTimeoutMinutes' was unexpected"),
        ("rayjob", "CLUSTER/authOptions/secret", "token", "'secret' was unexpected"),
        ("rayservice", f"{WORKERS}/maxWorkers", 4, "'maxWorkers' was unexpected"),
        ("rayjob", f"{CONTAINER}/img", "ray", "'img' was unexpected"),
        ("rayservice", f"{CONTAINER}/env/0/valueFrom/secretRef", {}, "'secretRef' was unexpected"),
        # of a wrong type
        ("rayjob", f"{HEAD}/rayStartParams/num-cpus", 0, "0 is not of type 'string'"),
        ("rayjob", "spec/entrypoint", ["python"], "is not of type 'string'"),
        ("rayservice", "spec/serveConfigV2", {"applications": []}, "is not of type 'string'"),
        ("rayservice", "spec/excludeHeadPodFromServeSvc", "true", "'true' is not of type 'boolean'"),
        ("rayjob", f"{WORKERS}/maxReplicas", "4", "'4' is not of type 'integer'"),
        ("rayjob", f"{CONTAINER}/resources/limits/cpu", 0.5, "0.5 is not of type 'string', 'integer'"),
        ("rayjob", f"{CONTAINER}/resources/limits/memory", "32 GB", "'32 GB' does not match"),
        # missing
        ("rayjob", "metadata/name", GONE, "'name' is a required property"),
        ("rayjob", "CLUSTER", GONE, "is not valid under any of the given schemas"),
        ("rayservice", "CLUSTER", GONE, "'rayClusterConfig' is a required property"),
        ("rayjob", HEAD, GONE, "'headGroupSpec' is a required property"),
        ("rayservice", f"{HEAD}/template", GONE, "'template' is a required property"),
        ("rayjob", f"{WORKERS}/groupName", GONE, "'groupName' is a required property"),
        ("rayjob", f"{WORKERS}/maxReplicas", GONE, "'maxReplicas' is a required property"),
        ("rayjob", f"{CONTAINER}/name", GONE, "'name' is a required property"),
        ("rayservice", f"{CONTAINER}/env/0/valueFrom/secretKeyRef/key", GONE, "'key' is a required property"),
        ("rayjob", "CLUSTER/rayVersion", GONE, "'rayVersion' is a dependency of 'authOptions'"),
        # not one of the values
        ("rayjob", "apiVersion", "ray.io/v1alpha1", "'ray.io/v1' was expected"),
        ("rayjob", "CLUSTER/authOptions/mode", "basic", r"'basic' is not one of \['disabled', 'token'\]"),
        ("rayjob", "CLUSTER/autoscalerOptions/version", 2, r"2 is not one of \['v1', 'v2'\]"),
        ("rayjob", "spec/submissionMode", "JobMode", "'JobMode' is not one of"),
        ("rayservice", "spec/upgradeStrategy/type", "Recreate", "'Recreate' is not one of"),
        ("rayservice", f"{HEAD}/serviceType", "Private", "'Private' is not one of"),
        # out of range, or refused together with another field
        ("rayjob", "spec/preRunningDeadlineSeconds", 0, "0 is less than the minimum of 1"),
        ("rayjob", "spec/backoffLimit", -1, "-1 is less than the minimum of 0"),
        ("rayservice", "metadata/name", "p" * 48, "is too long"),
        ("rayjob", "spec/shutdownAfterJobFinishes", False, "True was expected"),
        ("rayjob", "CLUSTER/upgradeStrategy", {"type": "Recreate"}, "'upgradeStrategy' was unexpected"),
    ],
)
def test_a_mistake_in_a_manifest_is_refused(name: str, path: str, value: object, message: str) -> None:
    document = manifest(name)
    change(document, path.replace("CLUSTER", CLUSTER[name]), value)
    (error,) = jsonschema.Draft202012Validator(kuberay()).iter_errors(document)
    assert re.search(message, error.message)


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_the_operator_finds_nothing_that_the_schema_cannot_say(name: str) -> None:
    """What KubeRay's operator checks of a cluster by more than one field; it looks when the API server has taken it."""
    cluster = ray_cluster_of(manifest(name))
    assert tuple(int(part) for part in cluster["rayVersion"].split(".")) >= (2, 52, 0)  # for tokens
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod.get("restartPolicy", "Never") == "Never"  # autoscaler v2
        assert "resources" not in group  # not beside num-cpus
        assert "labels" not in group["rayStartParams"]
        variables = {one["name"] for container in pod["containers"] for one in container.get("env", [])}
        # What these ask for is asked for by autoscalerOptions and gcsFaultToleranceOptions.
        assert not variables & {"RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS", "REDIS_USERNAME"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_pods_have_the_pinned_ray_a_token_and_a_cap_and_the_head_no_work(name: str) -> None:
    cluster = ray_cluster_of(manifest(name))
    assert cluster["rayVersion"] == ray_pin()
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in (head, *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f":{project()['version']}-ray{ray_pin()}-py311")
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert int(group["rayStartParams"]["object-store-memory"]) > 0
    assert all(group["maxReplicas"] < 100 for group in cluster["workerGroupSpecs"])


def test_the_image_is_built_from_the_pinned_ray_and_gets_what_runs_on_nodes() -> None:
    said = (ROOT / "kubernetes" / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray_pin()}-py311-${{FLAVOUR}}" in said
    copied = {name for line in re.findall(r"^COPY --chown=ray (.*) \S+$", said, re.MULTILINE) for name in line.split()}
    assert {"pyproject.toml", "platform", "jobs", "serve"} <= copied
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_job_runs_a_job_of_this_repository_with_flags_that_it_has() -> None:
    spec = manifest("rayjob")["spec"]
    python, script, *flags = spec["entrypoint"].split()
    assert (python, script) == ("python", "/home/ray/palate/jobs/card.py")
    config = configs.parse(CardConfig, arguments=flags)
    assert (config.launcher, config.workers) == ("ray", 4)
    assert config.corpus.startswith("s3://")
    assert config.out.startswith("s3://")
    assert spec["backoffLimit"] > 0
    sent = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["env_vars"]
    assert sent.pop("PYTHONPATH") == "platform"  # of what is sent; the image has palate installed, and its own path
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": sent}
    assert "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" in sent


def test_the_service_serves_what_the_config_of_this_repository_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    served = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    local = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    ServeDeploySchema.model_validate(served)
    (application,), (known,) = served["applications"], local["applications"]
    assert {**application, "args": None} == {**known, "args": None}
    assert served["http_options"]["port"] == local["http_options"]["port"]
    monkeypatch.syspath_prepend(str(ROOT))
    settings = importlib.import_module("serve.text").TextSettings.model_validate(application["args"])
    assert settings.replicas == ray_cluster_of(manifest("rayservice"))["workerGroupSpecs"][0]["minReplicas"]
    assert settings.database.startswith("postgresql://")  # several replicas on several machines


# The node types of cluster.yaml, on this machine

# Asks for what the types offer, one after the other, and says where it ran; then waits until idle nodes are given back.
DRIVER = """
import json, os, time, ray
ray.init(log_to_driver=False)
(head,) = ray.nodes()

@ray.remote
def where():
    return os.environ.get("RAY_NODE_TYPE_NAME"), ray.get_runtime_context().get_node_id() == head["NodeID"]

found = {"head": head["Resources"].get("CPU", 0)}
for kind, wanted in json.loads(os.environ["WANTED"]).items():
    task = where.options(num_cpus=wanted["CPU"], num_gpus=wanted.get("GPU", 0))
    found[kind] = ray.get(task.remote(), timeout=240)
deadline = time.monotonic() + 90
while sum(node["Alive"] for node in ray.nodes()) > 1 and time.monotonic() < deadline:
    time.sleep(0.5)
found["left"] = sum(node["Alive"] for node in ray.nodes())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_work_makes_workers_of_its_type_come_and_go_and_the_head_gets_none() -> None:
    """By Ray's autoscaler and its fake provider, which makes the nodes of this file on this machine, one CPU each."""
    config = read()
    kinds = config["available_node_types"]
    for kind in kinds.values():
        kind["node_config"] = {}
        kind["resources"]["CPU"] = min(kind["resources"]["CPU"], 1)
        kind["resources"]["object_store_memory"] = 100 * 2**20
        kind.pop("docker", None)
    wanted = {name: dict(kind["resources"]) for name, kind in kinds.items() if name != config["head_node_type"]}
    head = kinds.pop(config["head_node_type"])
    commands = [name for name in config if name.endswith("_commands")]
    fake = {
        **config,
        # What the fake provider has no use for, and the autoscaler no defaults.
        **{
            name: [] for name in (*commands, "initialization_commands", "worker_setup_commands", "cluster_synced_files")
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        "idle_timeout_minutes": 0.1,
        # The provider knows its head by this name alone.
        "available_node_types": {**kinds, "ray.head.default": {**head, "max_workers": 0}},
        "head_node_type": "ray.head.default",
    }
    with ray_head(head["resources"]["CPU"], dashboard=False, autoscaling=fake, WANTED=json.dumps(wanted)) as cluster:
        done = cluster.run([sys.executable, "-c", DRIVER])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"head": 0, "cpu": ["cpu", False], "gpu": ["gpu", False], "left": 1}
