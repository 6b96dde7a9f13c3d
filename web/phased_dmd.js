// The time line on the nodes of this pack: before a run from the widgets that lead to a node (the server answers with the
// plan), after it from what ran. Every node works without this file.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { describe } from "./graph.js";
import { draw, HEIGHT } from "./timeline.js";
import { localeOf, words } from "./words.js";

const ROUTE = "/phased_dmd/plan";
const PLANS = ["Steps", "Preset", "Boundary", "Sigmas", "Experts"].map((kind) => `PhasedDMDPlanFrom${kind}`);
const OTHERS = ["LoadExperts", "Experts", "ExpertsLoRA", "Sigmas", "Sampler", "PlanReport"].map((kind) => `PhasedDMD${kind}`);
const REPORT = "PhasedDMDPlanReport";
const FROM_HUB = "(Hub id)";
const TEXT_HEIGHT = 150;
const MARGIN = 10; // that the front end leaves above and below an element on a node
const WAIT_MS = 150;
let timer = null;

// The widget that a drag of a boundary changes, unless another node decides it.
const OWNED = { PhasedDMDPlanFromSteps: "steps", PhasedDMDPlanFromBoundary: "boundary" };

// What a drag of boundary k to step n changes, for the plan nodes that own it.
const MOVES = {
  PhasedDMDPlanFromSteps(node, plan, k, n) {
    const widget = node.widgets.find((each) => each.name === "steps");
    const counts = String(widget.value).split(",").map(Number);
    const before = counts.slice(0, k).reduce((a, b) => a + b, 0);
    const both = counts[k] + counts[k + 1];
    counts[k] = n - before;
    counts[k + 1] = both - counts[k];
    set(node, widget, counts.join(", "));
  },
  PhasedDMDPlanFromBoundary(node, plan, k, n) {
    const widget = node.widgets.find((each) => each.name === "boundary");
    const boundaries = plan.phases.slice(1).map((phase) => phase.start);
    boundaries[k] = plan.steps[n].sigma;
    set(node, widget, boundaries.map((each) => String(Math.ceil(each * 1e4 - 1e-6) / 1e4)).join(", "));
  },
};

function set(node, widget, value) {
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
  node.graph?.change?.();
  askSoon();
}

function show(node, answer) {
  const box = node.phasedTimeline;
  if (answer.error) {
    const line = document.createElement("div");
    line.className = "phased-dmd-error";
    line.style.cssText = "color: #ffb454; font-size: 12px; overflow: auto; max-height: 100%";
    line.textContent = answer.error;
    box.replaceChildren(line);
    if (node.phasedText) write(node, "");
    return;
  }
  const moved = MOVES[node.comfyClass];
  const owns = moved && !node.inputs?.some((input) => input.widget?.name === OWNED[node.comfyClass] && input.link != null);
  box.replaceChildren(draw(answer, words(app), owns ? (k, n) => moved(node, answer, k, n) : null));
}

function write(node, text) {
  node.phasedText.replaceChildren();
  for (const line of text.split("\n")) {
    const row = document.createElement("div");
    row.textContent = line;
    if (line.startsWith(words(app).warning)) row.style.color = "#ffb454";
    node.phasedText.append(row);
  }
}

async function ask(node) {
  const asked = JSON.stringify({ ...describe(node), locale: localeOf(app), client: api.clientId ?? "" });
  if (asked === node.phasedAsked) return;
  node.phasedAsked = asked;
  try {
    const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: asked };
    const answer = await (await api.fetchApi(ROUTE, request)).json();
    if (asked !== node.phasedAsked) return;
    node.phasedTold = answer;
    show(node, answer);
    if (answer.text && node.phasedText) write(node, answer.text);
  } catch (error) {
    node.phasedAsked = null; // asked again at the next change
    console.debug("phased dmd: no time line", error);
  }
}

const FLOAT32 = 1e-5; // how far the sigmas of a run may be from those that the widgets say

// Whether two time lines are of the same run.
function isSameRun(one, other) {
  const told = (plan) => [
    plan.phases.map((phase) => [phase.name, phase.strength ?? null]),
    plan.steps.map((step) => [step.phase, step.cfg ?? null, step.skipped]),
  ];
  if (JSON.stringify(told(one)) !== JSON.stringify(told(other))) return false;
  return one.steps.every((step, n) => Math.abs(step.sigma - other.steps[n].sigma) < FLOAT32);
}

