// The page: what is asked, of which models, and what they reply.
import { metrics, models, tokenize } from "./api.js";
import { showBlocks } from "./blocks.js";
import { Reply } from "./reply.js";
import { ToolReply } from "./tools.js";

const at = (name) => document.getElementById(name);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const REFRESH = 1000; // milliseconds between readings of the engine

let mode = "chat";
let chat = [];
let running = null;
let last = null; // of the engine's generated tokens: [time, count]

function say(text, failed = false) {
  at("state").textContent = text;
  at("state").className = failed ? "error" : "";
}

function settings() {
  const found = Object.fromEntries(NUMBERS.filter((name) => at(name).value !== "").map((name) => [name, Number(at(name).value)]));
  if (at("stop-text").value) found.stop = [at("stop-text").value];
  const schema = at("schema").value.trim();
  if (schema) found.response_format = { type: "json_schema", json_schema: { name: "reply", schema: JSON.parse(schema) } };
  return found;
}

function chosenModels() {
  return [...document.querySelectorAll("#models input:checked")].map((input) => input.value);
}

function showMessages() {
  at("messages").replaceChildren(...chat.map(({ role, content, tool_calls }) => {
    const item = document.createElement("li");
    item.dataset.role = role;
    const calls = (tool_calls ?? []).map((call) => `${call.function.name}(${call.function.arguments})`);
    item.textContent = [content, ...calls].filter(Boolean).join("\n");
    return item;
  }));
}

async function run(replies) {
  stop();
  const mine = (running = new AbortController());
  at("stop").disabled = false;
  say("running");
  try {
    await Promise.all(replies.map((reply) => reply.run(mine.signal)));
    say("");
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
  if (running === mine) {
    at("stop").disabled = true;
    running = null;
  }
}

function stop() {
  running?.abort();
}

// The functions that a chat may call; none where it has none.
function tools() {
  const given = mode === "chat" ? at("tools").value.trim() : "";
  return (given ? JSON.parse(given) : []).map((one) => (one.function ? one : { type: "function", function: one }));
}

async function ask() {
  const text = at("prompt").value;
  if (!text || !chosenModels().length) return say(text ? "Choose a model." : "Write something.", true);
  if (mode === "chat") takeReply();
  await send([...chat, { role: "user", content: text }], text);
}

// Ask the chosen models, with messages or with a text.
async function send(messages, text) {
  const names = chosenModels();
  try {
    const what = mode === "chat" ? { messages } : { prompt: text };
    const given = settings();
    const functions = tools();
    if (functions.length && at("required").checked && messages.at(-1).role === "user") given.tool_choice = "required";
    const replies = await Promise.all(names.map(async (name) => (functions.length
      ? new ToolReply(name, messages, functions, given, answer)
      : new Reply(name, await tokenize(what, name), given, [], branch))));
    if (mode === "chat") {
      chat = messages;
      at("prompt").value = "";
      showMessages();
    }
    at("replies").replaceChildren(...replies.map((reply) => reply.element));
    replies.forEach((reply) => { reply.element.reply = reply; });
    await run(replies);
  } catch (error) {
    say(error.message, true);
  }
}

// The first reply that is shown becomes a message of the chat.
function takeReply() {
  const reply = at("replies").firstElementChild?.reply;
  if (reply && chat.length && chat.at(-1).role !== "assistant") chat = [...chat, reply.message];
  at("replies").replaceChildren();
}

// The results of a reply's calls, which the models get with it.
function answer(reply, results) {
  return send([...chat, reply.message, ...results]);
}

async function branch(from, kept) {
  const reply = new Reply(from.model, from.promptIds, from.settings, kept, branch);
  reply.element.reply = reply;
  at("replies").prepend(reply.element);
  await run([reply]);
  reply.body.children[kept.length - 1]?.focus();
}

async function listModels() {
  const served = await models();
  const checked = new Set(chosenModels());
  const labels = served.map(({ id, parent, weight_version }, index) => {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "checkbox", value: id, checked: checked.size ? checked.has(id) : index === 0 });
    const name = document.createElement("span");
    name.textContent = parent ? `${id} (adapter)` : `${id}, version ${weight_version}`;
    label.append(name, input);
    return label;
  });
  at("models").replaceChildren(at("models").firstElementChild, ...labels);
}

async function showEngine() {
  const found = await metrics();
  const now = [performance.now(), found.generation_tokens_total ?? 0];
  const speed = last ? (1000 * (now[1] - last[1])) / (now[0] - last[0]) : 0;
  last = now;
  const rows = {
    running: found.num_requests_running, waiting: found.num_requests_waiting,
    "KV cache in use": `${(100 * (found.kv_cache_usage_perc ?? 0)).toFixed(1)} %`,
    "blocks cached": `${found.num_cached_blocks ?? 0} of ${found.num_blocks ?? 0}`,
    "prefix tokens found": found.prefix_cache_hits_total, preemptions: found.num_preemptions_total,
    "tokens per second": speed.toFixed(0),
  };
  at("engine").replaceChildren(...Object.entries(rows).flatMap(([name, value]) => {
    const [term, number] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    number.textContent = value ?? 0;
    return [term, number];
  }));
}

async function refresh() {
  await showEngine();
  if (at("state-blocks").open) await showBlocks(at("blocks"));
}

function choose(next) {
  mode = next;
  for (const name of ["chat", "complete"]) at(`tab-${name}`).ariaSelected = String(name === mode);
  at("prompt-label").textContent = mode === "chat" ? "Message" : "Prompt";
  at("messages").hidden = mode !== "chat";
  at("replies").replaceChildren();
}

at("tab-chat").addEventListener("click", () => choose("chat"));
at("tab-complete").addEventListener("click", () => choose("complete"));
at("run").addEventListener("click", ask);
at("stop").addEventListener("click", stop);
at("clear").addEventListener("click", () => { stop(); chat = []; showMessages(); at("replies").replaceChildren(); at("prompt").focus(); });
at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  listModels().then(() => say(""), (error) => say(error.message, true));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  if (event.key === "Escape") stop();
});
listModels().catch((error) => say(error.message, true));
at("state-blocks").addEventListener("toggle", () => refresh().catch((error) => say(error.message, true)));
refresh().catch(() => {});
setInterval(() => { if (!document.hidden) refresh().catch(() => {}); }, REFRESH);
