// Finds, in the graph, the nodes of this pack that lead to a node, and the values that their widgets will have in a run.
const OURS = /^PhasedDMD/;
const SOCKETS = ["plan", "model", "sigmas"];
const HOPS = 100;
const BYPASSED = 4;

function source(node, input) {
  const link = input.link === null || input.link === undefined ? null : node.graph?.getLink?.(input.link) ?? node.graph?.links?.[input.link];
  const origin = link ? node.graph.getNodeById(link.origin_id) : null;
  return origin ? { origin, slot: link.origin_slot } : null;
}

const FROM_OUTSIDE = -10; // the id of a subgraph's own inputs, for links inside of it

// The node that stands for a subgraph, in whatever graph it is.
function instanceOf(graph) {
  const root = graph?.rootGraph;
  if (!root || root === graph) return null;
  const nodes = [root, ...(root.subgraphs?.values?.() ?? [])].flatMap((each) => each.nodes ?? []);
  return nodes.find((node) => node.subgraph === graph) ?? null;
}

// The socket outside of a subgraph that a link inside of it comes from.
function outside(node, input) {
  const link = node.graph?.getLink?.(input.link);
  const owner = Number(link?.origin_id) === FROM_OUTSIDE ? instanceOf(node.graph) : null; // ids can be texts
  return owner ? { owner, socket: owner.inputs[link.origin_slot] } : null;
}

// As source, through the walls of subgraphs.
export function reached(node, input) {
  const beyond = outside(node, input);
  if (beyond) return beyond.socket ? reached(beyond.owner, beyond.socket) : null;
  let found = source(node, input);
  for (let hop = 0; found?.origin.subgraph && hop < HOPS; hop += 1) {
    const { subgraph } = found.origin;
    const link = subgraph.getLink?.(subgraph.outputs?.[found.slot]?.linkIds?.[0]);
    const origin = link ? subgraph.getNodeById(link.origin_id) : null;
    found = origin ? { origin, slot: link.origin_slot } : null;
  }
  return found;
}

// Of SIGMAS only what comes straight from a node of this pack is known: others change them on the way.
function isPassed(origin, input) {
  return input.type !== "SIGMAS" || origin.type === "Reroute" || origin.mode === BYPASSED;
}

function oursBefore(node, input) {
  let found = reached(node, input);
  for (let hop = 0; found && hop < HOPS; hop += 1) {
    const { origin, slot } = found;
    if (OURS.test(origin.comfyClass ?? "") && origin.mode !== BYPASSED) return origin;
    if (!isPassed(origin, input)) return null;
    const type = origin.outputs?.[slot]?.type;
    const next = origin.inputs?.find((each) => each.link !== null && (each.type === type || each.type === "*"));
    found = next ? reached(origin, next) : null;
  }
  return null;
}

function linked(node, widget) {
  return node.inputs?.find((each) => each.widget?.name === widget.name && each.link !== null && each.link !== undefined);
}

function ofPrimitive(found) {
  return /^Primitive/.test(found?.origin.type ?? "") ? found.origin.widgets?.[0]?.value : undefined;
}

// A widget whose value comes over a link: that of a primitive or of the node that stands for a subgraph, or undefined where
// another node computes it.
export function valueOf(node, widget) {
  const input = linked(node, widget);
  const beyond = input ? outside(node, input) : null;
  if (!beyond) return input ? ofPrimitive(reached(node, input)) : widget.value;
  const { owner, socket } = beyond;
  if (socket?.link !== null && socket?.link !== undefined) return ofPrimitive(reached(owner, socket));
  return owner.widgets?.find((each) => each.name === (socket?.widget?.name ?? socket?.name))?.value;
}

export function describe(node, hop = 0) {
  const inputs = {};
  const unknown = [];
  for (const widget of node.widgets ?? []) {
    if (widget.serialize === false || widget.options?.serialize === false) continue;
    const value = valueOf(node, widget);
    if (value === undefined) unknown.push(widget.name);
    else inputs[widget.name] = value;
  }
  const from = {};
  for (const input of node.inputs ?? []) {
    if (!SOCKETS.includes(input.name) || input.widget || hop > 8) continue;
    const before = oursBefore(node, input);
    if (before) from[input.name] = describe(before, hop + 1);
    else if (input.type === "SIGMAS" && reached(node, input)) unknown.push(input.name);
  }
  return { node: node.comfyClass, inputs, from, unknown };
}
