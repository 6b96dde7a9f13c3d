// Replaces what people have built for two experts, a pair of KSamplerAdvanced or a WanMoeKSampler, by the nodes of this
// pack, with the same seed, prompts, LoRAs, size, sigmas and guidance.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { reached, valueOf } from "./graph.js";
import { say, unsay } from "./remarks.js";
import { said } from "./convert_words.js";
import { localeOf } from "./words.js";

const ROUTE = "/phased_dmd/ksampler_sigmas";
const SHIFTS = ["ModelSamplingSD3", "ModelSamplingAuraFlow"];
const FROM_OUTSIDE = -10; // ids of a subgraph's own sockets, which newer front ends have as text
const TO_OUTSIDE = -20;
const HOPS = 50;
const FEW_STEPS = 8;
const ABOVE = 340; // the height of Phased Experts, and a gap
const LEFT_OUT = /^(dpm_2|uni_pc)/; // samplers for which KSampler leaves out the last step but one of one step more
const WITHOUT_MEMORY = ["euler", "euler_cfg_pp", "heun", "ddim"];
const WITH_NOISE = /ancestral|sde|lcm|ddpm|seeds|sa_solver/;

class NotConverted extends Error {
  constructor(sentence, ...values) {
    super(said(app, sentence, ...values));
  }
}

function read(node, name) {
  const widget = node.widgets.find((each) => each.name === name);
  const value = widget && valueOf(node, widget);
  if (value === undefined) throw new NotConverted("{} comes from another node: write its value into the widget", name);
  return value;
}

function socket(node, name) {
  return node.inputs.findIndex((input) => input.name === name);
}

function before(node, name) {
  const input = node.inputs[socket(node, name)];
  return input ? reached(node, input) : null;
}

function same(a, b, name) {
  const [one, other] = [a, b].map((node) => node.graph.getLink(node.inputs[socket(node, name)].link));
  return one?.origin_id === other?.origin_id && one?.origin_slot === other?.origin_slot;
}

function shiftOf(node, name) {
  let found = before(node, name);
  for (let hop = 0; found && hop < HOPS; hop += 1) {
    if (SHIFTS.includes(found.origin.type) && found.origin.mode === 0) {
      return Number(read(found.origin, "shift").toFixed(6)); // a template of ComfyUI has 8 and 8.000000000000002
    }
    const next = found.origin.inputs?.find((input) => input.type === "MODEL" && input.link !== null);
    found = next ? reached(found.origin, next) : null;
  }
  return null;
}

// What a pair does, or why it cannot be said.
async function pairOf(second) {
  const first = before(second, "latent_image")?.origin;
  if (first?.type !== "KSamplerAdvanced" || read(first, "add_noise") !== "enable") return null;
  if (read(second, "add_noise") !== "disable") return null;
  if (first.graph !== second.graph) throw new NotConverted("one of the two samplers is in a subgraph, the other is not");
  for (const name of ["steps", "scheduler"]) {
    if (read(first, name) !== read(second, name)) throw new NotConverted("the two samplers differ in {}", name);
  }
  for (const name of ["positive", "negative"]) {
    if (!same(first, second, name)) throw new NotConverted("the two samplers differ in {}", name);
  }
  const steps = read(first, "steps");
  const split = read(first, "end_at_step");
  if (read(first, "start_at_step") !== 0 || read(second, "end_at_step") < steps || read(second, "start_at_step") !== split) {
    throw new NotConverted("the two samplers do not run from the first step to the last without a gap");
  }
  if (split < 1 || split >= steps) throw new NotConverted("one of the two samplers has no steps");
  if (read(first, "return_with_leftover_noise") !== "enable") {
    throw new NotConverted("the first sampler ends without noise: set its return_with_leftover_noise to enable");
  }
  if (first.outputs[0].links.length > 1) throw new NotConverted("the latent of the first sampler also goes to another node");
  const shifts = [first, second].map((node) => shiftOf(node, "model"));
  if (shifts[0] === null || shifts[0] !== shifts[1]) {
    throw new NotConverted("the two MODELs need one shift: put a ModelSamplingSD3 of the same value on each");
  }
  const samplers = [first, second].map((node) => read(node, "sampler_name"));
  const [seed, other] = [first, second].map((node) => read(node, "noise_seed"));
  const plan = await planOf(steps, () => split, shifts[0], samplers, read(first, "scheduler"));
  const note = WITH_NOISE.test(samplers[1]) && other !== seed + 1 ? said(app, "{} draws other noise in the second half", samplers[1]) : "";
  const cfgs = [first, second].map((node) => read(node, "cfg"));
  const models = [[first, "model"], [second, "model"]];
  return { source: first, last: second, old: [first, second], models, cfgs, seed, plan, denoise: 1, note, ...choice(samplers) };
}

