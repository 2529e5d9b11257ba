"""One file per family of backbones: how its config.json and tensor names map to ours."""
