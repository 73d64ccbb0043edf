"""What is said about deployment against the code: every file parses, and every name in it exists."""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from tensorflow_serving.config import model_server_config_pb2

from command_line import run_tool
from fusion.errors import ConfigError
from fusion.export.manifest import FILE_NAME
from serving.batching import BatchSettings
from serving.metrics import METRICS
from serving.openapi import OPERATIONS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serving/deploy"
KUBERNETES = DEPLOY / "kubernetes"
STOCK = KUBERNETES / "tensorflow_serving"
OPEN = {operation.path for operation in OPERATIONS if operation.open and operation.method == "GET"}
NUMBERS = next(operation.path for operation in OPERATIONS if operation.name == "prometheus")
ADAPTER = "prometheus_adapter.yaml"
"""Values of a chart, no object of a cluster."""


def documents(folder):
    """All objects of a folder's manifests, by kind and name."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.name not in ("kustomization.yaml", ADAPTER):
            for document in yaml.safe_load_all(path.read_text()):
                key = (document["kind"], document["metadata"]["name"])
                assert key not in found
                found[key] = document
    return found


def kinds(objects, kind):
    return {name: document for (other, name), document in objects.items() if other == kind}


def pod(deployment):
    return deployment["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def ours():
    return documents(KUBERNETES)


@pytest.fixture(scope="module")
def stock():
    return documents(STOCK)


@pytest.fixture(scope="module")
def tool():
    """tools/serve.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("serve")