// Two samplers begin anew at the hand-over, which matters to those that remember or draw noise.
function choice(samplers) {
  const alike = samplers[0] === samplers[1];
  return { sampler: samplers[0], samplers: alike && WITHOUT_MEMORY.includes(samplers[0]) ? "" : samplers.join(", ") };
}

// Steps and boundary where the sigmas are those of a shift, else the sigmas themselves.
async function planOf(steps, splitOf, shift, samplers, scheduler) {
  const uniform = scheduler === "simple" && !samplers.some((name) => LEFT_OUT.test(name));
  const split = splitOf(null);
  if (uniform && split !== null && steps <= FEW_STEPS) {
    return ["PhasedDMDPlanFromSteps", { steps: `${split}, ${steps - split}`, shift }];
  }
  if (uniform && split !== null) {
    const raw = 1 - split / steps;
    const boundary = (shift * raw) / (1 + (shift - 1) * raw);
    return ["PhasedDMDPlanFromBoundary", { boundary: String(Math.ceil(boundary * 1e4 - 1e-6) / 1e4), steps, shift: String(shift) }];
  }
  const lists = await Promise.all(samplers.map((name) => sigmasOf({ steps, shift, scheduler, sampler_name: name })));
  if (String(lists[0]) !== String(lists[1])) throw new NotConverted("the two samplers have other sigmas");
  const sigmas = lists[0].slice(0, -1);
  if (sigmas[0] !== 1 || sigmas.some((sigma, k) => k && sigma * 1.001 >= sigmas[k - 1])) {
    throw new NotConverted("the sigmas of {} do not descend from 1 by at least 0.1 % a step", scheduler);
  }
  const at = splitOf(sigmas);
  if (at < 1 || at >= sigmas.length) throw new NotConverted("all steps are on one side of the boundary");
  const text = [sigmas.slice(0, at), sigmas.slice(at)].map((part) => part.map((sigma) => +sigma.toPrecision(9)).join(", "));
  return ["PhasedDMDPlanFromSigmas", { sigmas: text.join(" | ") }];
}

async function sigmasOf(asked) {
  const body = JSON.stringify({ ...asked, locale: localeOf(app) });
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body };
  const answer = await (await api.fetchApi(ROUTE, request)).json();
  if (!answer.sigmas) throw new NotConverted("{}", answer.error ?? "");
  return answer.sigmas;
}

async function moeOf(node) {
  const [steps, shift, boundary] = ["steps", "sigma_shift", "boundary"].map((name) => read(node, name));
  const sampler = read(node, "sampler_name");
  const scheduler = read(node, "scheduler");
  let plan = ["PhasedDMDPlanFromBoundary", { boundary: String(boundary), steps, shift: String(shift) }];
  if (scheduler !== "simple" || LEFT_OUT.test(sampler)) {
    const split = (sigmas) => (sigmas ? sigmas.findIndex((sigma) => sigma <= boundary) : null);
    plan = await planOf(steps, split, shift, [sampler, sampler], scheduler);
  }
  const models = [[node, "model_high_noise"], [node, "model_low_noise"]];
  const cfgs = [read(node, "cfg_high_noise"), read(node, "cfg_low_noise")];
  const common = { source: node, last: node, old: [node], models, cfgs, seed: read(node, "seed"), plan };
  return { ...common, sampler, samplers: "", note: "", denoise: read(node, "denoise") };
}

