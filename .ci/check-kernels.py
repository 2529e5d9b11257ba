"""Whether an installed wheel decodes with the kernels that it has, and not with those of this machine's compiler."""

import twotower

model = twotower.load("hybrid", backend="native")
for tower, choice in model.backends.items():
    if "built in for" not in choice.reason:
        raise SystemExit(f"the {tower} runs in {choice.name} ({choice.reason}), and not in the wheel's kernels")
prompt = "reverse: glass moon bird -> bird moon glass\nreverse: red green fish ->"
texts = {
    mode: twotower.generate(model, [prompt], twotower.SamplingParams(mode=mode))[0].text for mode in ("ar", "verified")
}
if texts["verified"] != texts["ar"] or not texts["ar"].startswith(" fish green red"):
    raise SystemExit(f"the kernels write {texts}")
