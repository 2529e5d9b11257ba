// openai for Node.

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { QUESTION, model, report, shown, url } from "./calls.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const messages = [{ role: "user", content: QUESTION }];
const Animal = z.object({ kind: z.enum(["cat", "dog", "bird"]), brave: z.boolean() });
const Greet = z.object({ kind: z.enum(["cat", "dog", "bird"]) });
const tool = zodFunction({ name: "greet", parameters: Greet, function: ({ kind }) => `hello, ${kind}` });

await report({
  models: async () => (await client.models.list()).data.map((one) => one.id).join(", "),
  completion: async () => shown((await client.completions.create({ model, prompt: "Once upon a time" })).choices[0].text),
  chat: async () => shown((await client.chat.completions.create({ model, messages })).choices[0].message.content),
  "chat stream": async () => {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ model, messages, stream: true }))
      text += chunk.choices[0]?.delta?.content ?? "";
    return shown(text);
  },
  "chat stream helper": async () => shown(await client.chat.completions.stream({ model, messages, stop: "." }).finalContent()),
  parse: async () => {
    const response_format = zodResponseFormat(Animal, "animal");
    const answer = await client.chat.completions.parse({ model, messages, response_format });
    return JSON.stringify(answer.choices[0].message.parsed);
  },
  tools: async () => {
    const answer = await client.chat.completions.create({ model, messages, tools: [tool], tool_choice: "required" });
    return answer.choices[0].message.tool_calls[0].function.arguments;
  },
  runTools: async () => {
    const tool_choice = { type: "function", function: { name: "greet" } };
    const runner = client.chat.completions.runTools({ model, messages, tools: [tool], tool_choice });
    await runner.done();
    return `${await runner.finalFunctionToolCall().then((call) => call.arguments)} → ${await runner.finalFunctionToolCallResult()}`;
  },
  "runTools in a stream, left to the model": async () =>
    shown(
      await client.chat.completions.runTools({ model, messages, tools: [tool], stream: true, stop: "." }).finalContent(),
    ),
  responses: async () => shown((await client.responses.create({ model, input: QUESTION })).output_text),
  "responses stream": async () => {
    let text = "";
    for await (const event of await client.responses.create({ model, input: QUESTION, stream: true }))
      if (event.type === "response.output_text.delta") text += event.delta;
    return shown(text);
  },
  embeddings: async () => {
    try {
      await client.embeddings.create({ model, input: "a" });
    } catch (error) {
      if (error.status === 404) return `404: ${error.error.message}`;
      throw error;
    }
    throw new Error("no error");
  },
});