function add(graph, type, at, values) {
  const node = LiteGraph.createNode(type);
  graph.add(node);
  node.pos = at;
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((each) => each.name === name);
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  }
  return node;
}

function moveInput(graph, from, fromName, to, toName) {
  const link = graph.getLink(from.inputs[socket(from, fromName)]?.link);
  if (!link) return;
  const slot = socket(to, toName);
  if (Number(link.origin_id) === FROM_OUTSIDE) graph.inputNode.slots[link.origin_slot].connect(to.inputs[slot], to);
  else graph.getNodeById(link.origin_id).connect(link.origin_slot, to, slot);
}

function moveOutputs(graph, from, to) {
  for (const id of [...(from.outputs[0].links ?? [])]) {
    const link = graph.getLink(id);
    if (Number(link.target_id) === TO_OUTSIDE) graph.outputNode.slots[link.target_slot].connect(to.outputs[0], to);
    else to.connect(0, graph.getNodeById(link.target_id), link.target_slot);
  }
}

function replace(graph, found) {
  const [x, y] = found.source.pos;
  const plan = add(graph, found.plan[0], [x - 400, y - ABOVE], found.plan[1]);
  const cfg = found.cfgs.map(String).join(", ");
  const experts = add(graph, "PhasedDMDExperts", [x, y - ABOVE], { cfg });
  const values = { seed: found.seed, steps: 0, sampler_name: found.sampler, samplers: found.samplers, denoise: found.denoise };
  const sampler = add(graph, "PhasedDMDSampler", [x, y], values);
  const after = sampler.widgets.find((widget) => widget.name === "control_after_generate");
  const old = found.source.widgets.find((widget) => widget.name === "control_after_generate");
  if (after && old) after.value = old.value;
  plan.connect(0, experts, socket(experts, "plan"));
  found.models.forEach(([node, name], k) => moveInput(graph, node, name, experts, `model_${k + 1}`));
  experts.connect(0, sampler, socket(sampler, "model"));
  for (const name of ["positive", "negative", "latent_image"]) moveInput(graph, found.source, name, sampler, name);
  moveOutputs(graph, found.last, sampler);
  for (const node of found.old) graph.remove(node);
  if (found.note) say(sampler, found.note);
}

// Converts all that can be; returns how many, and why others were left, which their nodes say too.
export async function convert() {
  const [left, graphs] = [[], [app.graph, ...(app.graph.subgraphs?.values?.() ?? [])]];
  let count = 0;
  for (const graph of graphs) {
    graph.beforeChange?.();
    for (const node of [...graph.nodes]) {
      if (!graph.getNodeById(node.id) || node.mode !== 0) continue;
      if (!["KSamplerAdvanced", "WanMoeKSampler"].includes(node.type)) continue;
      unsay(node);
      try {
        const found = await (node.type === "KSamplerAdvanced" ? pairOf(node) : moeOf(node));
        if (found) {
          replace(graph, found);
          count += 1;
        }
      } catch (error) {
        if (!(error instanceof NotConverted)) throw error;
        say(node, said(app, "Not converted: {}", error.message));
        left.push(`${node.title}: ${error.message}`);
      }
    }
    graph.afterChange?.();
  }
  return { count, left };
}

async function convertAndSay() {
  const { count, left } = await convert();
  const detail = [count ? said(app, "{} replaced", count) : "", ...left].filter(Boolean).join("; ");
  const severity = count && !left.length ? "success" : "warn";
  const summary = "Phased DMD";
  const nothing = said(app, "no pair of KSamplerAdvanced and no WanMoeKSampler here");
  app.extensionManager.toast.add({ severity, summary, detail: detail || nothing, life: 8000 });
}

app.registerExtension({
  name: "PhasedDMD.Convert",
  commands: [{ id: "PhasedDMD.Convert", label: "Phased DMD: one sampler in the place of two KSamplers", function: convertAndSay }],
  menuCommands: [{ path: ["Extensions", "Phased DMD"], commands: ["PhasedDMD.Convert"] }],
});
