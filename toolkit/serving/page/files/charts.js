// A curve over the steps of a run: each value, their running mean, and the chosen step.
import { element } from "./blocks.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [320, 130, 44, 14, 6];
const MEAN_SHARE = 50; // the running mean is over this part of the steps

function drawn(name, attributes) {
  const made = document.createElementNS(document.documentElement.namespaceURI.replace("1999/xhtml", "2000/svg"), name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function shownNumber(value) {
  if (value === null || value === undefined) return "none";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 0.001 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

// Means of the last ``width`` values, without those that are none.
function means(values, width) {
  const kept = [];
  let sum = 0;
  return values.map((value) => {
    if (value !== null) {
      kept.push(value);
      sum += value;
      if (kept.length > width) sum -= kept[kept.length - width - 1];
    }
    return kept.length ? sum / Math.min(kept.length, width) : null;
  });
}

export class Chart {
  // name: of a metric. onChoose: takes a step.
  constructor(name, onChoose) {
    this.name = name;
    this.steps = [];
    this.element = element("figure", "chart");
    this.element.dataset.name = name;
    this.caption = element("figcaption", "");
    this.value = element("span", "value");
    this.caption.append(element("span", "", name), this.value);
    this.svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    this.svg.addEventListener("click", (event) => onChoose(this.nearest(event)));
    this.svg.addEventListener("mousemove", (event) => this.tell(this.nearest(event)));
    this.svg.addEventListener("mouseleave", () => this.tell(this.chosen));
    this.element.append(this.caption, this.svg);
  }

  nearest(event) {
    const place = this.svg.getBoundingClientRect();
    const share = ((event.clientX - place.left) / place.width * WIDTH - LEFT) / (WIDTH - LEFT);
    const wanted = this.first + share * (this.last - this.first);
    return this.steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best), this.steps[0]);
  }

  tell(step) {
    const at = this.steps.indexOf(step);
    this.value.textContent = at < 0 ? "" : `${shownNumber(this.values[at])} at ${step}`;
  }

  // lines: of the log. chosen: a step.
  show(lines, chosen) {
    const own = lines.filter((line) => this.name in line);
    this.chosen = chosen;
    this.steps = own.map((line) => line.step);
    this.values = own.map((line) => line[this.name]);
    [this.first, this.last] = [this.steps[0], Math.max(this.steps.at(-1), this.steps[0] + 1)];
    const finite = this.values.filter((value) => value !== null);
    if (!finite.length) return this.svg.replaceChildren();
    let [low, high] = finite.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [finite[0], finite[0]]);
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
    const x = (step) => LEFT + (step - this.first) / (this.last - this.first) * (WIDTH - LEFT);
    const y = (value) => TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);
    const path = (values) => {
      let [text, open] = ["", false];
      values.forEach((value, at) => {
        if (value !== null) text += `${open ? "L" : "M"}${x(this.steps[at]).toFixed(1)} ${y(value).toFixed(1)}`;
        open = value !== null;
      });
      return text;
    };
    const label = (at, text, anchor, down) => {
      const made = drawn("text", { x: at, y: down, "text-anchor": anchor });
      made.textContent = text;
      return made;
    };
    const parts = [
      drawn("path", { class: "axis", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH}` }),
      label(LEFT - 3, shownNumber(high), "end", TOP + 6), label(LEFT - 3, shownNumber(low), "end", HEIGHT - BOTTOM),
      label(LEFT, this.first, "start", HEIGHT - 3), label(WIDTH, this.steps.at(-1), "end", HEIGHT - 3),
      drawn("path", { class: "each", d: path(this.values) }),
      drawn("path", { class: "mean", d: path(means(this.values, Math.max(1, Math.floor(own.length / MEAN_SHARE)))) }),
    ];
    if (this.steps.includes(chosen)) parts.push(drawn("path", { class: "chosen", d: `M${x(chosen).toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}` }));
    this.svg.replaceChildren(...parts);
    const last = finite.at(-1);
    this.svg.setAttribute("aria-label", `${this.name}: ${shownNumber(last)} at the end, from ${shownNumber(low)} to ${shownNumber(high)}`);
    this.tell(chosen);
  }
}
