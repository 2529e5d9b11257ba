"""What replicas are started from: options by name, files, the environment, and the devices that they reserve."""

from pathlib import Path

import pytest
import yaml

from twotower.engine.config import EngineConfig
from twotower.errors import SettingError
from twotower.integrations.ray.arguments import read
from twotower.integrations.ray.config import Launch, ReplicaConfig
from twotower.server.config import ServerConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "ray_serve" / "rayservice.yaml"


def test_the_options_of_serve_are_read_from_texts_and_from_what_yaml_makes_of_them(tmp_path):
    keys, template = tmp_path / "keys", tmp_path / "template"
    keys.write_text("one\n")
    template.write_text("{{ messages }}")
    texts = {"mode": "ar", "max-requests": "4", "state_mib": "8", "replicas": "2", "replica_cpus": "0.5"}
    files = {"api_key_file": str(keys), "chat_template": str(template)}
    launch, config = read(texts | files | {"name": "a,b", "api_key": "two", "device": "cuda"})
    assert launch.server == ServerConfig(default_mode="ar", model_names=("a", "b"), api_keys=("two", "one"))
    assert launch.limits == EngineConfig(max_num_requests=4, state_bytes=8 << 20)
    assert (launch.device, launch.template, launch.model) == ("cuda", "{{ messages }}", None)
    assert config == ReplicaConfig(replicas=2, replica_cpus=0.5)
    again, _ = read(
        {"default_mode": "ar", "max_num_requests": 4, "served_model_name": ["a", "b"], "state_bytes": 8 << 20}
    )
    assert again.limits == launch.limits
    assert again.server.model_names == ("a", "b")


def test_keys_of_the_environment_hold_and_a_model_has_the_name_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOTOWER_API_KEY", "secret")
    launch, _ = read({"model": str(tmp_path)})
    assert launch.server.api_keys == ("secret",)
    assert launch.server.model_names == (tmp_path.name,)
    assert launch.secret not in repr(launch)
    assert launch.secret != read({})[0].secret


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"modle": "x"}, r"unknown arguments \['modle'\]"),
        ({"max_requests": "many"}, "max_requests is 'many', must be an integer"),
        ({"max_requests": 0}, "must be an integer of at least 1"),
        ({"mode": "fast"}, "must be one of"),
        ({"port": 80}, "port is 80, must be left out"),
        ({"max_replicas": 2}, "must be left out without --replicas"),
        ({"replicas": 3, "max_replicas": 2}, "must be at least --replicas, 3"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        read(arguments)


def test_a_broken_template_is_refused_by_its_file(tmp_path):
    template = tmp_path / "template"
    template.write_text("{% if %}")
    with pytest.raises(ValueError, match="template can't be used"):
        read({"chat_template": template})


@pytest.mark.parametrize(
    ("devices", "asked", "device", "reserved"),
    [
        ({}, None, "cpu", 0),
        ({"device": "cuda"}, None, "cuda", 1),
        ({"device": "cuda"}, 0.5, "cuda", 0.5),
        ({}, 1.0, "cuda", 1),
        ({"context_device": "cuda:0", "denoiser_device": "cuda:1"}, None, "cpu", 2),
        ({"denoiser_device": "cuda:0"}, None, "cpu", 1),
    ],
)
def test_a_replica_reserves_the_gpus_of_its_devices(devices, asked, device, reserved):
    launch = Launch(server=ServerConfig(), limits=EngineConfig(), **devices)
    started = launch.reserving(ReplicaConfig(replicas=1, replica_gpus=asked))
    assert (started.device, started.gpus) == (device, reserved)


@pytest.mark.parametrize(
    ("devices", "limits", "config", "fraction"),
    [
        ({}, {}, {"replica_cpus": 2.0}, 0.25),
        ({}, {}, {"replica_cpus": 8.0}, 0.5),
        ({"device": "cuda"}, {}, {}, 0.9),
        ({"device": "cuda"}, {}, {"replica_gpus": 0.5}, 0.45),
        ({}, {"memory_fraction": 0.3}, {}, 0.3),
        ({}, {"state_bytes": 1 << 30}, {}, None),
    ],
)
def test_replicas_that_share_a_machine_share_its_memory(devices, limits, config, fraction):
    launch = Launch(server=ServerConfig(), limits=EngineConfig(**limits), **devices)
    assert launch.reserving(ReplicaConfig(replicas=1, **config)).memory_fraction(4) == fraction


def test_fewer_gpus_than_the_devices_name_are_refused():
    launch = Launch(server=ServerConfig(), limits=EngineConfig(), context_device="cuda:0", denoiser_device="cuda:1")
    with pytest.raises(SettingError, match=r"replica_gpus is 1\.0, must be at least 2"):
        launch.reserving(ReplicaConfig(replicas=1, replica_gpus=1.0))


def test_the_recipe_for_kubernetes_has_arguments_that_are_read():
    recipe = yaml.safe_load(RECIPE.read_text())
    serve = yaml.safe_load(recipe["spec"]["serveConfigV2"])
    [application] = serve["applications"]
    launch, config = read(application["args"])
    assert (launch.model, config.least, config.most) == ("/model", 2, 4)
    assert launch.reserving(config).gpus == 1
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(pytest.importorskip(module), name))