// What ran says more than the widgets do, unless they were changed after this run was queued: theirs is the next run.
function showRun(node, output) {
  const plan = output?.phase_plan?.[0];
  const told = node.phasedTold;
  if (plan && told && !told.error && !isSameRun(told, plan)) {
    node.phasedAsked = null; // files can have changed too
    askSoon();
    return;
  }
  if (plan) show(node, plan);
  if (output?.text?.length && node.phasedText) write(node, output.text[0]);
}

// Nodes further down depend on this one, so all are asked for; one whose question is the same asks nothing.
function askSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    for (const graph of [app.graph, ...(app.graph?.subgraphs?.values?.() ?? [])]) {
      for (const node of graph?.nodes ?? graph?._nodes ?? []) {
        if (!node.phasedTimeline) continue;
        fit(node);
        ask(node);
      }
    }
  }, WAIT_MS);
}

function addBox(node, name, height, style) {
  const box = document.createElement("div");
  box.className = `phased-dmd-${name}`;
  box.style.cssText = style;
  const tall = () => height + 2 * MARGIN;
  const options = { serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: tall, getMaxHeight: tall };
  const widget = node.addDOMWidget(`phase_${name}`, `phased_${name}`, box, options);
  widget.serialize = false;
  return box;
}

function watch(node) {
  for (const widget of node.widgets ?? []) {
    const callback = widget.callback;
    widget.callback = function () {
      const result = callback?.apply(this, arguments);
      fit(node);
      askSoon();
      return result;
    };
  }
  for (const event of ["onConfigure", "onConnectionsChange", "onAdded"]) {
    const before = node[event];
    node[event] = function () {
      const result = before?.apply(this, arguments);
      fit(this);
      askSoon();
      return result;
    };
  }
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.apply(this, arguments);
    showRun(this, output);
  };
}

// The widgets and sockets that a node needs now: the Hub's id where the Hub is asked, one free socket for a MODEL.
function fit(node) {
  if (node.comfyClass === "PhasedDMDLoadExperts") {
    const hub = node.widgets?.find((widget) => widget.name === "hub_id");
    const experts = node.widgets?.find((widget) => widget.name === "experts");
    if (hub && experts) {
      hub.hidden = experts.value !== FROM_HUB;
      hub.options.hidden = hub.hidden;
    }
  }
  if (node.comfyClass === "PhasedDMDExperts") growSockets(node);
}

const MODELS = 6;

function growSockets(node) {
  if (node.phasedGrowing || app.configuringGraph) return;
  node.phasedGrowing = true;
  try {
    const numbered = (k) => node.inputs.findIndex((input) => input.name === `model_${k}`);
    let used = 0;
    for (let k = 1; k <= MODELS; k += 1) {
      const at = numbered(k);
      if (at >= 0 && node.inputs[at].link !== null && node.inputs[at].link !== undefined) used = k;
    }
    const wanted = Math.min(Math.max(used + 1, 2), MODELS);
    for (let k = MODELS; k > wanted; k -= 1) if (numbered(k) >= 0) node.removeInput(numbered(k));
    for (let k = 1; k <= wanted; k += 1) if (numbered(k) < 0) node.addInput(`model_${k}`, "MODEL", { shape: 7 });
  } finally {
    node.phasedGrowing = false;
  }
}

app.registerExtension({
  name: "PhasedDMD.Timeline",
  setup() {
    api.addEventListener("graphChanged", askSoon);
  },
  nodeCreated(node) {
    if (!PLANS.includes(node.comfyClass) && !OTHERS.includes(node.comfyClass)) return;
    node.phasedTimeline = addBox(node, "timeline", HEIGHT, "width: 100%; overflow: hidden");
    if (node.comfyClass === REPORT) {
      const style = "overflow: auto; font: 12px/1.5 monospace; color: #e6e6e6; white-space: pre-wrap; user-select: text";
      node.phasedText = addBox(node, "text", TEXT_HEIGHT, style);
    }
    watch(node);
    fit(node);
    askSoon();
  },
  afterConfigureGraph() {
    for (const node of app.graph?.nodes ?? app.graph?._nodes ?? []) if (node.phasedTimeline) fit(node);
    askSoon();
  },
});
