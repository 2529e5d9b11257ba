// ai, Vercel's, with its provider for servers like OpenAI's.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";
import { QUESTION, model as name, report, shown, url } from "./calls.mjs";

const provider = createOpenAICompatible({ name: "twotower", baseURL: `${url}/v1`, apiKey: "none" });
const structured = createOpenAICompatible({ name: "twotower", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
const model = provider(name);
const Animal = z.object({ kind: z.enum(["cat", "dog", "bird"]), brave: z.boolean() });
const greet = tool({
  description: "Greets an animal.",
  inputSchema: z.object({ kind: z.enum(["cat", "dog", "bird"]) }),
  execute: async ({ kind }) => `hello, ${kind}`,
});

await report({
  completion: async () =>
    shown((await generateText({ model: provider.completionModel(name), prompt: "Once upon a time" })).text),
  chat: async () => shown((await generateText({ model, system: "Be kind.", prompt: QUESTION })).text),
  "chat stream": async () => {
    let text = "";
    for await (const piece of streamText({ model, prompt: QUESTION }).textStream) text += piece;
    return shown(text);
  },
  "output by a schema": async () => {
    const asked = { model: structured(name), prompt: QUESTION, output: Output.object({ schema: Animal }) };
    return JSON.stringify((await generateText(asked)).output);
  },
  tools: async () => {
    const toolChoice = { type: "tool", toolName: "greet" }; // one call; any number may fill the context
    const answer = await generateText({ model, prompt: QUESTION, tools: { greet }, toolChoice });
    return `${JSON.stringify(answer.toolCalls[0].input)} → ${answer.toolResults[0].output}`;
  },
  "tools in a stream": async () => {
    const toolChoice = "required";
    const [call] = await streamText({ model, prompt: QUESTION, tools: { greet }, toolChoice }).toolCalls;
    return JSON.stringify(call.input);
  },
  "tools left to the model": async () =>
    (await generateText({ model, prompt: QUESTION, tools: { greet } })).finishReason,
});
