"""Two-tower checkpoints on vLLM: what `vllm serve CHECKPOINT` loads as a plugin."""


def register() -> None:
    """Tells vLLM of two-tower models: the entry point `twotower` of the group `vllm.general_plugins`.

    vLLM calls it in each of its processes, wherever twotower is installed beside it, so it imports no model and changes
    nothing for models of other kinds. May be called again.
    """
    from twotower.integrations.vllm.patches import apply

    apply()
