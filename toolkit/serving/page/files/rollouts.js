// What a step of a run left beside its metrics: completions, and the load of its experts.
import { element } from "./blocks.js";
import { shownNumber } from "./charts.js";

// The completions of a step as a column, each prompt once above its own.
export function column(details) {
  const made = element("section", "step");
  const title = element("h2", "");
  title.append(element("span", "", `step ${details.step}`));
  made.append(title);
  const completions = details.completions ?? [];
  if (!completions.length) made.append(element("p", "hint", "no completions of this step"));
  completions.forEach((one, at) => {
    if (one.prompt !== completions[at - 1]?.prompt) made.append(element("p", "prompt", one.prompt));
    const reply = element("article", "reply");
    const about = [`reward ${shownNumber(one.reward)}`, `${one.tokens} tokens`, `log-probability ${shownNumber(one.logprob)}`, one.finish_reason];
    reply.append(element("div", "tokens", one.completion), element("footer", "", about.join(", ")));
    made.append(reply);
  });
  return made;
}

// A row of cells for each layer; a cell is the darker the more of its layer's tokens an expert had.
export function loadMap(layers) {
  const made = element("div", "load");
  made.append(...layers.map((loads, layer) => {
    const most = Math.max(...loads, 1);
    const mean = loads.reduce((sum, load) => sum + load, 0) / loads.length || 1;
    const row = element("div", "");
    row.role = "img";
    row.ariaLabel = `layer ${layer}: the busiest expert has ${(most / mean).toFixed(2)} times the mean`;
    row.append(...loads.map((load, expert) => {
      const cell = element("span", "");
      cell.title = `layer ${layer}, expert ${expert}: ${load.toLocaleString("en")} tokens, ${(load / mean).toFixed(2)} times the mean`;
      cell.style.setProperty("opacity", (0.08 + 0.92 * load / most).toFixed(3));
      return cell;
    }));
    return row;
  }));
  return made;
}
