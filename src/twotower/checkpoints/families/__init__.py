"""The families of backbones that `init` opens, each declared by how its config.json and tensors are ours."""
