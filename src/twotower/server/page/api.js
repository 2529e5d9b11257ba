// The requests that both pages send to the server.

// The server refused a request, or failed in the middle of it. `status` is 0 where the connection broke.
export class Refused extends Error {
  constructor(message, status, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key.trim()}` } : {}) };
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server can't be reached.", 0);
  }
  if (response.ok) return response;
  if (response.status === 401) throw new Refused("This server wants an API key.", 401);
  const body = await response.json().catch(() => null);
  throw new Refused(body?.error?.message ?? `The server answered ${response.status}.`, response.status, body?.error?.code);
}

// What the server is: its model, its modes, and the settings that it takes.
export async function about(key) {
  return (await send("twotower/about", { headers: headers(key) })).json();
}

// Yields the steps of one text; the last has its result. Throws Refused, also where the stream breaks off.
export async function* watched(request, key, signal) {
  const options = { method: "POST", headers: headers(key), body: JSON.stringify(request), signal };
  const response = await send("twotower/watch", options);
  const events = parsed(response.body.pipeThrough(new TextDecoderStream()).getReader());
  for await (const event of events) {
    if (event.error) throw new Refused(event.error.message, response.status, event.error.code);
    yield event;
    if (event.result) return;
  }
  throw new Refused("The connection broke before the text was finished.", 0);
}

// Yields the JSON objects of a stream of server-sent events.
export async function* parsed(reader) {
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part.replace(/^data: /, ""));
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The connection broke before the text was finished.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
