// The time of a step by node, the energy of the subspaces, and one recorded step.

import * as format from "./format.js";
import { html, svg } from "./svg.js";

export const COLOURS = {
  compute: "#4c9a5b", exposed_forward: "#d9822b", exposed_backward: "#c25a2b", averaging: "#7a5bb8",
  barrier: "#8a94a0", checkpoint: "#b89b2a", evaluation: "#3aa0b8",
};

export function drawLegend(place, parts) {
  place.replaceChildren(...parts.map((part) => {
    const box = html("i");
    box.style.background = COLOURS[part] || "#888888";
    return html("span", {}, box, part.replace("_", ", "));
  }));
}

export function drawParts(place, nodes, parts) {
  const sums = nodes.map((node) => parts.reduce((sum, part) => sum + (node.parts_s[part] || 0), 0));
  const most = Math.max(...sums, 1e-9);
  const high = nodes.length > 16 ? 10 : 22;
  const picture = svg("svg", { viewBox: `0 0 560 ${nodes.length * high + 4}`, width: "100%", role: "img", "aria-label": "time of a step by node" });
  nodes.forEach((node, row) => {
    let x = 70;
    if (high > 12 || row % 4 === 0) {
      picture.append(svg("text", { x: 64, y: row * high + high * 0.7, "text-anchor": "end", class: "dim" }, node.name));
    }
    for (const part of parts) {
      const seconds = node.parts_s[part] || 0;
      const wide = (420 * seconds) / most;
      if (wide < 0.2) continue;
      picture.append(svg("rect", { x, y: row * high + 2, width: wide, height: high - 4, fill: COLOURS[part] || "#888888" },
        svg("title", {}, `${node.name}, ${part.replace("_", " ")}: ${format.seconds(seconds)}`)));
      x += wide;
    }
    if (high > 12) picture.append(svg("text", { x: x + 6, y: row * high + high * 0.7, class: "dim" }, format.seconds(sums[row])));
  });
  place.replaceChildren(picture);
}

export function drawEnergy(place, energy) {
  if (!energy.length) {
    place.textContent = "No evaluation with compressed layers yet.";
    return;
  }
  const keys = [...new Set(energy.flatMap(([, kept]) => Object.keys(kept)))].sort((one, other) =>
    parseInt(one, 10) - parseInt(other, 10) || one.localeCompare(other));
  const wide = Math.max(2, Math.min(28, Math.floor(480 / energy.length)));
  const picture = svg("svg", { viewBox: `0 0 560 ${keys.length * 14 + 22}`, width: "100%", role: "img", "aria-label": "energy kept by layer and step" });
  keys.forEach((key, row) => {
    picture.append(svg("text", { x: 36, y: row * 14 + 11, "text-anchor": "end", class: "dim" }, key));
    energy.forEach(([step, kept], column) => {
      if (!(key in kept)) return;
      const share = Math.min(1, Math.max(0, kept[key]));
      picture.append(svg("rect", {
        x: 42 + column * wide, y: row * 14, width: wide - 0.5, height: 13, fill: `hsl(205 70% ${92 - 62 * share}%)`,
      }, svg("title", {}, `step ${step}, layer ${key}: ${format.percent(kept[key])}`)));
    });
  });
  const [first, last] = [energy[0][0], energy[energy.length - 1][0]];
  picture.append(svg("text", { x: 42, y: keys.length * 14 + 16, class: "dim" }, `step ${first} to ${last}`));
  place.replaceChildren(picture);
}

const SPANS = { forward: "#4c9a5b", backward: "#2a7fb8", optimizer: "#7a5bb8", go: "#8a94a0", evaluate: "#3aa0b8", save: "#b89b2a" };

export function drawTimeline(place, found) {
  const trainer = 1;
  const events = found.traceEvents.filter((event) => event.ph === "X" && event.tid === trainer);
  const ranks = [...new Set(events.map((event) => event.pid))].sort((one, other) => one - other);
  const end = Math.max(...events.map((event) => event.ts + event.dur), 1);
  const lanes = 3;
  const high = 14;
  const picture = svg("svg", { viewBox: `0 0 1000 ${ranks.length * (lanes * high + 8) + 20}`, width: "100%", role: "img", "aria-label": "one step by node" });
  ranks.forEach((rank, row) => {
    const top = row * (lanes * high + 8);
    picture.append(svg("text", { x: 2, y: top + 12, class: "dim" }, `rank ${rank}`));
    const open = [];
    for (const event of events.filter((one) => one.pid === rank)) {
      while (open.length && open[open.length - 1] <= event.ts + 1e-6) open.pop();
      const lane = Math.min(open.length, lanes - 1);
      open.push(event.ts + event.dur);
      const wide = (930 * event.dur) / end;
      if (wide < 0.15) continue;
      picture.append(svg("rect", {
        x: 60 + (930 * event.ts) / end, y: top + lane * high, width: wide, height: high - 1.5,
        fill: SPANS[event.name.split(/[ ,]/)[0]] || (/wait|room/.test(event.name) ? "#d9822b" : "#a3adb8"),
      }, svg("title", {}, `${event.name}: ${format.seconds(event.dur / 1e6)}`)));
    }
  });
  picture.append(svg("text", { x: 60, y: ranks.length * (lanes * high + 8) + 12, class: "dim" }, `0 to ${format.seconds(end / 1e6)}`));
  place.replaceChildren(picture);
}
