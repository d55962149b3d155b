// Asks a server through Vercel's npm package `ai`. Prints the answers as JSON.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const baseURL = `${process.argv[2]}/v1`;
const compatible = createOpenAICompatible({ name: "vllm", baseURL, apiKey: "none" });
const openai = createOpenAI({ baseURL, apiKey: "none" });
const options = { temperature: 0, maxOutputTokens: 12, maxRetries: 0, prompt: "list the files of a directory" };
const answers = {};

const whole = await generateText({ model: compatible("m"), ...options });
answers.chat = [whole.text, whole.finishReason, whole.usage.totalTokens];
answers.streamed = "";
for await (const piece of streamText({ model: compatible("m"), ...options }).textStream) answers.streamed += piece;
answers.completion = (await generateText({ model: compatible.completionModel("m"), ...options })).text;
answers.response = (await generateText({ model: openai.responses("m"), ...options })).text;
answers.events = "";
for await (const piece of streamText({ model: openai.responses("m"), ...options }).textStream) answers.events += piece;
console.log(JSON.stringify(answers));
