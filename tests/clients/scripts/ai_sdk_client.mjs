// Vercel's ai package with @ai-sdk/openai-compatible: text, streams, objects, tools.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "veratune", baseURL: process.argv[2] + "/v1", apiKey: "none", supportsStructuredOutputs: true,
});
const model = provider("smollm2");
const prompt = "Turn on the light in the kitchen, please.";
const schema = z.object({ room: z.enum(["kitchen", "hall"]), on: z.boolean() });
const check = (good, what) => { if (!good) throw new Error(what); console.log(what); };
const limit = { maxOutputTokens: 80, maxRetries: 0 };

check((await generateText({ model, prompt, ...limit })).text.length > 0, "generateText");
let text = "";
for await (const piece of streamText({ model, prompt, ...limit }).textStream) text += piece;
check(text.length > 0, "streamText");

const { object } = await generateObject({ model, schema, prompt, ...limit });
check(schema.safeParse(object).success, "generateObject");
const streamed = streamObject({ model, schema, prompt, ...limit });
for await (const part of streamed.partialObjectStream) void part;
check(schema.safeParse(await streamed.object).success, "streamObject");

const tools = {
  set_light: tool({ description: "switch a light", inputSchema: schema, execute: async () => "done" }),
};
const called = await generateText({ model, prompt, tools, toolChoice: "required", ...limit });
check(schema.safeParse(called.toolCalls[0].input).success, "generateText with tools");
const stream = streamText({ model, prompt, tools, toolChoice: "required", ...limit });
await stream.consumeStream();
check((await stream.toolCalls)[0].toolName === "set_light", "streamText with tools");
console.log("ok");