@pytest.fixture(scope="module")
def flags(tool):
    """By flag of tools/serve.py, its default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["serve.py"])
        cli = importlib.import_module("cli")
        made = []
        parser = cli.parser
        patch.setattr(cli, "parser", lambda *arguments: made.append(parser(*arguments)) or made[0])
        with pytest.raises(SystemExit):
            tool.main()
    return {flag: action.default for action in made[0]._actions for flag in action.option_strings}


def arguments(words):
    """Flags with their values, of a command line as lists or with `=`."""
    line = " ".join(words).replace("=", " ").split()
    given = {}
    for place, word in enumerate(line):
        if word.startswith("--"):
            value = line[place + 1] if place + 1 < len(line) and not line[place + 1].startswith("--") else ""
            given[word] = value
    return given


@pytest.mark.parametrize("folder", [KUBERNETES, STOCK])
def test_kustomizations_name_every_manifest(folder):
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml", ADAPTER}
    assert set(listed["resources"]) == there
    for generator in listed.get("configMapGenerator", []):
        assert all((folder / name).is_file() for name in generator["files"])


@pytest.mark.parametrize("folder", [KUBERNETES, STOCK])
def test_objects_name_each_other(folder):
    """O10: services, budgets, policies and the autoscaler select pods that exist, by ports that they have."""
    objects = documents(folder)
    for deployment in kinds(objects, "Deployment").values():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
        ports = {port["name"] for port in pod(deployment)["containers"][0]["ports"]}
        for service in kinds(objects, "Service").values():
            assert service["spec"]["selector"].items() <= labels.items()
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
        for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
            for document in kinds(objects, kind).values():
                assert document["spec"][key]["matchLabels"].items() <= labels.items()
        for policy in kinds(objects, "NetworkPolicy").values():
            assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} <= ports
        volumes = {volume["name"] for volume in pod(deployment)["volumes"]}
        assert {mount["name"] for mount in pod(deployment)["containers"][0]["volumeMounts"]} == volumes
    for scaler in kinds(objects, "HorizontalPodAutoscaler").values():
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in objects
    generated = yaml.safe_load((folder / "kustomization.yaml").read_text()).get("configMapGenerator", [])
    for deployment in kinds(objects, "Deployment").values():
        maps = {volume["configMap"]["name"] for volume in pod(deployment)["volumes"] if "configMap" in volume}
        assert maps == {generator["name"] for generator in generated}


@pytest.mark.parametrize("folder", [KUBERNETES, STOCK])
def test_containers_have_no_privileges(folder):
    for deployment in kinds(documents(folder), "Deployment").values():
        spec, container = pod(deployment), pod(deployment)["containers"][0]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert mounts.pop("/tmp") is False and all(mounts.values())
        assert ":" in container["image"] and not container["image"].endswith(":latest")
        assert "memory" in container["resources"]["limits"]


def test_our_server_is_started_with_flags_that_it_has(ours, flags):
    """O10: its ports are those of the manifests, and there is time to drain."""
    deployment = ours["Deployment", "server"]
    container = pod(deployment)["containers"][0]
    given = arguments(container["args"])
    assert set(given) <= set(flags)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": flags["--port"], "rest": flags["--rest-port"]}
    services = {port["name"]: port["port"] for port in ours["Service", "server"]["spec"]["ports"]}
    assert services == ports
    mounts = tuple(mount["mountPath"] + "/" for mount in container["volumeMounts"])
    assert all(given[flag].startswith(mounts) for flag in ("--tls-cert", "--tls-key", "--token-file"))
    assert container["args"][0] + "/" in mounts
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod(deployment)["terminationGracePeriodSeconds"] > pause + float(given["--drain"])


def test_probes_ask_paths_that_need_no_token(ours):
    container = pod(ours["Deployment", "server"])["containers"][0]
    for name, path in (("startupProbe", "/readyz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[name]["httpGet"] == {"path": path, "port": "rest", "scheme": "HTTPS"}
        assert path in OPEN


def test_metrics_are_where_they_are_looked_for(ours, stock, flags):
    """O10: more replicas come on a gauge that the server has, well before its queue is full."""
    metric = ours["HorizontalPodAutoscaler", "server"]["spec"]["metrics"][0]["pods"]
    name = metric["metric"]["name"]
    assert f"# TYPE {name} gauge" in METRICS.text().decode()
    queue = int(arguments(pod(ours["Deployment", "server"])["containers"][0]["args"])["--queue"])
    assert 0 < int(metric["target"]["averageValue"]) < queue == BatchSettings().queue == flags["--queue"]
    rule = yaml.safe_load((KUBERNETES / ADAPTER).read_text())["rules"]["custom"][0]
    assert rule["seriesQuery"].startswith(name + "{") and rule["name"]["as"] == name
    for deployment, port in (
        (ours["Deployment", "server"], "8501"),
        (stock["Deployment", "tensorflow-serving"], "8501"),
    ):
        notes = deployment["spec"]["template"]["metadata"]["annotations"]
        assert (notes["prometheus.io/path"], notes["prometheus.io/port"]) == (NUMBERS, port)


def other_protos():
    """TensorFlow Serving's messages for two of its files, which its Python package leaves out
    (session_bundle_config.proto, monitoring_config.proto)."""
    field, file = (
        descriptor_pb2.FieldDescriptorProto,
        descriptor_pb2.FileDescriptorProto(name="x.proto", syntax="proto3"),
    )
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    batching = file.message_type.add(name="BatchingParameters")
    names = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
    for number, name in enumerate(names, start=1):
        batching.field.add(name=name, number=number, type=field.TYPE_MESSAGE, type_name=".google.protobuf.Int64Value")
    batching.field.add(name="allowed_batch_sizes", number=6, type=field.TYPE_INT64, label=field.LABEL_REPEATED)
    batching.field.add(name="pad_variable_length_inputs", number=7, type=field.TYPE_BOOL)
    prometheus = file.message_type.add(name="PrometheusConfig")
    prometheus.field.add(name="enable", number=1, type=field.TYPE_BOOL)
    prometheus.field.add(name="path", number=2, type=field.TYPE_STRING)
    monitoring = file.message_type.add(name="MonitoringConfig")
    monitoring.field.add(name="prometheus_config", number=1, type=field.TYPE_MESSAGE, type_name=".PrometheusConfig")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    names = ("BatchingParameters", "MonitoringConfig")
    return (message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names)


def test_files_of_tensorflow_serving_are_its_text_protos(stock):
    Batching, Monitoring = other_protos()
    models = text_format.Parse((STOCK / "models.config").read_text(), model_server_config_pb2.ModelServerConfig())
    (config,) = models.model_config_list.config
    batching = text_format.Parse((STOCK / "batching.config").read_text(), Batching())
    monitoring = text_format.Parse((STOCK / "monitoring.config").read_text(), Monitoring())
    container = pod(stock["Deployment", "tensorflow-serving"])["containers"][0]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.base_path == f"{mounts['models']}/{config.name}" and config.model_platform == "tensorflow"
    assert config.model_version_policy.latest.num_versions == 2
    assert container["readinessProbe"]["httpGet"]["path"] == f"/v1/models/{config.name}"
    assert monitoring.prometheus_config.enable and monitoring.prometheus_config.path == NUMBERS
    assert list(batching.allowed_batch_sizes) == sorted(batching.allowed_batch_sizes)
    assert batching.allowed_batch_sizes[-1] == batching.max_batch_size.value == BatchSettings().max_rows
    assert batching.pad_variable_length_inputs is False and batching.max_enqueued_batches.value > 0
    given = arguments(container["args"])
    for flag in ("--model_config_file", "--monitoring_config_file", "--batching_parameters_file"):
        folder, _, name = given[flag].rpartition("/")
        assert folder == mounts["config"] and (STOCK / name).is_file()
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    assert (given["--port"], given["--rest_api_port"]) == (ports["grpc"], ports["rest"])


def test_our_server_reads_models_config_too():
    """O9: both servers watch the same repository, `name/version/`, on any file system."""
    from serving.model_config import read_model_config

    (config,) = read_model_config(STOCK / "models.config")
    assert (config.name, str(config.folder), config.latest) == ("films", "/models/films", 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model-config", STOCK / "models.config", "--name", "other"], "--name goes with a folder"),
        (["models", "--drain", "nan"], "must be a number from 0 on, as in 0.01 or 20; received nan"),
    ],
)
def test_options_that_could_not_be_meant(options, sentence):
    ended = run_tool("serve", *options)
    assert ended.code == 2 and sentence in ended.err


def test_options_that_would_do_nothing(tool, tmp_path):
    """A name for several models, and so many versions of those that are named one by one."""

    def meant(**given):
        options = {"source": None, "model_config": None, "name": "", "canary": 0.0, "latest": None}
        return tool.models(argparse.Namespace(**options | given))

    for name in ("books", "films"):
        (tmp_path / name / "3").mkdir(parents=True)
        (tmp_path / name / "3" / FILE_NAME).touch()
    with pytest.raises(ConfigError, match=r"--name must be left out .* has books, films\."):
        meant(source=tmp_path, name="one")
    (config,) = meant(source=tmp_path / "films", name="one", latest=2)
    assert (config.name, config.latest) == ("one", 2)
    with pytest.raises(ConfigError, match=r"--latest must be left out .* those of films are; received 2\."):
        meant(source=tmp_path / "films" / "3", latest=2)
    text = (STOCK / "models.config").read_text()
    (tmp_path / "models.config").write_text(text.replace("latest { num_versions: 2 }", "specific { versions: 3 }"))
    with pytest.raises(ConfigError, match=r"--latest must be left out .* those of films are; received 2\."):
        meant(model_config=tmp_path / "models.config", latest=2)
    (config,) = meant(model_config=STOCK / "models.config", latest=5, canary=0.1)
    assert (config.latest, config.canary) == (5, 0.1)


def test_the_image_is_made_of_what_is_there_and_is_not_root(flags):
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY") and "--from" not in line]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored
    assert all(re.fullmatch(r"FROM [a-z]+:\d[\w.-]+( AS \w+)?", line) for line in lines if line.startswith("FROM"))
    user = next(line.split()[1] for line in lines if line.startswith("USER"))
    assert user.isdecimal() and int(user) > 0
    entry = json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT"))
    command = json.loads(next(line for line in lines if line.startswith("CMD")).removeprefix("CMD"))
    assert (ROOT / entry[-1]).is_file() and set(arguments(command)) <= set(flags)
    exposed = next(line.split()[1:] for line in lines if line.startswith("EXPOSE"))
    assert exposed == [str(flags["--port"]), str(flags["--rest-port"])]


def test_compose_is_for_this_machine_only(flags):
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and not service["user"].startswith("0")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert all(volume.endswith(":ro") for volume in service["volumes"])
        for volume in service["volumes"]:
            path = volume.rsplit(":", 2)[0]
            assert path.startswith("${MODELS") or (DEPLOY / path).is_dir()
    server, stock = compose["services"]["server"], compose["services"]["tensorflow-serving"]
    assert set(arguments(server["command"])) <= set(flags)
    # All addresses inside the container: without a name, a web page whose own name leads here could ask it.
    assert arguments(server["command"])["--host-name"] == "localhost"
    assert {port.rpartition(":")[2] for port in server["ports"]} == {str(flags["--port"]), str(flags["--rest-port"])}
    assert (DEPLOY / server["build"]["context"]).resolve() == ROOT
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", " ".join(server["healthcheck"]["test"]))
    assert (int(asked[1]), asked[2]) == (flags["--rest-port"], "/readyz")
    assert int(server["stop_grace_period"].rstrip("s")) > float(arguments(server["command"])["--drain"])
    kubernetes = pod(documents(STOCK)["Deployment", "tensorflow-serving"])["containers"][0]
    assert (stock["image"], stock["command"]) == (kubernetes["image"], kubernetes["args"])
