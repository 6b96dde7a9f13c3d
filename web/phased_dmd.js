// Draws the time line of a phase plan on the nodes that hold one: while their widgets move for plan nodes (the server
// answers with the plan), after a run for the others. Every node works without this file.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const ROUTE = "/phased_dmd/plan";
const PLAN_NODES = ["PhasedDMDPlanFromSteps", "PhasedDMDPlanFromSigmas", "PhasedDMDPlanFromExperts"];
const RUN_NODES = ["PhasedDMDLoadExperts", "PhasedDMDExperts", "PhasedDMDExpertsLoRA", "PhasedDMDSigmas", "PhasedDMDSampler"];
const WIDTH = 320;
const HEIGHT = 70;
const MARGIN = 10; // that the front end leaves above and below an element on a node
const NUMBER = 27; // width of a sigma
const LETTER = 6; // width of a letter of a label; one that is a little too long is set narrower
const WAIT_MS = 150;
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function label(name, left, width) {
  const room = width - 4;
  const fits = Math.floor(room / (0.7 * LETTER));
  const text = name.length <= fits ? name : fits > 2 ? `${name.slice(0, fits - 1)}\u2026` : "";
  const look = { x: left + width / 2, y: 15, "text-anchor": "middle", "font-size": 10, fill: "#fff" };
  const narrow = text.length * LETTER > room ? { textLength: room, lengthAdjust: "spacingAndGlyphs" } : {};
  return element("text", { ...look, ...narrow, "pointer-events": "none", class: "name" }, text);
}

function timeline(plan) {
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: "100%", height: HEIGHT, role: "img" });
  const x = (sigma) => 6 + (1 - sigma) * (WIDTH - 12);
  for (const phase of plan.phases) {
    const left = x(phase.start);
    const width = x(phase.end) - left;
    const band = element("rect", { x: left, y: 2, width, height: 36, fill: phase.colour, class: "phase" });
    const cfg = phase.cfg === null || phase.cfg === undefined ? "" : `, cfg ${phase.cfg}`;
    const sigmas = phase.sigmas.map((sigma) => sigma.toFixed(4)).join(", ");
    band.append(element("title", {}, `${phase.name}${cfg}: ${sigmas}`));
    svg.append(band);
    svg.append(label(phase.name, left, width));
  }
  const ends = [-Infinity, -Infinity]; // of the two rows of numbers: what has no room in the first goes to the second
  for (const sigma of plan.phases.flatMap((phase) => phase.sigmas)) {
    svg.append(element("circle", { cx: x(sigma), cy: 28, r: 4, fill: "#fff", class: "step" }));
    const left = Math.max(2, x(sigma) - NUMBER / 2);
    const row = ends.findIndex((end) => left > end + 3);
    if (row < 0) continue;
    ends[row] = left + NUMBER;
    const place = { x: left, y: 51 + 13 * row, "font-size": 10, fill: "#b8bcc2", class: "sigma" };
    svg.append(element("text", place, sigma.toFixed(3)));
  }
  return svg;
}

function show(node, answer) {
  const box = node.phasedTimeline;
  if (answer.error) {
    const line = document.createElement("div");
    line.className = "phased-dmd-error";
    line.style.cssText = "color: #ffb454; font-size: 11px; overflow: auto; max-height: 100%";
    line.textContent = answer.error;
    box.replaceChildren(line);
  } else {
    box.replaceChildren(timeline(answer));
  }
}

async function ask(node) {
  const inputs = {};
  for (const widget of node.widgets ?? []) {
    if (widget.name !== "phase_timeline") inputs[widget.name] = widget.value;
  }
  const asked = JSON.stringify({ node: node.comfyClass, inputs });
  if (asked === node.phasedAsked) return;
  node.phasedAsked = asked;
  try {
    const response = await api.fetchApi(ROUTE, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: asked,
    });
    const answer = await response.json();
    if (asked === node.phasedAsked) show(node, answer);
  } catch (error) {
    node.phasedAsked = null; // asked again at the next change
    console.debug("phased dmd: no time line", error);
  }
}

function askSoon(node) {
  clearTimeout(node.phasedTimer);
  node.phasedTimer = setTimeout(() => ask(node), WAIT_MS);
}

function addTimeline(node) {
  const box = document.createElement("div");
  box.className = "phased-dmd-timeline";
  box.style.cssText = "width: 100%; overflow: hidden";
  node.phasedTimeline = box;
  const height = () => HEIGHT + 2 * MARGIN;
  const options = { serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: height, getMaxHeight: height };
  const widget = node.addDOMWidget("phase_timeline", "phased_timeline", box, options);
  widget.serialize = false;
}

app.registerExtension({
  name: "PhasedDMD.Timeline",
  nodeCreated(node) {
    const isPlan = PLAN_NODES.includes(node.comfyClass);
    if (!isPlan && !RUN_NODES.includes(node.comfyClass)) return;
    addTimeline(node);
    if (!isPlan) {
      const executed = node.onExecuted;
      node.onExecuted = function (output) {
        executed?.apply(this, arguments);
        if (output?.phase_plan?.length) show(this, output.phase_plan[0]);
      };
      return;
    }
    for (const widget of node.widgets ?? []) {
      const callback = widget.callback;
      widget.callback = function () {
        const result = callback?.apply(this, arguments);
        askSoon(node);
        return result;
      };
    }
    const configured = node.onConfigure;
    node.onConfigure = function () {
      configured?.apply(this, arguments);
      askSoon(this);
    };
    askSoon(node);
  },
});
