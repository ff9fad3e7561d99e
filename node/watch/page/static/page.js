// The page of one run: it opens a session, shows the run, and follows what changes.

import { get, post, Refused, useSession } from "./api.js";
import { Chart } from "./charts.js";
import * as format from "./format.js";
import { drawMap } from "./map.js";
import { drawEnergy, drawLegend, drawParts, drawTimeline } from "./panels.js";
import { html } from "./svg.js";

const by = (id) => document.getElementById(id);
let run = null; // what is the same for the whole run
let columns = null; // the charts' data
const kept = { heldout: [], energy: [], marks: [] }; // what is there at some steps only
const MOST_POINTS = 6000; // with more, the page is opened anew: the server has them in fewer
let charts = null;
let stream = null;

async function start() {
  const secret = decodeURIComponent(location.hash.slice(1));
  if (secret) {
    history.replaceState(null, "", location.pathname); // the secret is not to stay in sight, nor in bookmarks
    try {
      useSession(await post("/api/login", { secret }));
    } catch (error) {
      return askForSecret(error.message);
    }
  }
  return open();
}

function askForSecret(message) {
  by("login").hidden = false;
  by("login-error").textContent = message;
}

by("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    useSession(await post("/api/login", { secret: by("secret").value.trim() }));
    by("login").hidden = true;
    await open();
  } catch (error) {
    askForSecret(error.message);
  }
});

async function open() {
  let found;
  try {
    found = await get("/api/run");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return askForSecret("");
    return warn(error.message);
  }
  run = found.run;
  columns = found.series;
  for (const name of Object.keys(kept)) kept[name] = [];
  useSession(found.session);
  document.title = `${run.name} · Isthmus`;
  by("title").textContent = run.title;
  by("subtitle").textContent = run.subtitle;
  document.querySelector("main").hidden = false;
  by("controls").hidden = !(found.session && found.session.controls);
  drawLegend(by("legend"), run.parts);
  charts = charts || makeCharts();
  show(found);
  await listTraces();
  follow(found.header.step);
}

function makeCharts() {
  return {
    loss: new Chart(by("loss"), [
      { name: "training loss", colour: "#2a7fb8", key: "loss" },
      { name: "held-out loss", colour: "#d9822b", key: "heldout", points: true },
    ], [{ scale: "y", label: "nats a token" }]),
    speed: new Chart(by("speed"), [
      { name: "tokens/s", colour: "#4c9a5b", key: "tokens_per_s" },
      { name: "exposed communication, %", colour: "#c23030", key: "exposed", scale: "share" },
    ], [{ scale: "y", label: "tokens/s" }, { scale: "share", side: 1, label: "%" }]),
  };
}

function follow(step) {
  if (stream) stream.close();
  stream = new EventSource(`/api/stream?after=${step}`);
  stream.addEventListener("news", (event) => {
    const news = JSON.parse(event.data);
    if (news.reload || columns.step.length > MOST_POINTS) return open();
    for (const point of news.points) {
      for (const name of Object.keys(columns)) columns[name].push(point[name] ?? null);
    }
    show(news);
  });
  stream.onopen = () => warn("");
  stream.onerror = () => warn("No connection to the page's server; trying again.");
}

function show(found) {
  for (const name of Object.keys(kept)) kept[name].push(...found[name]);
  const header = found.header;
  const figures = [
    ["step", `${header.step} of ${header.steps}`], ["to go", format.duration(header.eta_s)],
    ...(header.phase ? [["phase", header.phase]] : []),
    ["loss", format.number(header.loss)], ["held-out", format.number(header.heldout_loss)],
    ["tokens/s", header.tokens_per_s === null ? "–" : Math.round(header.tokens_per_s).toLocaleString("en")],
    ["bytes saved", format.percent(header.saved)], ["generation", String(header.generation)],
    ["network", header.untrusted ? "untrusted" : "kept"],
    ...(header.refused_connections ? [["strangers refused", header.refused_connections.toLocaleString("en")]] : []),
    ...(header.refused_requests ? [["requests refused", header.refused_requests.toLocaleString("en")]] : []),
    ...(header.skipped ? [["steps skipped", String(header.skipped)]] : []),
  ];
  by("figures").replaceChildren(...figures.map(([label, value]) =>
    html("span", {}, `${label} `, html("b", { "data-figure": label }, value))));
  by("progress").max = header.steps;
  by("progress").value = header.step;
  warn(found.problem || header.untrusted || "");
  drawMap(by("map"), by("map-hint"), found, run.sites, choose);
  drawParts(by("parts"), found.nodes, run.parts);
  drawEnergy(by("energy"), kept.energy);
  by("marks").textContent = kept.marks.length ? kept.marks.map((mark) => `${mark.text} (step ${mark.step})`).join("; ") : "none yet";
  fillChoices(found.nodes.map((node) => node.name));
  drawCharts();
}

