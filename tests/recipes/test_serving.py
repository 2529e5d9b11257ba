"""The files of recipes/serving fit the server: its options, its paths, and the time that it takes to stop."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from twotower.cli import serve
from twotower.engine.aio import AsyncEngine
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

FOLDER = Path(__file__).parents[2] / "recipes" / "serving"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
COMPOSED = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["twotower"]
POD = next(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
[SCRAPED] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
UNIT = dict(re.findall(r"^([A-Z]\w+)=(.*)$", (FOLDER / "twotower.service").read_text(), re.MULTILINE))
ENTRYPOINT = re.findall(r'"([^"]*)"', re.search(r"^ENTRYPOINT \[(.*)\]$", DOCKERFILE, re.MULTILINE)[1])
STOPS = POD["terminationGracePeriodSeconds"] - CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]


def value(command, flag):
    return command[command.index(flag) + 1]


def parsed(command, folder):
    """What the command line sets; its files are empty ones in `folder`."""
    words = list(command)
    for flag in {"--config", "--api-key-file"} & set(words):
        file = folder / flag
        file.write_text("{}")
        words[words.index(flag) + 1] = str(file)
    assert Path(words[0]).name == "twotower"
    assert words[1] == "serve"
    return typer.main.get_command(serve.app).make_context("serve", words[2:]).params


@pytest.mark.parametrize(
    ("command", "seconds"),
    [
        (ENTRYPOINT + CONTAINER["args"], STOPS),
        (ENTRYPOINT + COMPOSED["command"], int(COMPOSED["stop_grace_period"].removesuffix("s"))),
        (shlex.split(UNIT["ExecStart"]), int(UNIT["TimeoutStopSec"])),
    ],
    ids=["kubernetes", "compose", "systemd"],
)
def test_the_command_is_one_of_the_server_and_has_time_to_stop(command, seconds, tmp_path):
    values = parsed(command, tmp_path)
    assert values["api_key_file"] is not None
    assert seconds >= values["shutdown_seconds"] + 5


def test_files_are_mounted_where_the_command_looks_for_them():
    model, keys = value(CONTAINER["args"], "--model"), Path(value(CONTAINER["args"], "--api-key-file"))
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert mounts.keys() == {model, str(keys.parent), "/cache", "/tmp"}
    assert set(mounts.values()) == volumes.keys()
    assert [item["path"] for item in volumes[mounts[str(keys.parent)]]["secret"]["items"]] == [keys.name]
    targets = [re.sub(r":ro$", "", volume).rsplit(":", 1)[1] for volume in COMPOSED["volumes"]]
    assert targets == [value(COMPOSED["command"], "--model"), "/cache"]
    assert value(COMPOSED["command"], "--api-key-file") in [f"/run/secrets/{name}" for name in COMPOSED["secrets"]]
    assert "XDG_CACHE_HOME=/cache" in DOCKERFILE


def test_probes_and_prometheus_ask_for_paths_and_ports_that_there_are(tiny, byte_tokenizer, tmp_path):
    model = tiny("*-M", vocab_size=260)
    model.tokenizer = byte_tokenizer
    paths = {route.path for route in make_app(AsyncEngine(model), ServerConfig()).routes}
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    [(checked, path)] = re.findall(r"http://127.0.0.1:(\d+)(/\w+)", DOCKERFILE)
    assert {probe["path"] for probe in probes} | {path, SCRAPED["metrics_path"]} <= paths
    [port] = CONTAINER["ports"]
    assert {probe["port"] for probe in probes} == {port["name"]}
    addresses = COMPOSED["ports"] + SCRAPED["static_configs"][0]["targets"]
    ports = [checked, *re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE), port["containerPort"]]
    ports += [address.rsplit(":")[-1] for address in addresses]
    assert {int(found) for found in ports} == {parsed(ENTRYPOINT, tmp_path)["port"]}


def test_the_image_is_built_from_all_that_the_package_needs():
    root = FOLDER.parents[1]
    kept = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    [readme] = re.findall(r'^readme = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert {"src", "pyproject.toml", readme, "LICENSE"} == kept
    assert all((root / name).exists() for name in kept)
