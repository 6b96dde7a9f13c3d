// Draws a run under a phase plan: a cell of equal width for each step, under the names of the experts, with sigma, cfg and
// LoRA strength. Noise is on the left.
const WIDTH = 320;
const EDGE = 4;
const LETTER = 6; // width of a letter of a label; one that is a little too long is set narrower
const INK = "#ffffff";
const FAINT = "#b8bcc2";
const WARNING = "#ffd27a";
const SVG = "http://www.w3.org/2000/svg";

export const HEIGHT = 92;

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Letters of a text in widths of a Latin one: Chinese ones are as wide as high.
function letters(text) {
  return [...text].reduce((sum, letter) => sum + (letter > "\u2e7f" ? 1.9 : 1), 0);
}

function label(text, left, width, y, look) {
  const room = width - 3;
  const fits = Math.floor(room / (0.72 * LETTER));
  const short = letters(text) <= fits ? text : fits > 3 ? `${text.slice(0, fits - 1)}\u2026` : "";
  const narrow = letters(short) * LETTER > room ? { textLength: room, lengthAdjust: "spacingAndGlyphs" } : {};
  const place = { x: left + width / 2, y, "text-anchor": "middle", "font-size": 11, "pointer-events": "none" };
  return element("text", { ...place, ...narrow, ...look }, short);
}

function sigmaText(sigma, width) {
  for (const digits of [4, 3, 2]) {
    const text = sigma.toFixed(digits);
    if (text.length * 0.8 * LETTER <= width - 3) return text;
  }
  return "";
}

function number(value) {
  return String(Math.round(value * 100) / 100);
}

export function runsOf(values) {
  const runs = [];
  values.forEach((value, n) => {
    if (n && values[n - 1] === value) runs.at(-1).count += 1;
    else runs.push({ first: n, count: 1, value });
  });
  return runs;
}

// plan: of the route or of a run; words: of the language; moved(boundary, step): what a drag of a boundary does, or null.
export function draw(plan, words, moved) {
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: "100%", height: HEIGHT, role: "img" });
  const { steps, phases } = plan;
  const width = (WIDTH - 2 * EDGE) / Math.max(steps.length, 1);
  const x = (n) => EDGE + n * width;
  steps.forEach((step, n) => {
    const phase = phases[step.phase];
    const look = { fill: phase.colour, "fill-opacity": step.skipped ? 0.25 : 1, class: "step" };
    const cell = element("rect", { x: x(n) + 0.5, y: 24, width: Math.max(width - 1, 0.5), height: 28, ...look });
    const cfg = step.cfg === null || step.cfg === undefined ? "" : `, cfg ${number(step.cfg)}`;
    const left = step.skipped ? ` (${words.skipped})` : step.trained ? "" : ` (${words.untrained})`;
    cell.append(element("title", {}, `${n + 1}. ${phase.name}: sigma ${step.sigma.toFixed(4)}${cfg}${left}`));
    svg.append(cell);
    const ink = { fill: step.trained ? INK : WARNING, opacity: step.skipped ? 0.6 : 1, class: "sigma" };
    svg.append(label(sigmaText(step.sigma, width), x(n), width, 42, ink));
  });
  for (const run of runsOf(steps.map((step) => step.phase))) {
    const phase = phases[run.value];
    const place = { x: x(run.first) + 0.5, y: 2, width: run.count * width - 1, height: 20, fill: phase.colour };
    const has = phase.strength !== null && phase.strength !== undefined;
    const strength = has ? `, LoRA ${number(phase.strength)}` : "";
    const room = run.count * width - 3;
    const name = letters(phase.name + strength) * 0.72 * LETTER <= room || !has ? phase.name + strength : `${phase.name} \u00d7${number(phase.strength)}`;
    const band = element("rect", { ...place, class: "phase" });
    band.append(element("title", {}, `${phase.name}${strength}: ${phase.end.toFixed(4)} < sigma <= ${phase.start.toFixed(4)}`));
    svg.append(band);
    svg.append(label(name, x(run.first), run.count * width, 16, { fill: INK, class: "name" }));
  }
  for (const run of runsOf(steps.map((step) => `${step.phase} ${step.cfg}`))) {
    const cfg = steps[run.first].cfg;
    if (cfg === null || cfg === undefined) continue;
    const look = { fill: FAINT, class: "cfg" };
    svg.append(label(`cfg ${number(cfg)}`, x(run.first), run.count * width, 66, look));
  }
  const run = steps.filter((step) => !step.skipped);
  const kind = plan.any_steps ? words.anySteps : run.every((step) => step.trained) ? words.trained : words.notTrained;
  const shift = plan.shift === null ? "" : `, shift ${number(plan.shift)}`;
  const from = plan.start === null || plan.start === undefined ? shift : `, ${words.starts.replace("{}", number(plan.start))}`;
  const line = plan.note ?? `${words.steps.replace("{}", run.length)}${from}, ${kind}`;
  const look = { fill: plan.note ? WARNING : FAINT, class: "summary", "text-anchor": "start" };
  const summary = label(line, 0, WIDTH - 2 * EDGE, 84, look);
  summary.setAttribute("x", EDGE);
  if (plan.note) {
    summary.setAttribute("pointer-events", "auto");
    summary.append(element("title", {}, plan.note));
  }
  svg.append(summary);
  if (moved) addHandles(svg, plan, x, width, moved, words);
  return svg;
}

// A line between two experts that can be dragged to another step; at the end, moved(k, n) gets boundary k and step n.
function addHandles(svg, plan, x, width, moved, words) {
  const runs = runsOf(plan.steps.map((step) => step.phase));
  runs.slice(1).forEach((run, k) => {
    const look = { y: 2, width: 6, height: 50, rx: 3, fill: INK, "fill-opacity": 0.85, class: "boundary" };
    const handle = element("rect", { x: x(run.first) - 3, ...look, style: "cursor: ew-resize; touch-action: none" });
    handle.append(element("title", {}, words.drag));
    let at = run.first;
    handle.addEventListener("pointerdown", (event) => {
      event.stopPropagation();
      event.preventDefault();
      handle.setPointerCapture(event.pointerId);
    });
    handle.addEventListener("pointermove", (event) => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      event.stopPropagation();
      const seen = svg.getBoundingClientRect();
      const place = ((event.clientX - seen.left) / seen.width) * WIDTH;
      const last = runs[k + 2] ? runs[k + 2].first - 1 : plan.steps.length - 1;
      at = Math.min(Math.max(Math.round((place - EDGE) / width), runs[k].first + 1), last);
      handle.setAttribute("x", x(at) - 3);
    });
    handle.addEventListener("pointerup", (event) => {
      event.stopPropagation();
      handle.releasePointerCapture(event.pointerId);
      if (at !== run.first) moved(k, at);
    });
    svg.append(handle);
  });
}
