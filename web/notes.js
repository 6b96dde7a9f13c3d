// Notes and titles of the templates in the language of the front end, line by line. Lines that somebody has changed, and
// graphs without a note of ours, stay as they are.
import { app } from "../../scripts/app.js";
import { localeOf } from "./words.js";

const LANGUAGES = ["zh"];

async function linesIn(language) {
  return LANGUAGES.includes(language) ? (await fetch(new URL(`./notes/${language}.json`, import.meta.url))).json() : null;
}

export function translated(graph, lines) {
  const parts = [graph, ...(graph.definitions?.subgraphs ?? [])];
  const nodes = parts.flatMap((part) => part.nodes ?? []);
  const notes = nodes.filter((node) => node.type === "MarkdownNote" && typeof node.widgets_values?.[0] === "string");
  const has = (line) => Object.hasOwn(lines, line);
  if (!notes.some((note) => note.widgets_values[0].split("\n").some((line) => line && has(line)))) return;
  const say = (text) => (has(text) ? lines[text] : text);
  for (const note of notes) note.widgets_values[0] = note.widgets_values[0].split("\n").map(say).join("\n");
  for (const titled of [...nodes, ...parts.flatMap((part) => part.groups ?? [])]) if (titled.title) titled.title = say(titled.title);
}

app.registerExtension({
  name: "PhasedDMD.Notes",
  async beforeConfigureGraph(graph) {
    try {
      const lines = await linesIn(localeOf(app).split("-")[0]);
      if (lines) translated(graph, lines);
    } catch (error) {
      console.debug("phased dmd: notes stay in English", error);
    }
  },
});
