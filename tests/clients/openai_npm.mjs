// Asks a server through the npm package `openai`. Prints the answers as JSON.

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "list the files of a directory" }];
const greedy = { model: "m", temperature: 0 };
const answers = {};

const whole = await client.chat.completions.create({ ...greedy, messages, max_tokens: 12 });
answers.chat = [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens];
answers.streamed = "";
for await (const event of await client.chat.completions.create({ ...greedy, messages, max_tokens: 12, stream: true })) {
  answers.streamed += event.choices[0]?.delta?.content ?? "";
}
const told = await client.completions.create({ ...greedy, prompt: "import os and", max_tokens: 8 });
answers.completion = told.choices[0].text;
const response = await client.responses.create({ ...greedy, input: "read a file", max_output_tokens: 12 });
answers.response = response.output_text;
const next = { ...greedy, input: "and?", previous_response_id: response.id, max_output_tokens: 8 };
answers.next = (await client.responses.create(next)).output_text;
answers.events = "";
const events = await client.responses.create({ ...greedy, input: "read a file", max_output_tokens: 12, stream: true });
for await (const event of events) {
  if (event.type === "response.output_text.delta") answers.events += event.delta;
}
await client.chat.completions.create({ messages, model: "nobody" }).catch((error) => {
  answers.error = [error.constructor.name, error.status];
});
console.log(JSON.stringify(answers));
