// Finds, in the graph, the nodes of this pack that lead to a node, and the values that their widgets will have in a run.
const OURS = /^PhasedDMD/;
const SOCKETS = ["plan", "model", "sigmas"];
const HOPS = 100;
const BYPASSED = 4;

export function source(node, input) {
  const link = input.link === null || input.link === undefined ? null : node.graph?.getLink?.(input.link) ?? node.graph?.links?.[input.link];
  const origin = link ? node.graph.getNodeById(link.origin_id) : null;
  return origin ? { origin, slot: link.origin_slot } : null;
}

// Of SIGMAS only what comes straight from a node of this pack is known: others change them on the way.
function isPassed(origin, input) {
  return input.type !== "SIGMAS" || origin.type === "Reroute" || origin.mode === BYPASSED;
}

function oursBefore(node, input) {
  let found = source(node, input);
  for (let hop = 0; found && hop < HOPS; hop += 1) {
    const { origin, slot } = found;
    if (OURS.test(origin.comfyClass ?? "") && origin.mode !== BYPASSED) return origin;
    if (!isPassed(origin, input)) return null;
    const type = origin.outputs?.[slot]?.type;
    const next = origin.inputs?.find((each) => each.link !== null && (each.type === type || each.type === "*"));
    found = next ? source(origin, next) : null;
  }
  return null;
}

// A widget whose value comes over a link: that of a primitive, or undefined where another node computes it.
export function valueOf(node, widget) {
  const input = node.inputs?.find((each) => each.widget?.name === widget.name && each.link !== null && each.link !== undefined);
  if (!input) return widget.value;
  const found = source(node, input);
  return /^Primitive/.test(found?.origin.type ?? "") ? found.origin.widgets?.[0]?.value : undefined;
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
    else if (input.type === "SIGMAS" && source(node, input)) unknown.push(input.name);
  }
  return { node: node.comfyClass, inputs, from, unknown };
}
