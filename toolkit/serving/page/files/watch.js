// The page of a training run: curves of its log, and what it kept of the chosen step.
import { runDetails, runSteps } from "./api.js";
import { element, showGroups } from "./blocks.js";
import { Chart, shownNumber } from "./charts.js";
import { column, loadMap } from "./rollouts.js";

const at = (name) => document.getElementById(name);
const REFRESH = 1000; // milliseconds between looks at the run
const FIRST = ["loss", "reward", "accuracy", "mismatch_kl", "mismatch_bits", "tokens_per_second", "rollout_tokens_per_second", "expert_load_max"];
const NOT_CURVES = ["step", "seconds", "num_tokens", "weight_version"];

let lines = []; // of the log
let position = { generation: -1, count: 0, stride: 1 };
let detailed = []; // steps with details
let chosen = null; // a step; null follows the newest
let kept = []; // details of steps that stay beside the chosen one's
let shown = null; // details of the chosen step
const charts = new Map();
const details = new Map(); // by step

const current = () => chosen ?? lines.at(-1)?.step;

function say(text, failed = false) {
  at("state").textContent = text;
  at("state").className = failed ? "error" : "";
}

async function refresh() {
  const found = await runSteps(position.generation, position.count);
  if (found.fresh) {
    [lines, kept, shown, chosen] = [[], [], null, null];
    details.clear();
  }
  lines.push(...found.lines);
  position = { generation: found.generation, count: found.count, stride: Math.max(found.stride, found.fresh ? 1 : position.stride) };
  detailed = found.detailed_steps;
  showRun(found.run);
  if (found.fresh || found.lines.length || needed() !== shown?.step) {
    listNames();
    await show();
  }
}

function showRun(run) {
  const last = lines.at(-1)?.step ?? 0;
  at("run").textContent = [run.name, run.objective].filter(Boolean).join(", ");
  document.title = `${run.name}: ${last}`;
  const state = run.finished ? "finished" : last ? "running or stopped" : run.nested.length ? `before its first step (${run.nested.join(", ")})` : "before its first step";
  const thinned = position.stride > 1 ? `, every ${position.stride}th step is shown` : "";
  say(`step ${last}${run.max_steps ? ` of ${run.max_steps}` : ""}, ${state}${thinned}`);
}

function names() {
  const found = new Set(lines.flatMap((line) => Object.keys(line)).filter((name) => !NOT_CURVES.includes(name)));
  return [...FIRST.filter((name) => found.has(name)), ...[...found].filter((name) => !FIRST.includes(name))];
}

// A box for each metric; those that have been looked at stay as they are.
function listNames() {
  const known = new Map([...at("names").querySelectorAll("input")].map((input) => [input.value, input.checked]));
  const all = names();
  if (all.length === known.size && all.every((name) => known.has(name))) return;
  at("names").replaceChildren(...all.map((name) => {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "checkbox", value: name, checked: known.get(name) ?? FIRST.includes(name) });
    input.addEventListener("change", showCharts);
    label.append(element("span", "", name), input);
    return label;
  }));
}

function showCharts() {
  const wanted = [...at("names").querySelectorAll("input:checked")].map((input) => input.value);
  for (const name of wanted) if (!charts.has(name)) charts.set(name, new Chart(name, choose));
  const elements = wanted.map((name) => charts.get(name).element);
  if (elements.some((one, index) => at("charts").children[index] !== one) || at("charts").children.length !== elements.length) {
    at("charts").replaceChildren(...elements);
  }
  for (const name of wanted) charts.get(name).show(lines, current());
}

// The newest step with details that is not later than the chosen one.
function needed() {
  return detailed.filter((step) => step <= current()).at(-1);
}

async function show() {
  const index = lines.findIndex((line) => line.step === current());
  Object.assign(at("step"), { max: Math.max(lines.length - 1, 0), value: Math.max(index, 0) });
  at("step").ariaValueText = `step ${current() ?? "none"}`;
  at("values").replaceChildren(...Object.entries(lines[index] ?? {}).flatMap(([name, value]) => (
    [element("dt", "", name), element("dd", "", shownNumber(value))])));
  showCharts();
  const step = needed();
  if (step !== undefined && !details.has(step)) details.set(step, await runDetails(step));
  if (step !== needed()) return;
  shown = details.get(step) ?? null;
  showDetails();
}

function showDetails() {
  const columns = shown && !kept.includes(shown) ? [...kept, shown] : kept;
  at("steps").replaceChildren(...columns.filter((one) => one.completions).map(column));
  at("blocks-part").hidden = !shown?.groups;
  if (shown?.groups) showGroups(at("blocks"), shown.groups);
  at("load-part").hidden = !shown?.expert_load;
  if (shown?.expert_load) at("load").replaceChildren(loadMap(shown.expert_load));
  at("clear").disabled = !kept.length;
}

function choose(step) {
  chosen = step === lines.at(-1)?.step ? null : step;
  show().catch((error) => say(error.message, true));
}

// The next of ``steps`` in a direction from the chosen one.
function move(steps, direction) {
  const next = direction > 0 ? steps.find((step) => step > current()) : steps.filter((step) => step < current()).at(-1);
  if (next !== undefined) choose(next);
}

function keep() {
  if (shown && !kept.includes(shown)) kept.push(shown);
  showDetails();
}

function drop() {
  kept = [];
  showDetails();
}

const KEYS = {
  ArrowLeft: (event) => move(event.shiftKey ? detailed : lines.map((line) => line.step), -1),
  ArrowRight: (event) => move(event.shiftKey ? detailed : lines.map((line) => line.step), 1),
  Home: () => choose(lines[0]?.step),
  End: () => choose(lines.at(-1)?.step),
  c: keep,
  Escape: drop,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS) || !lines.length) return;
  event.preventDefault();
  KEYS[event.key](event);
});
at("step").addEventListener("input", () => choose(lines[Number(at("step").value)]?.step));
at("keep").addEventListener("click", keep);
at("clear").addEventListener("click", drop);

async function watch() {
  if (!document.hidden) await refresh().catch((error) => say(error.message, true));
  setTimeout(watch, REFRESH);
}
watch();
