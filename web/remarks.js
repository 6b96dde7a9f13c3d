// A line that this pack writes on a node of any pack, until the next time that it looks at the node.
const NAME = "phased_note";
const HEIGHT = 74; // three lines

export function unsay(node) {
  const widget = node.widgets?.find((each) => each.name === NAME);
  if (widget) node.removeWidget(widget);
}

export function say(node, text) {
  unsay(node);
  const line = document.createElement("div");
  line.className = "phased-dmd-note";
  line.style.cssText = "color: #ffb454; font-size: 12px; overflow: auto";
  line.textContent = text;
  const tall = () => HEIGHT;
  const widget = node.addDOMWidget(NAME, NAME, line, { serialize: false, hideOnZoom: false, getMinHeight: tall, getMaxHeight: tall });
  widget.serialize = false;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}