function drawCharts() {
  const heldout = new Map(kept.heldout);
  const steps = [...new Set([...columns.step, ...heldout.keys()])].sort((one, other) => one - other);
  const place = new Map(columns.step.map((step, index) => [step, index]));
  const at = (name, scale = 1) => steps.map((step) => {
    const value = place.has(step) ? columns[name][place.get(step)] : null;
    return value === null || value === undefined ? null : scale * value;
  });
  charts.loss.show({ step: steps, loss: at("loss"), heldout: steps.map((step) => heldout.get(step) ?? null) }, kept.marks);
  charts.speed.show({ step: steps, tokens_per_s: at("tokens_per_s"), exposed: at("exposed", 100) }, kept.marks);
}

function warn(message) {
  by("warning").textContent = message;
  by("warning").hidden = !message;
}

// Controls.

function fillChoices(names) {
  for (const select of [by("from"), by("to")]) {
    if (select.options.length === names.length && names.every((name, index) => select.options[index].value === name)) continue;
    const before = select.value;
    select.replaceChildren(...names.map((name) => html("option", { value: name }, name)));
    select.value = names.includes(before) ? before : names[select === by("to") ? names.length - 1 : 0];
  }
}

function choose(source, target) {
  by("from").value = source;
  by("to").value = target;
}

by("kind").addEventListener("change", () => {
  const kind = by("kind").value;
  by("amount-label").hidden = kind !== "rate" && kind !== "latency";
  by("amount").placeholder = kind === "rate" ? "50 Mbit/s" : "80 ms";
  by("from-label").hidden = by("to-label").hidden = kind === "reset";
});

by("change").addEventListener("submit", async (event) => {
  event.preventDefault();
  const kind = by("kind").value;
  const pair = [by("from").value, by("to").value];
  const wanted = {
    cut: () => ({ cut: pair }), heal: () => ({ heal: pair }), reset: () => ({ reset: true }),
    rate: () => ({ rate: by("amount").value, pair }), latency: () => ({ latency: by("amount").value, pair }),
  }[kind]();
  by("apply").disabled = true;
  by("answer").className = "";
  by("answer").textContent = "asking the coordinator …";
  by("confirmations").replaceChildren();
  try {
    const answer = await post("/api/network", wanted);
    by("answer").textContent = `At step ${answer.step}: ${answer.network}`;
    by("confirmations").replaceChildren(
      ...answer.confirmed.map((name) => html("li", { "data-confirmed": name }, `${name} has confirmed`)),
      ...answer.silent.map((name) => html("li", { class: "error" }, `${name}: no word yet; it changes as soon as it hears`)));
  } catch (error) {
    by("answer").className = "error";
    by("answer").textContent = error.message;
  } finally {
    by("apply").disabled = false;
  }
});

// One recorded step.

async function listTraces() {
  const { steps } = await get("/api/trace");
  by("trace-step").replaceChildren(html("option", { value: "" }, steps.length ? "choose" : "none recorded"),
    ...steps.map((step) => html("option", { value: step }, String(step))));
}

by("trace-step").addEventListener("change", async () => {
  const step = by("trace-step").value;
  by("timeline").replaceChildren();
  if (step) drawTimeline(by("timeline"), await get(`/api/trace/${step}`));
});

start();
