"""Two-tower checkpoints on vLLM: what `vllm serve CHECKPOINT` loads as a plugin."""


def register() -> None:
    """Tells vLLM of two-tower models: the entry point `twotower` of the group `vllm.general_plugins`.

    vLLM calls it in each of its processes, wherever twotower is installed beside it, so it imports no model, changes
    nothing for models of other kinds and raises nothing. Beside a vLLM that it wasn't made for, two towers are refused
    when their config.json is read, and of vLLM's modules none is imported. May be called again.
    """
    from twotower.integrations.vllm.reader import register_reader
    from twotower.integrations.vllm.versions import is_known

    register_reader()
    if is_known():
        from twotower.integrations.vllm.patches import apply

        apply()
