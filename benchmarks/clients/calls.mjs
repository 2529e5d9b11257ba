// What the scripts for Node share; calls.py has the same for Python.

export const [url, model] = process.argv.slice(2);
export const QUESTION = "Tell me a story about a dog.";

/** An answer is empty, which a small model's may be by chance. */
class NoText extends Error {}

/** A text of a model, cut and on one line. */
export function shown(text) {
  const line = (text ?? "").split(/\s+/).join(" ").trim();
  if (!line) throw new NoText("the answer has no text");
  return line.length > 32 ? `“${line.slice(0, 32)}…”` : `“${line}”`;
}

/** Runs each call, up to three times until there is a text, and prints its result. */
export async function report(calls) {
  for (const [call, run] of Object.entries(calls)) {
    let line;
    for (let tries = 0; tries < 3; tries++) {
      line = { call };
      try {
        line.result = await run();
      } catch (error) {
        line.error = `${error.name}: ${error.message}`.split("\n")[0];
        if (error instanceof NoText) continue;
      }
      break;
    }
    console.log(JSON.stringify(line));
  }
}
