// The server's endpoints, as the page needs them. Paths are relative: a proxy may serve the page under a prefix.

export class ServerError extends Error {}

export function headers() {
  const key = sessionStorage.getItem("key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServerError(body?.error?.message ?? `The server answered ${response.status}.`);
}

export async function post(path, body, signal) {
  return checked(await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal }));
}

export async function models() {
  return (await (await checked(await fetch("v1/models", { headers: headers() }))).json()).data;
}

// The token ids of a prompt, or of messages in the model's chat template.
export async function tokenize(what, model) {
  return (await (await post("tokenize", { ...what, model })).json()).tokens;
}

const texts = new Map();

// The text of one token.
export async function detokenize(token, model) {
  if (!texts.has(token)) {
    texts.set(token, post("detokenize", { tokens: [token], model }).then((r) => r.json()).then((r) => r.prompt));
  }
  return texts.get(token);
}

// The chunks of a streamed completion, and of a streamed chat.
export const stream = (body, signal) => chunks("v1/completions", body, signal);
export const chatStream = (body, signal) => chunks("v1/chat/completions", body, signal);

async function* chunks(path, body, signal) {
  const response = await post(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new ServerError(chunk.error.message);
      yield chunk;
    }
  }
}

// The engine's blocks and its prefix tree.
export async function blocks() {
  return (await checked(await fetch("page/blocks", { headers: headers() }))).json();
}

// Of a training run: what its log has after ``after`` lines of a generation of the file, and what it kept of one step.
export async function runSteps(generation, after) {
  const path = `watch/steps?generation=${generation}&after=${after}`;
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function runDetails(step) {
  return (await checked(await fetch(`watch/details?step=${step}`, { headers: headers() }))).json();
}

// Gauges and counters of /metrics, by name; of those with labels the sum.
export async function metrics() {
  const found = {};
  for (const line of (await (await checked(await fetch("metrics"))).text()).split("\n")) {
    const match = /^toolkit:(\w+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (match) found[match[1]] = (found[match[1]] ?? 0) + Number(match[2]);
  }
  return found;
}
