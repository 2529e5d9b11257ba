// The fields for the settings that the server names in /twotower/about.

// Shows a field for each setting; `values` has those that are chosen, and `changed` is called after each change.
export function showFields(root, settings, values, changed) {
  root.replaceChildren(...settings.map((setting) => field(setting, values, changed)));
}

function field(setting, values, changed) {
  const label = document.createElement("label");
  const input = setting.kind === "int" || setting.kind === "float" ? number(setting) : choice(setting);
  input.dataset.setting = setting.name;
  input.value = values[setting.name] === undefined ? "" : String(values[setting.name]);
  label.title = setting.help;
  input.addEventListener("change", () => {
    if (!input.checkValidity()) return input.reportValidity();
    if (input.value === "") delete values[setting.name];
    else values[setting.name] = read(setting, input.value);
    return changed();
  });
  label.append(setting.name.replaceAll("_", " "), input);
  return label;
}

function read(setting, text) {
  if (setting.kind === "choice") return text;
  return setting.kind === "bool" ? text === "true" : Number(text);
}

function number(setting) {
  const input = document.createElement("input");
  input.type = "number";
  input.step = setting.kind === "int" ? 1 : "any";
  if (setting.least !== null) input.min = setting.least;
  if (setting.most !== null) input.max = setting.most;
  input.placeholder = setting.default ?? "none";
  return input;
}

function choice(setting) {
  const select = document.createElement("select");
  const options = setting.kind === "bool" ? ["true", "false"] : setting.choices;
  select.append(new Option(`${setting.default} (default)`, ""), ...options.map((one) => new Option(one, one)));
  return select;
}
