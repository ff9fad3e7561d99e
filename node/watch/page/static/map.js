// The map of nodes and links; a matrix where there are many nodes.

import * as format from "./format.js";
import { colour, html, svg } from "./svg.js";

const MOST_ON_MAP = 16;
const SIZE = 520;

export function drawMap(place, hint, found, sites, choose) {
  const small = found.nodes.length <= MOST_ON_MAP;
  hint.textContent = small
    ? "Width: the shaped rate. Colour: how busy the link is. Red outline: this host made it late. Click one to choose it."
    : "A row for each sender, a column for each receiver. Colour: how busy the link is. A red frame: this host made it late.";
  place.replaceChildren(small ? asMap(found, sites, choose) : asMatrix(found, choose));
}

function words(link) {
  const late = link.late > 0 ? `, late by ${format.percent(link.late)}` : "";
  return `${link.source} → ${link.target}: ${format.rate(link.rate_bps)}, ${format.seconds(link.latency_s)}, busy ${format.percent(link.busy)}${late}`;
}

function asMap(found, sites, choose) {
  const names = inSites(found.nodes.map((node) => node.name), sites);
  const radius = SIZE / 2 - 70;
  const at = new Map(names.map((name, index) => {
    const angle = (2 * Math.PI * index) / names.length - Math.PI / 2;
    return [name, [SIZE / 2 + radius * Math.cos(angle), SIZE / 2 + radius * Math.sin(angle)]];
  }));
  const picture = svg("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, width: "100%", role: "img", "aria-label": "nodes and links" });
  for (const site of sites) picture.append(...siteBox(site, at));
  for (const link of found.links) {
    if (at.has(link.source) && at.has(link.target)) picture.append(...arrow(link, at, choose));
  }
  for (const node of found.nodes) picture.append(...disc(node, at.get(node.name)));
  return picture;
}

function inSites(names, sites) {
  const placed = sites.flatMap((site) => site.nodes.filter((name) => names.includes(name)));
  return [...new Set([...placed, ...names])];
}

function siteBox(site, at) {
  const points = site.nodes.filter((name) => at.has(name)).map((name) => at.get(name));
  if (!points.length) return [];
  const [left, right] = [Math.min(...points.map(([x]) => x)) - 45, Math.max(...points.map(([x]) => x)) + 45];
  const [top, bottom] = [Math.min(...points.map(([, y]) => y)) - 45, Math.max(...points.map(([, y]) => y)) + 45];
  const label = svg("text", { x: left + 6, y: top + 14, class: "dim" }, site.name);
  return [svg("rect", { x: left, y: top, width: right - left, height: bottom - top, rx: 8, class: "site" }), label];
}

function width(link) {
  if (link.rate_bps === null) return 6;
  return link.rate_bps === 0 ? 1 : Math.min(6, Math.max(1.2, Math.log10(link.rate_bps / 1e5)));
}

function arrow(link, at, choose) {
  // The two directions of a pair bend away from each other. A wide line that is not seen takes the clicks.
  const [[x1, y1], [x2, y2]] = [at.get(link.source), at.get(link.target)];
  const [dx, dy] = [x2 - x1, y2 - y1];
  const long = Math.hypot(dx, dy) || 1;
  const [ux, uy] = [dx / long, dy / long];
  const [bend, away] = [Math.min(24, 0.12 * long), 5];
  const from = [x1 + 26 * ux - away * uy, y1 + 26 * uy + away * ux];
  const to = [x2 - 26 * ux - away * uy, y2 - 26 * uy + away * ux];
  const middle = [(x1 + x2) / 2 - 2 * bend * uy, (y1 + y2) / 2 + 2 * bend * ux];
  const d = `M ${from.join(" ")} Q ${middle.join(" ")} ${to.join(" ")}`;
  const parts = [];
  if (link.late > 0) parts.push(svg("path", { d, fill: "none", stroke: "var(--bad)", "stroke-width": width(link) + 4, opacity: 0.5 }));
  parts.push(svg("path", {
    d, fill: "none", stroke: colour(link.busy), "stroke-width": width(link), "stroke-dasharray": link.rate_bps === 0 ? "3 5" : "none",
  }));
  parts.push(svg("circle", { cx: to[0], cy: to[1], r: 2 + width(link) / 2, fill: colour(link.busy) }));
  parts.push(svg("path", {
    d, fill: "none", stroke: "transparent", "stroke-width": 14, class: "link", "data-link": `${link.source} ${link.target}`,
    onclick: () => choose(link.source, link.target),
  }, svg("title", {}, words(link))));
  return parts;
}

function disc(node, [x, y]) {
  const shape = svg("circle", { cx: x, cy: y, r: 24, class: node.there ? "node" : "node gone" });
  const words = `${node.name}: sends ${format.rate(node.sent_bps)}, memory ${format.bytes(node.rss_bytes)}`;
  shape.append(svg("title", {}, words));
  const name = svg("text", { x, y: y + 4, "text-anchor": "middle" }, node.name.replace(/^node-/, ""));
  const below = svg("text", { x, y: y + 38, "text-anchor": "middle", class: "dim" }, format.rate(node.sent_bps ?? 0).replace("cut", "silent"));
  return [shape, name, below];
}

function asMatrix(found, choose) {
  const names = found.nodes.map((node) => node.name);
  const cell = Math.max(6, Math.floor(480 / names.length));
  const place = new Map(names.map((name, index) => [name, index]));
  const size = 60 + cell * names.length;
  const picture = svg("svg", { viewBox: `0 0 ${size} ${size}`, width: "100%", role: "img", "aria-label": "links by sender and receiver" });
  for (const link of found.links) {
    const [row, column] = [place.get(link.source), place.get(link.target)];
    if (row === undefined || column === undefined) continue;
    picture.append(svg("rect", {
      x: 60 + cell * column, y: 60 + cell * row, width: cell - 1, height: cell - 1, class: "link",
      fill: link.rate_bps === 0 ? "var(--line)" : colour(link.busy), stroke: link.late > 0 ? "var(--bad)" : "none",
      "data-link": `${link.source} ${link.target}`, onclick: () => choose(link.source, link.target),
    }, svg("title", {}, words(link))));
  }
  const step = Math.ceil(names.length / 16);
  names.forEach((name, index) => {
    if (index % step) return;
    picture.append(svg("text", { x: 55, y: 60 + cell * (index + 0.8), "text-anchor": "end", class: "dim" }, name));
    picture.append(svg("text", {
      x: 0, y: 0, class: "dim", transform: `translate(${60 + cell * (index + 0.8)} 55) rotate(-90)`,
    }, name));
  });
  return html("div", {}, picture);
}
