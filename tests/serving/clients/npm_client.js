// The openai package of npm: the same checks as openai_client.py makes, one JSON object each on standard output.
"use strict";

const assert = require("node:assert/strict");
const OpenAI = require("openai");

const { TEST_REST: REST, TEST_MODEL: MODEL, TEST_KEYED_REST: KEYED_REST, TEST_KEY: KEY } = process.env;
const client = new OpenAI({ baseURL: `${REST}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name three colours of the rainbow." }];
const prompt = "The capital of France is";

const chat = (options) => client.chat.completions.create({ model: MODEL, messages, max_tokens: 24, ...options });
const completion = (options) => client.completions.create({ model: MODEL, prompt, max_tokens: 24, ...options });

async function textOf(stream) {
  let text = "";
  for await (const chunk of await stream) {
    const [choice] = chunk.choices;
    if (choice) text += (choice.delta ? choice.delta.content : choice.text) ?? "";
  }
  return text;
}

async function rejected(kind, call) {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof kind, `${error} is no ${kind.name}`);
    return error;
  }
  assert.fail(`no ${kind.name} was thrown`);
}

const checks = {
  async check_models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.ok(ids.includes(MODEL));
    assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
  },

  async check_chat() {
    const answer = await chat({ temperature: 0 });
    assert.equal(answer.choices[0].message.role, "assistant");
    assert.ok(answer.choices[0].message.content);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },

  async check_chat_stream_equals_chat() {
    const whole = await chat({ temperature: 0 });
    assert.equal(await textOf(chat({ temperature: 0, stream: true })), whole.choices[0].message.content);
  },

  async check_stream_helper_gathers_the_same_answer() {
    const whole = await chat({ temperature: 0 });
    const options = { model: MODEL, messages, max_tokens: 24, temperature: 0 };
    const stream = client.chat.completions.stream({ ...options, stream_options: { include_usage: true } });
    const gathered = await stream.finalChatCompletion();
    assert.equal(gathered.choices[0].message.content, whole.choices[0].message.content);
    assert.equal(gathered.choices[0].finish_reason, whole.choices[0].finish_reason);
    assert.equal(gathered.usage.total_tokens, whole.usage.total_tokens);
  },

  async check_completion_stream_equals_completion() {
    const whole = await completion({ temperature: 0 });
    assert.ok(whole.choices[0].text);
    assert.equal(await textOf(completion({ temperature: 0, stream: true })), whole.choices[0].text);
  },

  async check_logprobs_stop_and_n() {
    const answer = await chat({ temperature: 0, logprobs: true, top_logprobs: 2 });
    for (const token of answer.choices[0].logprobs.content) assert.equal(token.top_logprobs.length, 2);
    const whole = answer.choices[0].message.content;
    const word = whole.split(/\s+/)[1];
    const stopped = await chat({ temperature: 0, stop: [word] });
    assert.equal(stopped.choices[0].message.content, whole.slice(0, whole.indexOf(word)));
    assert.equal(stopped.choices[0].finish_reason, "stop");
    assert.equal((await chat({ n: 2, seed: 3, max_tokens: 8 })).choices.length, 2);
  },

  async check_bad_request() {
    const error = await rejected(OpenAI.BadRequestError, () => chat({ temperature: 7 }));
    assert.equal(error.code, "invalid_value");
    assert.equal(error.param, "temperature");
    assert.ok(error.requestID);
    // Without encoding_format the package asks for base64, so this is what every user of it sends.
    const refused = await rejected(OpenAI.BadRequestError, () => client.embeddings.create({ model: MODEL, input: "a" }));
    assert.equal(refused.code, "unsupported_model");
  },

  async check_unknown_model_is_not_found() {
    const error = await rejected(OpenAI.NotFoundError, () => chat({ model: "gpt-4o" }));
    assert.equal(error.code, "model_not_found");
  },

  async check_deadline_in_a_stream_throws_with_its_code() {
    const options = { headers: { "X-Request-Timeout": "1" } };
    const error = await rejected(OpenAI.APIError, async () => {
      const body = { model: MODEL, messages, stream: true, max_tokens: 4000, ignore_eos: true };
      for await (const _ of await client.chat.completions.create(body, options));
    });
    assert.equal(error.code, "deadline_exceeded");
  },

  async check_authentication() {
    const wrong = new OpenAI({ baseURL: `${KEYED_REST}/v1`, apiKey: "wrong", maxRetries: 0 });
    const error = await rejected(OpenAI.AuthenticationError, () => wrong.models.list());
    assert.equal(error.code, "invalid_api_key");
    const right = new OpenAI({ baseURL: `${KEYED_REST}/v1`, apiKey: KEY, maxRetries: 0 });
    assert.ok((await right.completions.create({ model: MODEL, prompt, max_tokens: 2 })).choices.length);
  },
};

async function main() {
  for (const [check, run] of Object.entries(checks)) {
    const error = await run().then(() => null, (failure) => failure.stack);
    console.log(JSON.stringify({ check, error }));
  }
}

main();
