// The openai npm package: chat, runTools, parse with zod, responses.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", timeout: 900_000 });
const messages = [{ role: "user", content: "Turn on the light in the kitchen, please." }];
const Command = z.object({ room: z.enum(["kitchen", "hall"]), on: z.boolean() });
const check = (good, what) => { if (!good) throw new Error(what); console.log(what); };

const calls = [];
const runner = client.chat.completions.runTools({
  model: "smollm2", messages, max_tokens: 80,
  tool_choice: { type: "function", function: { name: "set_light" } },
  tools: [zodFunction({
    name: "set_light", parameters: Command, function: (command) => { calls.push(command); return "done"; },
  })],
});
await runner.done();
check(calls.length === 1 && ["kitchen", "hall"].includes(calls[0].room), "runTools");

const parsed = await client.chat.completions.parse({
  model: "tuned", messages, max_tokens: 80, response_format: zodResponseFormat(Command, "command"),
});
check(typeof parsed.choices[0].message.parsed.on === "boolean", "parse");

let text = "";
for await (const chunk of client.chat.completions.stream({ model: "smollm2", messages, max_tokens: 20 }))
  text += chunk.choices[0]?.delta?.content ?? "";
check(text.length > 0, "stream");

const response = await client.responses.create({ model: "smollm2", input: "Say hello.", max_output_tokens: 20 });
check(response.output_text.length > 0, "responses");
console.log("ok");
