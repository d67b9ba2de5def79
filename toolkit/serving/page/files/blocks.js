// The engine's blocks as cells, and its prefix tree as runs of blocks.
import { blocks } from "./api.js";

export function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function strip(group) {
  const cells = element("div", "cells");
  const held = group.cells.reduce((sum, [count]) => sum + count, 0);
  const cached = group.cells.reduce((sum, [, count]) => sum + count, 0);
  cells.role = "img";
  cells.ariaLabel = `${held} blocks held, ${cached} cached; a cell is ${group.per_cell}`;
  cells.append(...group.cells.map(([inUse, kept]) => element("span", inUse ? "held" : kept ? "cached" : "free")));
  return [cells, element("p", "hint", cells.ariaLabel)];
}

function tree(group) {
  const list = element("ol", "runs");
  list.append(...group.runs.map((run) => {
    const of = `${run.adapter || "model"}, version ${run.version}`;
    const item = element("li", run.held ? "held" : "cached", `${run.blocks * group.block_size} tokens${run.held ? "" : ", cached"}`);
    item.title = of;
    item.style.setProperty("--depth", run.depth);
    if (!run.depth) item.append(element("small", "", ` ${of}`));
    return item;
  }));
  return list;
}

// The groups of blocks of an engine, now or in a rollout.
export function showGroups(into, groups) {
  into.replaceChildren(...groups.flatMap((group) => [...strip(group), tree(group)]));
}

export async function showBlocks(into) {
  showGroups(into, (await blocks()).groups);
}
